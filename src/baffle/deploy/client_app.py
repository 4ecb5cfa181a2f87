"""The ClientApp of Flower's own SuperNodes and of its simulation: stateless clients. ``baffle node`` is stateful."""

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


_memory = Memory()  # shared by the simulated clients of a process: each would keep the same state


def answer(message: Message, context: Context) -> Message:
    """Answer one message: the whole ClientApp, for ``flower-supernode`` and for the simulation.

    A SuperNode is started with the file of its data: ``--node-config 'data="/srv/examples.npz"'``. A simulated client
    takes its part of the data set that the training options name.

    Raises:
        OptionError: The node's configuration names no data.
    """
    if context.node_id not in _participants:
        _participants[context.node_id] = _participant(context)
    return reply_to(message, _participants[context.node_id])


def _participant(context: Context) -> Participant:
    node = context.node_config
    if "data" in node:
        data = load_arrays(str(node["data"]))
    elif "partition-id" in node and "num-partitions" in node:
        data = _parts(str(context.run_config["config"]), int(node["num-partitions"]))[int(node["partition-id"])]
    else:
        raise OptionError("node-config", dict(node), 'data="FILE.npz", or partition-id and num-partitions')
    name = f"client-{node['partition-id']:0>6}" if "partition-id" in node else str(node.get("name", context.node_id))

    def build(setup: Setup) -> tuple[Runtime, Dataset]:
        runtime = _runtime(encode(setup))
        return runtime, data_for(setup, data, runtime)

    return Participant(name, build, _memory)


@cache
def _parts(config: str, parts: int) -> tuple[Dataset, ...]:
    """The data of all simulated clients, read once per process."""
    options = options_of(AppConfig(config=config))
    return msgspec.structs.replace(options, clients=parts).split(splits(options)[0])


@lru_cache(maxsize=1)
def _runtime(setup: bytes) -> Runtime:
    """The runtime that the simulated clients of a process share; they evaluate one after another."""
    return runtime_for(decode_setup(setup), Own())
