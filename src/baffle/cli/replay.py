"""``baffle replay``: weights rebuilt from the journal alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.progress import Progress

from baffle.cli.common import Json, RunPath, errors, print_json, require_rounds
from baffle.core.rebuild import Execution
from baffle.core.state import weights_sha256
from baffle.errors import CorruptRunError, OptionError
from baffle.runfolder.journal import Journal


def replay_command(
    run: RunPath,
    round: Annotated[int | None, typer.Option("--round", help="Round to rebuild; by default the last.", min=0)] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads, by default one per core; the result is bit-identical.", min=1)
    ] = None,
    block: Annotated[int, typer.Option(help="Entries per block; the result is bit-identical.", min=1)] = 2**16,
    slow: Annotated[bool, typer.Option("--slow", help="Use the reference loop instead of the fast rebuild.")] = False,
    json_output: Json = False,
) -> None:
    """Rebuild a round's weights from the initial weights and the journal alone; print their sha256.

    Each round up to it is checked against the hash in its row.
    """
    journal = Journal.open(run)
    require_rounds(journal, whole=round is None)
    wanted = len(journal.rows) - 1 if round is None else round
    if not 0 <= wanted < len(journal.rows):
        if journal.damage:
            raise CorruptRunError(f"{journal.damage}; round {wanted} cannot be rebuilt, those before can")
        raise OptionError("round", wanted, f"a round of this run, 0..{len(journal.rows) - 1}")
    with _replay_progress(wanted) as progress:
        for state in journal.states(Execution(threads, block, slow)):
            progress(state.round - 1)
            if state.round == wanted + 1:
                break
    digest = weights_sha256(state.weights).hex()
    if json_output:
        print_json({"run": str(run), "round": wanted, "weights_sha256": digest})
    else:
        print(digest)


@contextmanager
def _replay_progress(total: int) -> Iterator[Callable[[int], None]]:
    with Progress(console=errors, disable=not errors.is_terminal) as bar:
        line = bar.add_task("replay", total=total)
        yield lambda round: bar.update(line, completed=round)
