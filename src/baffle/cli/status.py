"""``baffle status``: progress of a run and state of its clients, once or live."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baffle.cli.common import Json, RunPath, print_json
from baffle.report.status import ClientStatus, Status, by_attention, read_status

MOST_CLIENTS = 30
"""Clients that a table shows."""
_EVERY = 1.0  # seconds between looks at the run folder
_LINES_AROUND = 12  # of a screen, that are not clients
_STYLES = {"waiting": "yellow", "training": "cyan", "done": "bold green", "diverged": "bold red"}


def status_command(
    run: RunPath,
    watch: Annotated[bool, typer.Option("--watch", help="Keep drawing until the run is done.")] = False,
    json_output: Json = False,
) -> None:
    """Show the progress of a run: round, loss, bytes, seconds, and each client of a deployment.

    Only reads the run folder, so it works at any time, also for a run of 'baffle train'. Of many clients the 30 that
    need attention most are shown; --json lists all. With --watch, --json prints a line whenever something changes.
    """
    updates = statuses(run) if watch else iter([read_status(run)])
    if json_output:
        before = None
        for status in updates:
            if status != before:
                print_json(status)
            before = status
    elif watch:
        show_live(updates, Console())
    else:
        Console().print(draw(next(updates), time.time()))


def statuses(run: Path) -> Iterator[Status]:
    """Yield the status of a run repeatedly until it is over."""
    while True:
        began = time.monotonic()
        status = read_status(run)
        yield status
        if status.over:
            return
        time.sleep(max(_EVERY, 5 * (time.monotonic() - began)))  # a long run takes long to read


def show_live(updates: Iterator[Status], console: Console) -> None:
    """Draw each status over the previous one; only the last one if the console is not a terminal."""
    if not console.is_terminal:
        *_, last = updates
        console.print(draw(last, time.time()))
        return
    with Live(console=console, auto_refresh=False) as live:
        for status in updates:
            most = min(MOST_CLIENTS, max(3, console.height - _LINES_AROUND))
            live.update(draw(status, time.time(), most), refresh=True)


def draw(status: Status, now: float, most: int = MOST_CLIENTS) -> RenderableType:
    """A status as text and a table of at most ``most`` clients. ``now`` is in seconds since 1970."""
    head = _head(status, now)
    if status.clients is None:
        return head
    shown = list(status.clients) if len(status.clients) <= most else by_attention(status.clients)[:most]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("#", justify="right")
    table.add_column("client", no_wrap=True, max_width=24, overflow="ellipsis")
    for title in ("examples", "seen", "rounds", "up", "down", "seconds"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("missed")
    for client in shown:
        table.add_row(*_row(client, now))
    parts: list[RenderableType] = [head, Text(), table]
    if len(shown) < len(status.clients):
        rest = sorted(set(status.clients) - set(shown), key=lambda c: c.number)
        well = sum(client.outcome == "ok" for client in rest)
        parts.append(Text(f"and {len(rest):,} more clients; {well:,} of them answered when last asked", "dim"))
    return Group(*parts)


def _head(status: Status, now: float) -> Table:
    """The general part: one line per name and value."""
    lines = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    lines.add_column(style="dim")
    lines.add_column()
    stage = Text(status.stage, _STYLES[status.stage])
    if status.round >= 0:
        stage += Text(f", round {status.round:,} of {status.rounds:,}")
    if status.time is not None:
        stage += Text(f", the last one {_ago(now - status.time)} ago")
    lines.add_row("run", Text(status.run, "bold"))
    lines.add_row("stage", stage)
    if status.evaluated is not None:
        values = (("loss", status.loss), ("accuracy", status.accuracy))
        known = ", ".join(f"{name} {value:.4f}" for name, value in values if value is not None)
        lines.add_row("model", f"{known} (round {status.evaluated:,})")
    if status.seconds_per_round is not None:
        left = "" if status.seconds_left is None else f", about {_ago(status.seconds_left)} to go"
        spent = "" if status.seconds is None else f", {_ago(status.seconds)} in all"
        lines.add_row("time", f"{status.seconds_per_round:.2f} s a round{spent}{left}")
    if status.passes_per_example is not None:
        bits = "1 bit" if status.bits == 1 else f"{status.bits} bits"
        lines.add_row("passes", f"{status.passes_per_example:,} over each example of a mini-batch")
        lines.add_row("reply", f"{status.numbers_per_reply:,} numbers of {bits}: {status.numbers_of}")
    for name, sum_, mean in (
        ("bytes up", status.bytes_up, status.bytes_up_per_round),
        ("bytes down", status.bytes_down, status.bytes_down_per_round),
    ):
        if sum_ is not None and mean is not None:
            lines.add_row(name, f"{_size(sum_)}, {_size(mean)} a round")
    if status.clients is not None:
        used = "" if status.participants is None else f", {status.participants:,} took part in the last round"
        lines.add_row("clients", f"{len(status.clients):,}{used}")
    for name, count in (
        ("rollbacks", status.rollbacks),
        ("late answers", status.late_answers),
        ("refused", status.refused_answers),
    ):
        if count:
            lines.add_row(name, Text(f"{count:,}", "yellow"))
    if status.damage is not None:
        lines.add_row("damage", Text(status.damage, "bold red"))
    return lines


def _row(client: ClientStatus, now: float) -> list[Text]:
    counts = {"late": client.late, "refused": client.refused, "failed": client.failed, "offline": client.offline}
    missed = Text(", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count), "yellow")
    if client.reason is not None:
        missed += Text(f" ({client.reason})", "dim")
    return [
        Text(str(client.number), "dim"),
        Text(client.name, "" if client.outcome in ("ok", None) else "bold red"),
        Text(f"{client.examples:,}"),
        Text("never" if client.last_seen is None else _ago(now - client.last_seen)),
        Text(f"{client.answered:,}/{client.asked:,}"),
        Text(_size(client.bytes_up)),
        Text(_size(client.bytes_down)),
        Text("" if client.seconds is None else f"{client.seconds:.2f}"),
        missed,
    ]


def _ago(seconds: float) -> str:
    """A span of time, to the unit that matters.

    Examples:
        >>> [_ago(s) for s in (-0.2, 59, 61, 7300, 200000)]
        ['0 s', '59 s', '1 min', '2 h', '2 d']
    """
    for unit, size, upto in (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 86400)):
        if seconds < upto:
            return f"{max(0, int(seconds / size))} {unit}"
    return f"{int(seconds / 86400):,} d"


def _size(count: float) -> str:
    """A number of bytes, to about three digits.

    Examples:
        >>> [_size(n) for n in (0, 999, 12345, 2.5e9)]
        ['0 B', '999 B', '12.3 kB', '2.5 GB']
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
