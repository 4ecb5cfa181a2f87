"""``baffle resume``: continue a run where it stopped."""

from __future__ import annotations

from typing import Annotated

import typer

from baffle.cli.common import Json, RunPath, command_of, errors, warn_of_lost
from baffle.cli.progress import print_summary, resumable, show_progress, write_events
from baffle.core.optim import Cosine
from baffle.runfolder.journal import Journal
from baffle.runtimes.evaluation_plan import EvaluationPlan
from baffle.training.build import assemble, evaluated_as
from baffle.training.loop import resume


def resume_command(
    run: RunPath,
    rounds: Annotated[int | None, typer.Option(help="A new total of rounds.", min=1)] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Drop rounds after damage; damaged files are kept.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write event files to RUN/events.")] = False,
    json_output: Json = False,
) -> None:
    """Continue a run where it stopped, to the same weights as an undisturbed run."""
    journal = Journal.open(run)
    warn_of_lost(journal)
    options = command_of(journal)
    setup = assemble(evaluated_as(options, EvaluationPlan.of(journal.config.plan)))
    schedule = journal.config.method.optimizer.schedule
    if rounds is not None and isinstance(schedule, Cosine) and rounds > schedule.rounds:
        errors.print(f"note: the cosine schedule ended with round {schedule.rounds}; lr stays {schedule.final:g} x lr")
    with (
        show_progress(rounds or journal.config.rounds, journal.records) as progress,
        write_events(run, tensorboard, progress) as tell,
        resumable(run),
    ):
        done = resume(
            run,
            setup.engine,
            test=setup.test,
            validation=setup.validation,
            rounds=rounds,
            repair=repair,
            progress=tell,
        )
    print_summary(done.summary(), json_output)
