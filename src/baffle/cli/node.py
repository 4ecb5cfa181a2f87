"""``baffle node`` and ``baffle app``: training across machines."""

from __future__ import annotations

import signal
import socket
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from baffle.cli.common import Json, print_json
from baffle.core.checks import parse_bytes
from baffle.errors import MissingExtraError, OptionError, require_choice
from baffle.runtimes.choose import STRATEGIES

_SECURITY = "Security"


def node_command(
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the SuperLink is.")],
    data: Annotated[Path, typer.Option(metavar="FILE.npz", help="This client's examples: arrays x and y.")],
    name: Annotated[str | None, typer.Option(help="Shown to the server's operator; by default the host's.")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Take part with this client bundle only ('baffle export').")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="PACKAGE.MODULE:BUILDER", help="Code of your own that the server may name.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Passes at the same time.", min=1)] = 1,
    strategy: Annotated[
        str, typer.Option(help="How PyTorch evaluates: copies, stacked, or streaming, which needs the least memory.")
    ] = "copies",
    memory: Annotated[
        str | None,
        typer.Option(help="Memory for PyTorch, besides the model's, as 64MB; by default what is fastest."),
    ] = None,
    root_certificates: Annotated[
        Path | None,
        typer.Option(help="PEM file of the SuperLink's certificate authority.", rich_help_panel=_SECURITY),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS: on this machine only.", rich_help_panel=_SECURITY)
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option(
            help="This node's private key (ECDSA); by default one for this process.", rich_help_panel=_SECURITY
        ),
    ] = None,
    only_secure: Annotated[
        bool,
        typer.Option(
            "--only-secure", help="Refuse plain sums: take part in secure ones only.", rich_help_panel=_SECURITY
        ),
    ] = False,
    minimum_cohort: Annotated[
        int, typer.Option(help="Smallest cohort of a secure sum to hide in.", min=2, rich_help_panel=_SECURITY)
    ] = 3,
    trust: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHA256",
            help="App bundle to work for; by default the one that comes with baffle ('baffle app').",
            rich_help_panel=_SECURITY,
        ),
    ] = None,
) -> None:
    """Be a client: load the data once, then wait for tasks and answer them until stopped.

    Runs no code that comes over the network. What it evaluates is a bundle (a graph) or a model of baffle's own.
    """
    need_flower()
    from baffle.client.examples import load_arrays
    from baffle.client.participant import Participant
    from baffle.deploy.client_model import Own, builder
    from baffle.deploy.flower.fleet import Fleet
    from baffle.deploy.flower.keys import read_key, secret_of
    from baffle.deploy.logs import log_to_stderr
    from baffle.deploy.node import run_node
    from baffle.runtimes.onnx.bundle import Bundle
    from baffle.secure.masks import Identity

    if insecure == (root_certificates is not None):
        raise OptionError("root-certificates", root_certificates and str(root_certificates), "it, or --insecure")
    require_choice("strategy", strategy, STRATEGIES)
    trusted = [_sha256(text) for text in trust or [_own_app()]]
    own = None if bundle is None else Bundle.load(bundle)
    budget = None if memory is None else parse_bytes("memory", memory)
    build = builder(load_arrays(data), Own(threads, own, model, strategy, budget))
    own_key = None if key is None else read_key(key)
    participant = Participant(
        name or socket.gethostname(),
        build,
        identity=Identity.make(None if own_key is None else secret_of(own_key)),
        minimum=minimum_cohort,
        only_secure=only_secure,
    )
    stop = threading.Event()
    _on_signal(stop)
    log_to_stderr()
    with Fleet(superlink, root_certificates, own_key) as fleet:
        run_node(fleet, participant, trusted=trusted, stop=stop)


def app_command(json_output: Json = False) -> None:
    """Print the folder of the Flower app that 'flwr run' starts, and the hash that clients trust."""
    need_flower()
    from baffle.deploy.flower.app_bundle import app_folder, app_sha256

    folder = app_folder()
    shown = {"app": str(folder), "sha256": app_sha256(folder)}
    if json_output:
        print_json(shown)
    else:
        print(f"{shown['app']}\n{shown['sha256']}")


def _own_app() -> str:
    from baffle.deploy.flower.app_bundle import app_folder, app_sha256

    return app_sha256(app_folder())


def _sha256(text: str) -> str:
    if len(text) != 64 or set(text.lower()) - set("0123456789abcdef"):
        raise OptionError("trust", text, "the SHA-256 of an app bundle: 64 hexadecimal digits ('baffle app')")
    return text.lower()


def need_flower() -> None:
    """Raise MissingExtraError if Flower is not installed."""
    try:
        import baffle.engines.remote.flower  # noqa: F401
    except MissingExtraError:
        raise
    except ImportError as error:
        raise MissingExtraError(f"Flower cannot be imported ({error}): pip install 'baffle[flower]'") from error


def _on_signal(stop: threading.Event) -> None:
    """Stop after the current task on SIGTERM or SIGINT."""

    def end(number: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
