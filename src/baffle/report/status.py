"""Progress of a run and state of its clients, read from the run folder during the run or after.

``read_status`` reads, ``summarize`` counts; the command line draws and prints what they give.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from baffle.client.costs import costs_of
from baffle.errors import JournalError
from baffle.runfolder.clients import Member, RoundLog, Visit, read_members, read_rounds
from baffle.runfolder.config import RunConfig, read_config
from baffle.runfolder.metrics import Record, read_records, total

Stage = Literal["waiting", "training", "done", "diverged"]
"""Before the first round; between rounds, whether or not a process is running; finished; stopped by the guard."""

_RECENT = 20  # rounds whose median says what a round takes now


class ClientStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One client of a run, over all rounds that it was chosen for."""

    number: int
    name: str
    examples: int
    last_seen: float | None = None
    """When the last round that it sent something to was closed, in seconds since 1970."""
    asked: int = 0
    """Rounds in which it got a request."""
    answered: int = 0
    late: int = 0
    refused: int = 0
    failed: int = 0
    offline: int = 0
    """Rounds that it was chosen for and was not connected."""
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float | None = None
    """Median time from a request to its response."""
    outcome: str | None = None
    """Outcome of the last request."""
    reason: str | None = None
    """The latest reason why a response was refused or the client failed."""

    @property
    def missed(self) -> int:
        """Rounds that it was chosen for without contributing."""
        return self.late + self.refused + self.failed + self.offline


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of a run; None for what is unknown."""

    run: str
    stage: Stage
    round: int
    """Number of the last round; -1 before the first, which has number 0 and only measures the scale of scalars."""
    rounds: int
    evaluated: int | None = None
    """The round after which loss and accuracy were measured."""
    loss: float | None = None
    accuracy: float | None = None
    time: float | None = None
    """When the last round was closed, in seconds since 1970."""
    seconds: float | int | None = None
    """Total of all rounds."""
    seconds_per_round: float | None = None
    """Median of the last rounds."""
    bytes_up: float | int | None = None
    bytes_down: float | int | None = None
    bytes_up_per_round: float | None = None
    bytes_down_per_round: float | None = None
    passes_per_example: int | None = None
    """Forward passes over each example of a mini-batch."""
    numbers_per_reply: int | None = None
    bits: int | None = None
    """Of each number of a reply."""
    numbers_of: str | None = None
    """What the numbers of a reply are about, in words."""
    rollbacks: int = 0
    late_answers: int = 0
    """Responses that arrived after their round was closed."""
    refused_answers: int = 0
    participants: int | None = None
    """Clients whose responses the last round used."""
    clients: tuple[ClientStatus, ...] | None = None
    """By number; None for a run in one process."""
    damage: str | None = None
    """Which line of the metrics is malformed."""

    @property
    def over(self) -> bool:
        """Whether no round will follow."""
        return self.stage in ("done", "diverged")

    @property
    def seconds_left(self) -> float | None:
        """Estimated time of the remaining rounds, from the last ones."""
        if self.seconds_per_round is None or self.over:
            return None
        return self.seconds_per_round * max(0, self.rounds - self.round)


def read_status(run: Path) -> Status:
    """Read the status of a run folder, or of a baseline's. Raises JournalError if it is not one.

    The rows' checksums are not verified: ``baffle replay`` does that.
    """
    config = read_config(run)
    metrics = run / "metrics.jsonl"
    records, damage = read_records(metrics)
    members, logs = read_members(run), read_rounds(run)
    try:
        written = metrics.stat().st_mtime
    except OSError as error:
        raise JournalError(f"{metrics}: cannot be read: {error.strerror}") from error
    return summarize(str(run), config, records, members, logs, written=written, final_sha256=_final(run), damage=damage)


def summarize(
    run: str,
    config: RunConfig,
    records: Sequence[Record],
    members: Sequence[Member],
    logs: Sequence[RoundLog],
    *,
    written: float | None = None,
    final_sha256: str | None = None,
    damage: str | None = None,
) -> Status:
    """Compute the status from what a run folder holds.

    Args:
        run: Name to show.
        config: Settings of the run.
        records: One record per round.
        members: The clients on other machines.
        logs: What each round cost each client.
        written: When the metrics were last written, for runs in one process, in seconds since 1970.
        final_sha256: Hash of the weights in ``summary.json``. A run that was continued since is not done.
        damage: Which line of the metrics is malformed.

    Returns:
        The status.
    """
    last = records[-1] if records else None
    known = {record.round for record in records}
    logs = [log for log in logs if log.round in known]  # a round that a kill interrupted counts when it is repeated
    evaluated = next((r for r in reversed(records) if r.loss is not None or r.accuracy is not None), None)
    seconds = [r.seconds for r in records[-_RECENT:] if r.seconds is not None]
    costs = None if config.backprop else costs_of(config.method, config.table)
    up, down = (total(r.bytes_up for r in records), total(r.bytes_down for r in records))
    return Status(
        run=run,
        stage=_stage(config, records, final_sha256),
        round=-1 if last is None else last.round,
        rounds=config.rounds,
        evaluated=None if evaluated is None else evaluated.round,
        loss=None if evaluated is None else evaluated.loss,
        accuracy=None if evaluated is None else evaluated.accuracy,
        time=None if last is None else logs[-1].time if logs and logs[-1].round == last.round else written,
        seconds=total(r.seconds for r in records),
        seconds_per_round=statistics.median(seconds) if seconds else None,
        bytes_up=up,
        bytes_down=down,
        bytes_up_per_round=None if up is None or not records else up / len(records),
        bytes_down_per_round=None if down is None or not records else down / len(records),
        passes_per_example=None if costs is None else costs.passes,
        numbers_per_reply=None if costs is None else costs.numbers,
        bits=None if costs is None else costs.bits,
        numbers_of=None if costs is None else costs.kinds,
        rollbacks=sum(r.restores is not None for r in records),
        late_answers=sum(log.late for log in logs),
        refused_answers=sum(log.refused for log in logs),
        participants=None if last is None else last.participants,
        clients=_clients(members, logs) if members else None,
        damage=damage,
    )


def by_attention(clients: Iterable[ClientStatus]) -> list[ClientStatus]:
    """Sort clients: first those whose last request failed, then by the number of rounds they missed."""
    return sorted(clients, key=lambda c: (c.outcome in ("ok", None), -c.missed, c.number))


def _final(run: Path) -> str | None:
    """The weights' hash that the run wrote at its end; None before."""
    try:
        summary = msgspec.json.decode((run / "summary.json").read_bytes(), type=dict[str, str | int | float | None])
    except (OSError, msgspec.DecodeError):
        return None
    return str(summary.get("weights_sha256"))


