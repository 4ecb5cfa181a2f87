"""A client of a federation that is killed, or stands still, when it is asked one thing in one round: a script.

    python doomed_client.py SUPERLINK CERTIFICATES KEY DATA NAME STAGE ROUND SIGNAL

In everything else it is ``baffle node --only-secure``.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from baffle.client.examples import load_arrays
from baffle.client.participant import Build, Participant
from baffle.deploy.client_model import builder
from baffle.deploy.flower.app_bundle import app_folder, app_sha256
from baffle.deploy.flower.fleet import Fleet
from baffle.deploy.flower.keys import read_key, secret_of
from baffle.deploy.node import run_node
from baffle.protocol.messages import AnyRequest, KeysRequest, TrainRequest, UnmaskRequest, decode_request
from baffle.secure.masks import Identity


class Doomed(Participant):
    """Sends its own process a signal instead of answering a stage's question in a round."""

    def __init__(self, name: str, build: Build, identity: Identity, fate: tuple[str, int], number: int) -> None:
        super().__init__(name, build, identity=identity, only_secure=True)
        self._fate, self._signal = fate, number

    def answer(self, question: bytes, attachments: Mapping[str, bytes], client: int = 0) -> bytes:
        if stage_of(decode_request(question)) == self._fate:
            os.kill(os.getpid(), self._signal)
        return super().answer(question, attachments, client)


def stage_of(asked: AnyRequest) -> tuple[str, int]:
    """What is asked, in which round; the shares of the lost are asked for with the signatures of the survivors."""
    if isinstance(asked, KeysRequest):
        return "advert", asked.round
    if isinstance(asked, TrainRequest):
        return "vector", asked.task.round
    if isinstance(asked, UnmaskRequest):
        return "lost" if asked.survivors.signatures else "shares", asked.survivors.round
    return "enrol", -1


def main(
    superlink: str, certificates: str, key: str, data: str, name: str, stage: str, round: str, number: str
) -> None:
    """Be this client until its signal, or until the test ends it."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("baffle").setLevel(logging.INFO)
    own = read_key(Path(key))
    identity = Identity.make(secret_of(own))
    doomed = Doomed(name, builder(load_arrays(data)), identity, (stage, int(round)), signal.Signals[number])
    with Fleet(superlink, Path(certificates), own) as fleet:
        run_node(fleet, doomed, trusted=[app_sha256(app_folder())])


if __name__ == "__main__":
    main(*sys.argv[1:])
