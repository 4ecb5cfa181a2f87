"""Where a run stands and how its clients fare, from the run folder's files alone, while it is written or after.

``read_status`` reads, ``summarize`` counts; the command line draws and prints what they give.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from baffle.errors import JournalError
from baffle.runfolder.clients import Member, RoundLog, Visit, read_members, read_rounds
from baffle.runfolder.config import RunConfig, read_config
from baffle.runfolder.metrics import Record, read_records, total

Stage = Literal["waiting", "training", "done", "diverged"]
"""Before its first round; between rounds, whether or not a process is at it; at its end; stopped by its guard."""

_RECENT = 20  # rounds whose median says what a round takes now


class ClientStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One client of a run, over all rounds it was to take part in."""

    number: int
    name: str
    examples: int
    last_seen: float | None = None
    """When the last round was closed to which something came from it, in seconds since 1970."""
    asked: int = 0
    """Rounds in which a question was sent to it."""
    answered: int = 0
    late: int = 0
    refused: int = 0
    failed: int = 0
    offline: int = 0
    """Rounds it was to take part in and was not connected."""
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float | None = None
    """From a question to its answer, the median."""
    outcome: str | None = None
    """What became of the last question."""
    reason: str | None = None
    """Why an answer was refused, or could not be given; the last one told."""

    @property
    def missed(self) -> int:
        """Rounds it was to take part in, and gave nothing to."""
        return self.late + self.refused + self.failed + self.offline


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run stands. What is unknown is None."""

    run: str
    stage: Stage
    round: int
    """Number of the last round; -1 before the first, which only calibrates and has number 0."""
    rounds: int
    evaluated: int | None = None
    """The round that loss and accuracy are of."""
    loss: float | None = None
    accuracy: float | None = None
    time: float | None = None
    """When the last round was closed, in seconds since 1970."""
    seconds: float | int | None = None
    """Of all rounds."""
    seconds_per_round: float | None = None
    """The median of the last rounds."""
    bytes_up: float | int | None = None
    bytes_down: float | int | None = None
    bytes_up_per_round: float | None = None
    bytes_down_per_round: float | None = None
    rollbacks: int = 0
    late_answers: int = 0
    """Answers that came after their round was closed."""
    refused_answers: int = 0
    participants: int | None = None
    """Clients whose answers the last round used."""
    clients: tuple[ClientStatus, ...] | None = None
    """By number; None for a run in one process, which has no roster."""
    damage: str | None = None
    """Which line of the metrics cannot be read."""

    @property
    def over(self) -> bool:
        """Whether no round will follow."""
        return self.stage in ("done", "diverged")

    @property
    def seconds_left(self) -> float | None:
        """What the other rounds will take if they are like the last ones."""
        if self.seconds_per_round is None or self.over:
            return None
        return self.seconds_per_round * max(0, self.rounds - self.round)


def read_status(run: Path) -> Status:
    """The status of a run folder, of a baseline's too. Raises JournalError if it is none.

    The rows' checksums are not looked at: ``baffle replay`` does that.
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
    """Count. ``written`` is when the newest record was, for runs without a roster; ``final_sha256`` is the hash of
    the weights in ``summary.json``: a run that was continued since is not done.
    """
    last = records[-1] if records else None
    known = {record.round for record in records}
    logs = [log for log in logs if log.round in known]  # one in flight when the run was killed counts when it is done
    evaluated = next((r for r in reversed(records) if r.loss is not None or r.accuracy is not None), None)
    seconds = [r.seconds for r in records[-_RECENT:] if r.seconds is not None]
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
        rollbacks=sum(r.restores is not None for r in records),
        late_answers=sum(log.late for log in logs),
        refused_answers=sum(log.refused for log in logs),
        participants=None if last is None else last.participants,
        clients=_clients(members, logs) if members else None,
        damage=damage,
    )


def by_attention(clients: Iterable[ClientStatus]) -> list[ClientStatus]:
    """Clients whose last question was not answered well first, then by the rounds they missed."""
    return sorted(clients, key=lambda c: (c.outcome in ("ok", None), -c.missed, c.number))


def _final(run: Path) -> str | None:
    """The hash that the run wrote at its end, if it has come there."""
    try:
        found = msgspec.json.decode((run / "summary.json").read_bytes(), type=dict[str, str | int | float | None])
    except (OSError, msgspec.DecodeError):
        return None
    return str(found.get("weights_sha256"))


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
