"""What ``baffle train`` can be told, by flags or by a TOML file, and how it becomes a method."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import msgspec

from baffle.core.aggregate import SecureSum, WeightedSum
from baffle.core.checks import keep_floats, parse_bytes, require_between, require_count, require_positive
from baffle.core.guard import Guard
from baffle.core.method import Method
from baffle.core.optim import Adam, AdamW, ClipUpdate, Constant, Cosine, Optimizer, Sgd
from baffle.core.scalars import ClipScalars
from baffle.core.types import Difference, Family, Sharing
from baffle.data import Dataset, partition
from baffle.errors import JournalError, OptionError, require_choice
from baffle.runtimes.choose import STRATEGIES

PARTITIONS = ("iid", "dirichlet", "shards", "column")
RUNTIMES = {
    "auto": ("fp32", "bf16", "fp16"),
    "torch": ("fp32", "bf16", "fp16"),
    "ort": ("fp32", "fp16", "int8-weights", "int8"),
    "openvino": ("fp32", "bf16", "fp16", "int8-weights", "int8"),
}
"""Runtimes and their precisions; auto: torch or openvino, whichever a short measurement finds faster."""
PRUNE_BY = ("magnitude", "inputs", "channels")
DEFAULT_CLIENTS = 10
DEFAULT_ALPHA = 0.5
DEFAULT_SHARDS = 2


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a training run. The TOML file has these names, with ``_`` or ``-``."""

    dataset: str = "digits"
    data: str | None = None
    augment: bool = False
    holdout: int | None = None
    model: str = "lenet-small"
    activation: str | None = None
    norm: str | None = None
    start: str | None = None
    trainable: str = "all"
    prune: float = 0.0
    prune_by: str = "magnitude"
    runtime: str = "torch"
    precision: str = "fp32"
    branches: bool = False
    strategy: str = "auto"
    memory: str | None = None
    clients: int | None = None
    partition: str = "iid"
    alpha: float | None = None
    shards: int | None = None
    participation: float = 1.0
    batch_size: int = 32
    num_directions: int = 100
    family: Family = "rank1"
    sharing: Sharing = "shared"
    difference: Difference | None = None
    sigma: float | Literal["auto"] = "auto"
    lattice: int = 0
    optimizer: str = "adam"
    lr: float = 0.01
    schedule: str = "cosine"
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_scalars: float | None = None
    clip_update: float | None = None
    secure_sum: bool = False
    ema: float = 0.98
    guard: str = "rollback"
    rounds: int = 200
    local_steps: int = 1
    local_lr: float | None = None
    backprop: Literal["fedsgd", "fedavg"] | None = None
    seed: int = 0
    threads: int | None = None
    evaluate_every: int = 10
    snapshot_every: int = 100

    def __post_init__(self) -> None:
        keep_floats(self)
        require_choice("partition", self.partition, PARTITIONS)
        require_choice("runtime", self.runtime, RUNTIMES)
        require_choice("precision", self.precision, RUNTIMES[self.runtime])
        require_choice("prune_by", self.prune_by, PRUNE_BY)
        require_between("prune", self.prune, 0, 1, open_high=True)
        if self.prune_by != _DEFAULTS["prune_by"] and not self.prune:
            raise OptionError("prune_by", self.prune_by, "prune > 0 with it")
        require_choice("strategy", self.strategy, ("auto", *STRATEGIES))
        if self.branches and self.runtime in ("torch", "auto"):
            raise OptionError("branches", self.branches, "runtime ort or openvino: torch perturbs weights in float")
        if self.runtime != "torch":
            for field in ("strategy", "memory"):
                value = getattr(self, field)
                if value != _DEFAULTS[field]:
                    raise OptionError(field, value, f"runtime torch with it, not {self.runtime}")
        if self.memory is not None:
            parse_bytes("memory", self.memory)
        if self.branches and self.family != "rank1":
            raise OptionError("branches", self.branches, f"family rank1, not {self.family}")
        require_choice("optimizer", self.optimizer, ["sgd", "adam", "adamw"])
        require_choice("schedule", self.schedule, ["constant", "cosine"])
        if self.clients is not None:
            require_count("clients", self.clients)
        if self.holdout is not None:
            require_count("holdout", self.holdout)
        require_choice("guard", self.guard, ["rollback", "stop", "off"])
        require_count("rounds", self.rounds)
        require_count("seed", self.seed, 0, 2**64 - 1)
        if self.backprop:
            self._check_backprop(self.backprop)
        for field, only in (("alpha", "dirichlet"), ("shards", "shards")):
            value = getattr(self, field)
            if value is not None:
                require_positive(field, value)
                if self.partition != only:
                    raise OptionError(field, value, f"partition {only}, not {self.partition}")
        if self.threads is not None:
            require_count("threads", self.threads, 1, 1024)
        if self.momentum and self.optimizer != "sgd":
            raise OptionError("momentum", self.momentum, f"optimizer sgd, not {self.optimizer}")

    def _check_backprop(self, kind: str) -> None:
        for field in ("clip_scalars", "lattice", "runtime", "precision", "strategy", "memory", "prune", "secure_sum"):
            value = getattr(self, field)
            if value != _DEFAULTS[field] and not (field == "prune" and self.prune_by == "channels"):
                raise OptionError(field, value, f"none with backprop {kind}, which is dense and in float32, by PyTorch")

    @property
    def memory_bytes(self) -> int | None:
        """The memory that an evaluation may take, in bytes; None: what it needs to be fast."""
        return None if self.memory is None else parse_bytes("memory", self.memory)

    @property
    def differences(self) -> Difference:
        """Forward in float32, else central: where a forward pass rounds, sigma must be large."""
        usual: Difference = "forward" if self.precision == "fp32" and not self.lattice else "central"
        return self.difference or usual

    def split(self, train: Dataset) -> tuple[Dataset, ...]:
        """The clients' examples."""
        return partition(
            train,
            self.clients or (None if self.partition == "column" else DEFAULT_CLIENTS),
            alpha=self.alpha or DEFAULT_ALPHA if self.partition == "dirichlet" else None,
            shards=self.shards or DEFAULT_SHARDS if self.partition == "shards" else None,
            column=self.partition == "column",
            seed=self.seed,
        )

    def method(self) -> Method:
        """The method these options describe."""
        return Method(
            num_directions=self.num_directions,
            family=self.family,
            sharing=self.sharing,
            difference=self.differences,
            sigma=self.sigma,
            lattice=self.lattice,
            batch_size=self.batch_size,
            participation=self.participation,
            local_steps=self.local_steps,
            local_lr=self.local_lr,
            client=() if self.clip_scalars is None else (ClipScalars(self.clip_scalars),),
            server=() if self.clip_update is None else (ClipUpdate(self.clip_update),),
            aggregate=SecureSum() if self.secure_sum else WeightedSum(),
            optimizer=self._optimizer(),
            ema=self.ema,
            guard={"rollback": Guard(), "stop": Guard(rollbacks=0), "off": None}[self.guard],
        )

    def _optimizer(self) -> Optimizer:
        schedule = Cosine(self.rounds) if self.schedule == "cosine" else Constant()
        if self.optimizer == "sgd":
            return Sgd(self.lr, self.momentum, self.weight_decay, schedule)
        rule = Adam if self.optimizer == "adam" else AdamW
        return rule(lr=self.lr, weight_decay=self.weight_decay, schedule=schedule)


