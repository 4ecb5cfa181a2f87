"""The options of ``baffle train``, by flags or in a TOML file, and the method that they describe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec

from baffle.core.aggregate import SecureSum, WeightedSum
from baffle.core.checks import keep_floats, parse_bytes, require_between, require_count, require_positive
from baffle.core.guard import Guard
from baffle.core.method import Method
from baffle.core.optim import Adam, AdamW, ClipUpdate, Constant, Cosine, Optimizer, Sgd
from baffle.core.scalars import ClipScalars
from baffle.core.types import DEFAULT_BITS, Difference, Family, Sharing
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
_DATA, _METHOD, _RUN = "Data and clients", "Method", "Run"


def _about(group: str, description: str, shown: object = None) -> msgspec.Meta:
    """What ``--help`` says of an option: under which heading, what it is, and the default if the field's is None."""
    return msgspec.Meta(description=description, extra={"group": group, "shown": shown})


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a training run. Command-line options and keys of a TOML file have these names, with ``-`` or ``_``.

    Types, defaults and descriptions are written here only; the command line is generated from them.

    Raises:
        OptionError: A value is out of range, or two options contradict each other.

    Examples:
        >>> TrainConfig(lr=0.1, optimizer="sgd").method().optimizer.lr
        0.1
    """

    dataset: Annotated[str, _about(_DATA, "digits, mnist, fashion-mnist, cifar10, cifar100, or arrays (your own).")] = (
        "digits"
    )
    data: Annotated[str | None, _about(_DATA, "Folder of the official files, or FILE.npz.")] = None
    augment: Annotated[bool, _about(_DATA, "Augment batches: shift by up to 4 pixels, flip.")] = False
    holdout: Annotated[int | None, _about(_DATA, "Examples per class to hold out, to evaluate on while training.")] = (
        None
    )
    model: Annotated[str, _about(_DATA, "One of 'baffle models', or package.module:builder.")] = "lenet-small"
    activation: Annotated[str | None, _about(_DATA, "hardswish, relu, selu or gelu.", "hardswish")] = None
    norm: Annotated[str | None, _about(_DATA, "group or none; by default the model's own.")] = None
    start: Annotated[
        str | None, _about(_DATA, "Weights to start from: a run folder (its average), or FILE.safetensors.")
    ] = None
    trainable: Annotated[str, _about(_DATA, "What is trained: all, head, scales, or a pattern of names.")] = "all"
    prune: Annotated[float, _about(_DATA, "Share of the weights to prune before training.")] = 0.0
    prune_by: Annotated[
        str, _about(_DATA, "magnitude, inputs (a forward-only score), or channels (a smaller model).")
    ] = "magnitude"
    runtime: Annotated[str, _about(_DATA, "torch, ort or openvino; auto: the faster of torch and openvino.")] = "torch"
    precision: Annotated[str, _about(_DATA, "fp32, bf16, fp16, int8 or int8-weights, where the runtime has it.")] = (
        "fp32"
    )
    branches: Annotated[bool, _about(_DATA, "Rank-1 perturbations as side branches, in float (ort, openvino).")] = False
    clients: Annotated[int | None, _about(_DATA, "Number of clients.", DEFAULT_CLIENTS)] = None
    partition: Annotated[str, _about(_DATA, "iid, dirichlet, shards, or column.")] = "iid"
    alpha: Annotated[float | None, _about(_DATA, "Dirichlet parameter; smaller is less alike.", DEFAULT_ALPHA)] = None
    shards: Annotated[int | None, _about(_DATA, "Shards of sorted labels per client.", DEFAULT_SHARDS)] = None
    participation: Annotated[float, _about(_DATA, "Share of clients that take part in a round.")] = 1.0
    batch_size: Annotated[int, _about(_DATA, "Examples of a client's mini-batch.")] = 32
    num_directions: Annotated[int, _about(_METHOD, "K: directions, and numbers a client returns.")] = 100
    credit: Annotated[
        str,
        _about(
            _METHOD,
            "global: one scalar per direction. local: one per row, through a head on each layer. feature: one per row "
            "for the layers before the last.",
        ),
    ] = "global"
    head: Annotated[
        str | None,
        _about(_METHOD, "The last layer: exact gradients, or directions; by default exact unless credit is global."),
    ] = None
    slices: Annotated[int, _about(_METHOD, "Parts of a mini-batch, each with its own K directions.")] = 1
    bits: Annotated[int, _about(_METHOD, "Bits of a number that a client returns, 1 to 32.")] = DEFAULT_BITS
    family: Annotated[Family, _about(_METHOD, "rank1, rademacher or gaussian directions.")] = "rank1"
    sharing: Annotated[Sharing, _about(_METHOD, "shared directions (scalars can be summed), or per-client.")] = "shared"
    difference: Annotated[
        Difference | None,
        _about(_METHOD, "forward (K+1 passes) or central (2K); by default forward in fp32, else central."),
    ] = None
    sigma: Annotated[
        float | Literal["auto"], _about(_METHOD, "Step of the finite difference; auto: clients measure it.")
    ] = "auto"
    lattice: Annotated[
        int, _about(_METHOD, "Perturb matrices by up to this many int8 levels, 1 to 8; 0: by sigma.")
    ] = 0
    optimizer: Annotated[str, _about(_METHOD, "sgd, adam or adamw, on the server.")] = "adam"
    lr: Annotated[float, _about(_METHOD, "Learning rate.")] = 0.01
    schedule: Annotated[str, _about(_METHOD, "constant, or cosine over the rounds.")] = "cosine"
    momentum: Annotated[float, _about(_METHOD, "Momentum of sgd.")] = 0.0
    weight_decay: Annotated[float, _about(_METHOD, "Weight decay.")] = 0.0
    clip_scalars: Annotated[float | None, _about(_METHOD, "Clients clip each scalar to this.")] = None
    clip_update: Annotated[float | None, _about(_METHOD, "The server clips the estimate's max-norm to this.")] = None
    secure_sum: Annotated[bool, _about(_METHOD, "Secure aggregation: the server sees only the clients' sum.")] = False
    ema: Annotated[float, _about(_METHOD, "Decay of the averaged weights that are evaluated.")] = 0.98
    guard: Annotated[str, _about(_METHOD, "If training diverges: rollback (with a smaller lr), stop, or off.")] = (
        "rollback"
    )
    rounds: Annotated[int, _about(_RUN, "Updates of the weights.")] = 200
    local_steps: Annotated[int, _about(_METHOD, "SGD steps on a client in a round.")] = 1
    local_lr: Annotated[float | None, _about(_METHOD, "Their learning rate; plain sgd: lr / local_steps.")] = None
    backprop: Annotated[
        Literal["fedsgd", "fedavg"] | None,
        _about(_RUN, "Backpropagation baseline, without guard: fedsgd, or fedavg (with local steps)."),
    ] = None
    seed: Annotated[int, _about(_RUN, "Seed of everything random.")] = 0
    threads: Annotated[int | None, _about(_RUN, "Passes at a time, one thread each; by default one per core.")] = None
    strategy: Annotated[
        str, _about(_RUN, "How torch evaluates: copies, stacked, streaming; auto: chosen by a short measurement.")
    ] = "auto"
    memory: Annotated[
        str | None,
        _about(_RUN, "Memory for evaluation besides the model's, as 64MB; by default what is fastest."),
    ] = None
    evaluate_every: Annotated[int, _about(_RUN, "Rounds between evaluations.")] = 10
    snapshot_every: Annotated[int, _about(_RUN, "Rounds between snapshots.")] = 100

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
        self._check_credit()
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

    @property
    def is_plain(self) -> bool:
        """Whether one scalar per direction is about all of the model."""
        return self.credit == "global" and self.head in (None, "directions")

    def _check_credit(self) -> None:
        require_choice("credit", self.credit, ("global", "feature", "local"))
        if self.head is not None:
            require_choice("head", self.head, ("exact", "directions"))
        if self.credit != "global" and self.head == "directions":
            raise OptionError("head", self.head, f"exact with credit {self.credit}, which needs the head's derivative")
        if self.is_plain:
            return
        for field in ("strategy", "memory"):
            value = getattr(self, field)
            if value != _DEFAULTS[field]:
                raise OptionError(field, value, f"none with credit {self.credit} and an exact head")
        if self.branches and self.credit != "global":
            raise OptionError("branches", True, f"none with credit {self.credit}: a row has signs of its own")

    def _check_backprop(self, kind: str) -> None:
        fields = ("clip_scalars", "lattice", "runtime", "precision", "strategy", "memory", "prune", "secure_sum")
        for field in (*fields, "credit", "head"):
            value = getattr(self, field)
            if value != _DEFAULTS[field] and not (field == "prune" and self.prune_by == "channels"):
                raise OptionError(field, value, f"none with backprop {kind}, which is dense and in float32, by PyTorch")

    @property
    def memory_bytes(self) -> int | None:
        """Memory limit of an evaluation, in bytes; None for as much as makes it fast."""
        return None if self.memory is None else parse_bytes("memory", self.memory)

    @property
    def differences(self) -> Difference:
        """Which finite differences to use; the default is forward in float32, else central, for a large sigma."""
        usual: Difference = "forward" if self.precision == "fp32" and not self.lattice else "central"
        return self.difference or usual

    def split(self, train: Dataset) -> tuple[Dataset, ...]:
        """Split training data among the clients."""
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
            slices=self.slices,
            bits=self.bits,
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
    """Combine the options of a TOML file with flags, which take precedence.

    Args:
        file: The TOML file; None for none.
        flags: Values by field name; None counts as not set.

    Returns:
        Checked options.

    Raises:
        OptionError: An option is unknown, has a bad value, or contradicts another one.
        JournalError: The file cannot be read.
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
