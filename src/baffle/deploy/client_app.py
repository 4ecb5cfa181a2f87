"""The ClientApp of stock SuperNodes and of Flower's simulation. A stateful client is ``baffle node``."""

from __future__ import annotations

from functools import cache, lru_cache

import msgspec
from flwr.app import Context, Message

from baffle.client.examples import load_arrays
from baffle.client.participant import Memory, Participant
from baffle.data import Dataset
from baffle.deploy.app_config import AppConfig, options_of
from baffle.deploy.client_model import Own, data_for, runtime_for
from baffle.engines.remote.flower import reply_to
from baffle.errors import OptionError
from baffle.protocol.messages import Setup, decode_setup, encode
from baffle.runtimes import Runtime
from baffle.training.build import splits

_participants: dict[int, Participant] = {}


_memory = Memory()  # simulated clients of a process share what they keep: each would have the same


def answer(message: Message, context: Context) -> Message:
    """The whole ClientApp, for ``flower-supernode`` and for the simulation.

    A SuperNode says where its data are: ``--node-config 'data="/srv/examples.npz"'``. A simulated client takes its
    part of the data set that the options name.
    """
    if context.node_id not in _participants:
        _participants[context.node_id] = _participant(context)
    return reply_to(message, _participants[context.node_id])


def _participant(context: Context) -> Participant:
    told = context.node_config
    if "data" in told:
        data = load_arrays(str(told["data"]))
    elif "partition-id" in told and "num-partitions" in told:
        data = _parts(str(context.run_config["config"]), int(told["num-partitions"]))[int(told["partition-id"])]
    else:
        raise OptionError("node-config", dict(told), 'data="FILE.npz", or partition-id and num-partitions')
    name = f"client-{told['partition-id']:0>6}" if "partition-id" in told else str(told.get("name", context.node_id))

    def build(setup: Setup) -> tuple[Runtime, Dataset]:
        runtime = _runtime(encode(setup))
        return runtime, data_for(setup, data, runtime)

    return Participant(name, build, _memory)


@cache
def _parts(config: str, parts: int) -> tuple[Dataset, ...]:
    """The data of all simulated clients, read once a process."""
    options = options_of(AppConfig(config=config))
    return msgspec.structs.replace(options, clients=parts).split(splits(options)[0])


@lru_cache(maxsize=1)
def _runtime(setup: bytes) -> Runtime:
    """The simulated clients of a process evaluate one after another, on one runtime."""
    return runtime_for(decode_setup(setup), Own())