_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(TrainConfig)}
_CHOICES = {
    "backprop": ("fedsgd", "fedavg"),
    "family": get_args(Family),
    "sharing": get_args(Sharing),
    "difference": get_args(Difference),
}


def train_config(file: Path | None, flags: dict[str, object]) -> TrainConfig:
    """Options of a TOML file, if there is one, under the flags that were given (None: not given).

    Raises OptionError naming the option, JournalError if the file cannot be read.
    """
    values: dict[str, object] = {}
    if file is not None:
        try:
            values = msgspec.toml.decode(file.read_bytes(), type=dict[str, object])
        except OSError as error:
            raise JournalError(f"{file}: cannot be read: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise OptionError("config", str(file), f"a TOML file of options ({error})") from error
        values = {name.replace("-", "_"): value for name, value in values.items()}
    values |= {name: value for name, value in flags.items() if value is not None}
    for name in values:
        require_choice("option", name, TrainConfig.__struct_fields__)
    try:
        return msgspec.convert(values, TrainConfig)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, OptionError):
            raise error.__cause__ from None
        reason, _, field = str(error).partition(" - at `$.")
        name = field.rstrip("`")
        if name in _CHOICES:
            require_choice(name, str(values[name]), _CHOICES[name])
        if name == "sigma":
            raise OptionError(name, values[name], "a number > 0, or auto") from None
        raise OptionError(name or "option", values.get(name), reason.lower().removeprefix("expected ")) from None
