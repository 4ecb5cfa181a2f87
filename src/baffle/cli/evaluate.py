"""``baffle evaluate``: loss and accuracy of a run on its test data."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from baffle.cli.common import Json, RunPath, command_of, print_json, require_rounds
from baffle.runfolder.journal import Journal
from baffle.runtimes.evaluation_plan import EvaluationPlan
from baffle.training.build import assemble, evaluated_as
from baffle.training.result import evaluate


def evaluate_command(run: RunPath, json_output: Json = False) -> None:
    """Evaluate a run on its test data: loss and accuracy of the averaged and of the raw weights."""
    journal = Journal.open(run)
    require_rounds(journal, whole=True)
    setup = assemble(evaluated_as(command_of(journal), EvaluationPlan.of(journal.config.plan)))
    state = journal.state()
    average, raw = (evaluate(setup.engine, w, setup.test) for w in (state.ema_weights, state.weights))
    result = {
        "run": str(run),
        "round": state.round - 1,
        "loss": average[0],
        "accuracy": average[1],
        "raw_loss": raw[0],
        "raw_accuracy": raw[1],
    }
    if json_output:
        print_json(result)
        return
    table = Table("", "loss", "accuracy", title=f"{run}, round {state.round - 1}")
    table.add_row("averaged weights", f"{average[0]:.4f}", f"{average[1]:.4f}")
    table.add_row("raw weights", f"{raw[0]:.4f}", f"{raw[1]:.4f}")
    Console().print(table)