def _stage(config: RunConfig, records: Sequence[Record], final_sha256: str | None) -> Stage:
    if not records:
        return "waiting"
    if final_sha256 == records[-1].weights_sha256 and records[-1].round >= config.rounds:
        return "done"
    guard, returns = config.method.guard, sum(r.restores is not None for r in records)
    return "diverged" if guard is not None and returns > guard.rollbacks else "training"


def _clients(members: Sequence[Member], logs: Sequence[RoundLog]) -> tuple[ClientStatus, ...]:
    visits: list[list[tuple[float, Visit]]] = [[] for _ in members]
    for log in logs:
        for visit in log.visits:
            if visit.client < len(members):
                visits[visit.client].append((log.time, visit))
    return tuple(_client(number, member, visits[number]) for number, member in enumerate(members))


def _client(number: int, member: Member, visits: Sequence[tuple[float, Visit]]) -> ClientStatus:
    count = {kind: sum(visit.outcome == kind for _, visit in visits) for kind in ("ok", "late", "refused", "failed")}
    offline = sum(visit.outcome == "offline" for _, visit in visits)
    seconds = [visit.seconds for _, visit in visits if visit.outcome == "ok" and visit.seconds is not None]
    return ClientStatus(
        number=number,
        name=member.name,
        examples=member.examples,
        last_seen=next((time for time, visit in reversed(visits) if visit.bytes_up or visit.outcome == "ok"), None),
        asked=len(visits) - offline,
        answered=count["ok"],
        late=count["late"],
        refused=count["refused"],
        failed=count["failed"],
        offline=offline,
        bytes_up=sum(visit.bytes_up for _, visit in visits),
        bytes_down=sum(visit.bytes_down for _, visit in visits),
        seconds=statistics.median(seconds) if seconds else None,
        outcome=visits[-1][1].outcome if visits else None,
        reason=next((visit.reason for _, visit in reversed(visits) if visit.reason is not None), None),
    )
