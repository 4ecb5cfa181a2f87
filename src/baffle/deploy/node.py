"""The loop of ``baffle node``: one process that loads its model and data once, polls the SuperLink for work, and stays.

Whatever happens to the connection, it waits and retries without a limit; after a crash it also waits until its own key
is let in again. It runs no code that comes over the network: it answers with what is installed here, and only to runs
of app bundles whose hash it trusts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection

from flwr.app import Message

from baffle.client.participant import Participant
from baffle.deploy.flower.fleet import Fleet, refusal
from baffle.engines.remote.flower import reply_to
from baffle.errors import FederationError, OptionError

_FASTEST, _SLOWEST = 0.05, 2.0  # seconds between two polls
_SHARE = 0.15  # fraction of the idle time by which polling may lag
_SHORTEST_WAIT, _LONGEST_WAIT = 0.5, 10.0  # seconds until the next attempt to connect
_TLS = ("certificate", "wrong version number", "tlsv1 alert")

_log = logging.getLogger("baffle")


def run_node(
    fleet: Fleet,
    participant: Participant,
    *,
    trusted: Collection[str],
    stop: threading.Event | None = None,
) -> None:
    """Answer requests until ``stop`` is set.

    Args:
        fleet: The connection to the SuperLink.
        participant: The client that answers.
        trusted: SHA-256 of app bundles, in hexadecimal digits; runs of other apps are refused.
        stop: Ends the loop; by default nothing does.

    Raises:
        OptionError: On a certificate error in the first connection, since retrying cannot help.
    """
    stop = stop or threading.Event()
    wait, connected = _SHORTEST_WAIT, False
    while not stop.is_set():
        try:
            node = fleet.connect()
            _log.info("connected as node %d, key %s", node, fleet.identity[:12])
            wait, connected = _SHORTEST_WAIT, True
            _serve(fleet, participant, trusted, stop)
        except FederationError as error:
            if not connected and any(sign in str(error).lower() for sign in _TLS):
                raise OptionError("superlink", str(error), "certificates that fit (see --root-certificates)") from error
            _log.warning("%s; trying again in %.1f s", error, wait)
            stop.wait(wait)
            wait = min(_LONGEST_WAIT, wait * 1.5)


def _serve(fleet: Fleet, participant: Participant, trusted: Collection[str], stop: threading.Event) -> None:
    """Poll for work: first when it came last time after a response, then less and less often.

    A poll costs the SuperLink as much as a part of a task does, and many clients poll.
    """
    answered, gap = time.monotonic(), 0.0
    while not stop.is_set():
        message = fleet.receive()
        waited = time.monotonic() - answered
        if message is None:
            stop.wait(min(_SLOWEST, max(_FASTEST, _SHARE * waited)))
            continue
        try:
            fleet.send(_answer(fleet, participant, trusted, message))
        except FederationError as error:  # its run may have ended: the next message shows it
            _log.warning("not answered: %s", error)
        fleet.confirm(message)
        answered, gap = time.monotonic(), waited if gap == 0 else 0.5 * (gap + waited)
        stop.wait(min(_SLOWEST, 0.6 * gap))


def _answer(fleet: Fleet, participant: Participant, trusted: Collection[str], message: Message) -> Message:
    app = fleet.app_of(message)
    if app not in trusted:
        _log.warning("run %d: app %s is not trusted here; nothing was done", message.metadata.run_id, app)
        return refusal(message, f"app {app} is not trusted by this node: expected --trust with its hash")
    return reply_to(message, participant)
