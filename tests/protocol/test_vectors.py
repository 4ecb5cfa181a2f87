"""docs/protocol.md: every number in it is recomputed here, so that the document cannot drift."""

import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from msgspec import inspect as schema

from baffle.client.respond import finite_differences, local_update, perturbations
from baffle.core import gaussian, optim
from baffle.core.aggregate import FIRST_EXPONENT, counts_of, measures_scale, next_exponents, nothing, word_bits
from baffle.core.credit import numbers_of_rows, sizes_of, units_of
from baffle.core.directions import Directions
from baffle.core.method import Method, examples_per_weight, replay
from baffle.core.philox import Purpose, philox, word3
from baffle.core.quantize import MOST_CODES, lattice_steps, row_scales, unscale
from baffle.core.quantize import encode as encode_rows
from baffle.core.rebuild import FAST, estimate
from baffle.core.scalars import MAGNITUDE_UNITS, MOST_MAGNITUDE, Encoded, encode, weight_of
from baffle.core.state import State, state_sha256, weights_sha256
from baffle.core.types import (
    DEFAULT_BITS,
    FEW_BITS,
    MAX_WEIGHT,
    MAX_WEIGHT_OF_FEW_BITS,
    MAX_WEIGHT_SUM,
    MOST_BITS,
    Credit,
    Difference,
    Family,
    ParamSpec,
    Reply,
    Row,
    Sharing,
    Table,
    Task,
    Weights,
    bits_of,
    limit_of,
    make_table,
    pack,
    table_size,
    unpack,
)
from baffle.errors import ReplyError
from baffle.protocol import encoding, pipes
from baffle.protocol.encoding import decode_reply, decode_row, decode_task, encode_message
from baffle.protocol.messages import KeysRequest, MaskedTrainResponse, UnmaskRequest, decode_introductions
from baffle.runfolder.config import RunConfig
from baffle.runfolder.journal import Journal
from baffle.runfolder.metrics import Record
from baffle.secure.client import SecureClient
from baffle.secure.graph import neighbourhoods, threshold
from baffle.secure.masks import Identity, mask_key, pack_words, pair_mask, self_mask, unpack_words
from baffle.secure.messages import (
    Introduced,
    KeysResponse,
    Masked,
    PublicKeys,
    Survivors,
    UnmaskResponse,
    commitment,
    context,
    sealing,
)
from baffle.secure.server import SecureRound
from baffle.secure.shares import recombine, split

Vector = dict[str, Any]

TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
VECTORS: dict[str, Vector] = {}
for _block in re.findall(r"^```json\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
    _vector = json.loads(_block)
    assert _vector["vector"] not in VECTORS, f"{_vector['vector']}: two blocks of one name"
    VECTORS[_vector.pop("vector")] = _vector

DECODERS: dict[type[Task | Reply | Row], Callable[[bytes], Task | Reply | Row]] = {
    Task: decode_task,
    Reply: decode_reply,
    Row: decode_row,
}


# How the document writes values


def from_bits(words: list[str]) -> Weights:
    return np.array([int(word, 16) for word in words], np.uint32).view(np.float32)


def to_bits(values: Weights) -> list[str]:
    assert values.dtype == np.float32
    return [f"{word:08x}" for word in values.view(np.uint32).tolist()]


def number(bits: str) -> float:
    return float(from_bits([bits])[0])


def words(texts: list[str]) -> list[int]:
    assert all(text.startswith("0x") and len(text) == 18 for text in texts)
    return [int(text, 16) for text in texts]


def signs(values: npt.NDArray[np.integer[Any]]) -> str:
    return "".join("-0+"[int(np.sign(value)) + 1] for value in values)


def table_of(shapes: Sequence[Sequence[int]], kept: Sequence[str] = ()) -> Table:
    table = make_table({f"t{i}": tuple(shape) for i, shape in enumerate(shapes)})
    bits = [bytes.fromhex(text) for text in kept] or [b""] * len(table)
    return tuple(msgspec.structs.replace(spec, kept=k) for spec, k in zip(table, bits, strict=True))


def directions_of(v: Vector, family: Family) -> Directions:
    """Directions of a tensor with the number ``v["tensor"]``."""
    table = table_of([[]] * v["tensor"] + [v["shape"]], [""] * v["tensor"] + [v.get("kept", "")])
    return Directions(table, family, (v["key"], v["round"]), v["client"], v["step"])


def block(key: list[int], counter: list[int]) -> list[int]:
    c0, c1, c2, c3 = (np.array([word], np.uint64) for word in counter)
    return [int(word) for word in philox((key[0], key[1]), (c0, c1, c2, c3))[0]]


def make_task(**changes: Any) -> Task:
    """The task of the document, changed; ``exponent`` is that of its only unit."""
    fields = VECTORS["messages"]["messages"][0]["fields"]
    return msgspec.convert({**fields, "state_sha256": b"", **_exponents(changes)}, Task)


def make_row(integers: Any, **changes: Any) -> Row:
    """The row of the document with other integers [vectors][steps][numbers], one per direction, changed."""
    fields = msgspec.structs.asdict(decode_row(bytes.fromhex(VECTORS["messages"]["messages"][2]["bytes"])))
    values = np.array(integers, np.int64)
    made = {"bits": bits_of(values), "scalars": pack(values, bits_of(values)), "local_steps": values.shape[1]}
    made |= {"numbers": values.shape[2], "num_directions": values.shape[2]}
    hashes = {"weights_sha256": b"", "state_sha256": b""}
    return msgspec.convert({**fields, **hashes, **made, **_exponents(changes)}, Row)


def _exponents(changes: Vector) -> Vector:
    rest = {name: value for name, value in changes.items() if name != "exponent"}
    return rest | ({"exponents": [changes["exponent"]]} if "exponent" in changes else {})


def credited(tensors: Sequence[Vector]) -> Table:
    table, offset = list[ParamSpec](), 0
    for i, tensor in enumerate(tensors):
        credit = msgspec.convert(tensor["credit"], Credit)
        table.append(ParamSpec(f"t{i}", tuple(tensor["shape"]), offset, bytes.fromhex(tensor["kept"]), credit))
        offset += table[-1].size
    return tuple(table)


# One check a block


def check_constants(v: Vector) -> None:
    assert v == {
        "default_bits": DEFAULT_BITS,
        "most_bits": MOST_BITS,
        "limits": {str(bits): limit_of(bits) for bits in (1, 2, 4, 8, 15, 32)},
        "magnitude_units": MAGNITUDE_UNITS,
        "most_magnitude": MOST_MAGNITUDE,
        "max_weight": MAX_WEIGHT,
        "few_bits": FEW_BITS,
        "max_weight_of_few_bits": MAX_WEIGHT_OF_FEW_BITS,
        "max_weight_sum": MAX_WEIGHT_SUM,
    }


def check_table(v: Vector) -> None:
    masks = {t["name"]: np.array([bit == "1" for bit in t["mask"]]) for t in v["tensors"] if t["mask"]}
    shapes = {t["name"]: tuple(t["shape"]) for t in v["tensors"]}
    table = make_table(shapes, {name: mask.reshape(shapes[name]) for name, mask in masks.items()})
    assert [t["kept"] for t in v["tensors"]] == [spec.kept.hex() for spec in table]
    assert [t["mask"] and masks[t["name"]].tolist() for t in v["tensors"]] == [
        None if spec.mask is None else spec.mask.tolist() for spec in table
    ]
    assert [t["offset"] for t in v["tensors"]] == [spec.offset for spec in table]
    assert [t["matrix"] for t in v["tensors"]] == [spec.matrix and list(spec.matrix) for spec in table]
    assert v["size"] == table_size(table)


def check_units(v: Vector) -> None:
    table, total = credited(v["tensors"]), v["num_directions"] * v["slices"]
    assert v["sizes"] == list(sizes_of(table, total))
    assert v["rows"] == {f"t{i}": numbers_of_rows(s).tolist() for i, s in enumerate(table) if s.credit.kind == "rows"}
    names = ("key", "round", "family", "num_directions", "slices", "exponents", "weight_sum")
    row = make_row(v["integers"], **{name: v[name] for name in names})
    assert v["estimate"] == to_bits(estimate(table, row))
    assert v["estimate"] == to_bits(slow_estimate(v, table))


def slow_estimate(v: Vector, table: Table) -> Weights:
    """One number after another, as the document puts it."""
    total, out, starts = v["num_directions"] * v["slices"], np.zeros(table_size(table)), np.cumsum([0, *v["sizes"]])
    directions = Directions(table, v["family"], (v["key"], v["round"]), 0, 0)
    for number, unit in enumerate(units_of(table)):
        own = np.array(v["integers"][0][0][starts[number] : starts[number + 1]], np.int64)
        factor, at = 2.0 ** v["exponents"][number], 0
        for i in unit.tensors:
            spec = table[i]
            if unit.kind == "exact":
                kept = np.ones(spec.size, np.int64) if spec.mask is None else spec.mask
                out[spec.slice], at = own[at : at + spec.size] * kept * (factor / v["weight_sum"]), at + spec.size
                continue
            of_row = v["rows"][spec.name] if unit.kind == "rows" else [0] * (spec.shape or (1,))[0]
            scalars, width = own.reshape(total, -1), spec.size // len(of_row)
            entries = directions.entries(i, slice(0, total)).astype(np.int64)
            for entry in range(spec.size):
                exact = sum(int(scalars[k, of_row[entry // width]] * entries[k, entry]) for k in range(total))
                out[spec.offset + entry] = exact * (directions.unit * factor / (total * v["weight_sum"]))
    return out.astype(np.float32)


def check_packed(v: Vector) -> None:
    for case in v["integers"]:
        values = np.array(case["values"], np.int64)
        assert case["bytes"] == pack(values, case["bits"]).hex()
        assert unpack(bytes.fromhex(case["bytes"]), case["bits"], len(values)).tolist() == case["values"]
        bits, text = case["bits"], ""
        for value in case["values"]:  # the lowest bit first
            text += str(int(value > 0)) if bits == 1 else format(value % 2**bits, f"0{bits}b")[::-1]
        padded = text.ljust(-(-len(text) // 8) * 8, "0")
        assert case["bytes"] == bytes(int(padded[i : i + 8][::-1], 2) for i in range(0, len(padded), 8)).hex()
    for case in v["words"]:
        numbers = np.array(case["values"], np.uint32)
        assert case["bytes"] == pack_words(numbers, case["bits"]).hex()
        lowest = unpack_words(bytes.fromhex(case["bytes"]), case["bits"], len(numbers))
        assert lowest.tolist() == [value % 2 ** case["bits"] for value in case["values"]]
    for case in v["refused"]:
        with pytest.raises(ReplyError):
            pack(unpack(bytes.fromhex(case["bytes"]), case["bits"], case["count"]), case["bits"])


def check_philox(v: Vector) -> None:
    assert len(v["answers"]) == 3
    for answer in v["answers"]:
        assert words(answer["block"]) == block(words(answer["key"]), words(answer["counter"]))


def check_counters(v: Vector) -> None:
    assert v["purposes"] == {p.name: int(p) for p in Purpose}
    for case in v["words"]:
        assert words([case["word"]]) == [word3(Purpose[case["purpose"]], case["client"], case["step"])]


def check_signs(v: Vector) -> None:
    directions, ks = directions_of(v, "rademacher"), slice(v["direction"], v["direction"] + 1)
    assert v["bytes"] == directions.sign_bits(v["tensor"], ks, 0, 2).tobytes().hex()
    text = signs(directions.entries(v["tensor"], ks)[0])
    assert (v["first"], v["last"]) == (text[:20], text[-20:])


def check_rank1(v: Vector) -> None:
    directions, ks = directions_of(v, "rank1"), slice(v["direction"], v["direction"] + 1)
    left, right = directions.factors(ks)[v["tensor"]]
    assert (v["left"], v["right"]) == (signs(left[0]), signs(right[0]))
    assert v["entries"] == signs(directions.entries(v["tensor"], ks)[0])


def check_thresholds(v: Vector) -> None:
    table = gaussian.thresholds()
    assert v["count"] == len(table)
    assert v["sha256"] == hashlib.sha256(table.astype("<u4").tobytes()).hexdigest()
    assert v["values"] == {m: int(table[int(m)]) for m in v["values"]}


def check_gaussian(v: Vector) -> None:
    directions, k = directions_of(v, "gaussian"), v["direction"]
    assert v["entries"] == directions.entries(v["tensor"], slice(k, k + 1))[0].tolist()
    last = word3(Purpose.GAUSSIAN, v["client"], v["step"])
    assert words(v["block"]) == block([v["key"], v["round"]], [0, k, v["tensor"], last])


def check_pruned(v: Vector) -> None:
    k = slice(v["direction"], v["direction"] + 1)
    assert v["kept"] == VECTORS["table"]["tensors"][0]["kept"]
    mask = VECTORS["table"]["tensors"][0]["mask"]
    for case in v["cases"]:
        assert case["whole"] == signs(directions_of({**v, "kept": ""}, case["family"]).entries(v["tensor"], k)[0])
        assert case["entries"] == signs(directions_of(v, case["family"]).entries(v["tensor"], k)[0])
        pairs = zip(case["whole"], mask, strict=True)
        assert case["entries"] == "".join(sign if bit == "1" else "0" for sign, bit in pairs)


def check_perturbed(v: Vector) -> None:
    table, weights = table_of(v["shapes"]), from_bits(v["weights"])
    for case in v["cases"]:
        task = make_task(**{name: v[name] for name in ("key", "round", "num_directions", "difference", "sigma")})
        made = perturbations(msgspec.structs.replace(task, family=case["family"]), table, 0)
        entries = [made.directions.entries(i, slice(0, 1))[0] for i in range(len(table))]
        assert case["entries"] == np.concatenate(entries).tolist()
        passes = made.weights(weights, np.empty_like(weights))
        assert case["passes"] == [to_bits(w) for w in passes]


def lattice_task(family: Family) -> Task:
    v = VECTORS["lattice"]
    numbers = {name: v[name] for name in ("key", "round", "sigma", "lattice")}
    return make_task(family=family, num_directions=1, difference="central", **numbers)


def check_lattice(v: Vector) -> None:
    table, weights = table_of(v["shapes"], v["kept"]), from_bits(v["weights"])
    matrix, m = table[0], v["lattice"]
    scales, shape = row_scales(matrix, weights), matrix.matrix or (0, 0)
    assert 1 <= m <= MOST_CODES

    def codes(flat: Weights) -> list[int]:
        found = np.zeros(shape, np.int8)
        encode_rows(flat[matrix.slice].reshape(shape), scales, found)
        return [int(code) for code in found.reshape(-1)]

    assert v["scales"] == to_bits(scales)
    assert v["stretches"] == to_bits(lattice_steps(table, weights, v["sigma"], m)[0])
    assert v["codes"] == codes(weights)
    for case in v["cases"]:
        made = perturbations(lattice_task(case["family"]), table, 0)
        entries = [made.directions.entries(i, slice(0, 1))[0] for i in range(len(table))]
        assert case["entries"] == np.concatenate(entries).tolist()
        passes = [w.copy() for w in made.weights(weights, np.empty_like(weights))]
        assert case["passes"] == [to_bits(w) for w in passes]
        assert case["codes"] == [codes(w) for w in passes]
        for sign, moved in zip((1, -1), case["codes"], strict=True):
            assert moved == [c + sign * m * e for c, e in zip(v["codes"], case["entries"], strict=False)]
        assert case["passes"] == [to_bits(w) for w in slow_lattice(v, case["entries"])]


def slow_lattice(v: Vector, entries: list[int]) -> list[Weights]:
    """The passes, one float32 operation after another, as the document puts them."""
    one, sigma, columns = np.float32, np.float32(v["sigma"]), v["shapes"][0][1]
    passes = []
    for s in (sigma, -sigma):
        moved = from_bits(v["weights"])
        for i, code in enumerate(v["codes"]):
            scale, stretch = (from_bits(v[name])[i // columns] for name in ("scales", "stretches"))
            moved[i] = one(code) * scale + (stretch * s) * one(entries[i])
        moved[-1] = moved[-1] + s * one(entries[-1])
        passes.append(moved)
    return passes


def check_lattice_estimate(v: Vector) -> None:
    lattice = VECTORS["lattice"]
    table, weights = table_of(lattice["shapes"], lattice["kept"]), from_bits(lattice["weights"])
    names = ("key", "round", "sigma", "lattice")
    row = make_row(
        v["integers"],
        difference="central",
        optimizer="sgd",
        coefficients={"lr": 1.0, "weight_decay": 0.0},
        **{name: v[name] for name in ("family", "exponent", "participants", "weight_sum")},
        **{name: lattice[name] for name in names},
    )
    rounded = estimate(table, row)
    assert v["rounded"] == to_bits(rounded)
    assert v["estimate"] == to_bits(unscale(table, rounded, weights, row.sigma, row.lattice))
    stretches = np.append(np.repeat(from_bits(lattice["stretches"]), lattice["shapes"][0][1]), np.float32(1))
    assert v["estimate"] == to_bits(rounded / stretches)
    assert v["weights"] == to_bits(replay(State(1, 0, weights, {}, weights), table, row).weights)
    assert v["weights"] == to_bits(weights - from_bits(v["estimate"]))


def check_scalars(v: Vector) -> None:
    for case in v["differences"]:
        task = make_task(**{name: case[name] for name in ("difference", "sigma", "exponent", "clip", "bits")})
        scalars = finite_differences(task, np.array(case["losses"], np.float64).astype(np.float32))
        assert [float(x) for x in case["scalars"]] == scalars.tolist()
        check_encoded(case)
    for case in v["encoded"]:
        check_encoded(case)


def check_encoded(case: Vector) -> None:
    count = len(case["scalars"])
    task = make_task(exponent=case["exponent"], clip=case["clip"], bits=case["bits"], num_directions=count)
    encoded = encode(task, np.array(case["scalars"], np.float64))
    assert (case["clipped"], case["nonfinite"]) == (encoded.clipped, encoded.nonfinite)
    assert case["integers"] == encoded.integers.tolist()
    assert [case["magnitude"]] == list(encoded.magnitudes)


def check_weights(v: Vector) -> None:
    for case in v["weights"]:
        assert case["weight"] == weight_of(case["examples"], case["quantum"])
    for case in v["quanta"]:
        assert case["quantum"] == examples_per_weight(case["largest"], case["participants"], case["bits"])


def check_messages(v: Vector) -> None:
    assert [case["type"] for case in v["messages"]] == ["Task", "Reply", "Row"]
    for case, (kind, decode) in zip(v["messages"], DECODERS.items(), strict=True):
        data = bytes.fromhex(case["bytes"])
        message = decode(data)
        assert encode_message(message) == data
        written = msgspec.msgpack.decode(data)
        if kind is Row:
            written = dict(zip(WRITTEN[Row].__struct_fields__, written, strict=True))
        texts = {name: value.hex() for name, value in written.items() if type(value) is bytes}
        assert list(case["fields"]) == list(WRITTEN[kind].__struct_fields__)
        assert case["fields"] == written | texts


def check_earlier_row(v: Vector) -> None:
    data = bytes.fromhex(v["bytes"])
    written = msgspec.msgpack.decode(data)
    texts = {name: value.hex() for name, value in written.items() if type(value) is bytes}
    assert (v["fields"], list(v["fields"])) == (written | texts, list(written))
    row, newer = decode_row(data), decode_row(bytes.fromhex(VECTORS["messages"]["messages"][2]["bytes"]))
    assert (row.slices, row.bits, row.numbers) == (1, 32, row.num_directions)
    common = row.weight_sum // newer.weight_sum
    assert (row.integers == newer.integers * common).all()
    assert row == msgspec.structs.replace(
        newer, weight_sum=row.weight_sum, bits=32, scalars=row.scalars, magnitudes=row.magnitudes
    )
    before = state_of(VECTORS["hashes"]["before"])
    assert state_sha256(replay(before, make_table({"w": (2, 2)}), row)) == row.state_sha256


def check_estimate(v: Vector) -> None:
    for case in v["cases"]:
        names = ("key", "round", "exponent", "participants", "weight_sum")
        row = make_row(case["integers"], family=case["family"], sharing=case["sharing"], **{n: v[n] for n in names})
        assert case["estimate"] == to_bits(estimate(table_of(v["shapes"]), row))


def check_update(v: Vector) -> None:
    before, gradient = from_bits(v["before"]), from_bits(v["gradient"])
    assert [case["optimizer"] for case in v["cases"]] == ["sgd", "sgd", "adam", "adamw"]
    for case in v["cases"]:
        slots = {name: from_bits(bits) for name, bits in case["slots"].items()}
        coefficients = {name: number(bits) for name, bits in case["coefficients"].items()}
        weights, after = optim.update(case["optimizer"], before, slots, gradient, coefficients)
        assert case["weights"] == to_bits(weights)
        assert case["slots_after"] == {name: to_bits(values) for name, values in after.items()}


def check_average(v: Vector) -> None:
    after = optim.moving_average(from_bits(v["average"]), from_bits(v["weights"]), number(v["ema"]))
    assert v["after"] == to_bits(after)
    for case in v["decays"]:
        assert number(case["ema"]) == optim.ema_decay(case["decay"], case["update"])


def check_pipe(v: Vector) -> None:
    assert v["mark"] == pipes.MARK.hex()
    assert {m.__struct_config__.tag for m in get_args(pipes.Message)} >= {f["type"] for f in v["frames"]}
    for frame in v["frames"]:
        data = bytes.fromhex(frame["bytes"])
        received = pipes.receive(io.BytesIO(data), len(data))
        assert received is not None
        assert received[1] == len(data)
        assert msgspec.json.decode(msgspec.json.encode(received[0])) == {
            k: value for k, value in frame.items() if k != "bytes"
        }
        sent = io.BytesIO()
        assert pipes.send(sent, received[0]) == len(data)
        assert sent.getvalue() == data


def check_hashes(v: Vector) -> None:
    states = {name: state_of(case) for name, case in v.items()}
    assert list(states) == ["before", "after", "with_slots"]
    for name, state in states.items():
        assert v[name]["weights_sha256"] == weights_sha256(state.weights).hex()
        assert v[name]["state_sha256"] == state_sha256(state).hex()
    task, _, row = (bytes.fromhex(case["bytes"]) for case in VECTORS["messages"]["messages"])
    assert decode_task(task).state_sha256 == state_sha256(states["before"])
    after = replay(states["before"], make_table({"w": (2, 2)}), decode_row(row))
    assert to_bits(after.weights) == v["after"]["weights"]
    assert decode_row(row).weights_sha256 == weights_sha256(after.weights)
    assert decode_row(row).state_sha256 == state_sha256(after) == state_sha256(states["after"])


def state_of(case: Vector) -> State:
    weights = from_bits(case["weights"])
    slots = {name: from_bits(bits) for name, bits in case["slots"].items()}
    return State(case["step"] + 1, case["step"], weights, slots, weights)


def check_local_step(v: Vector) -> None:
    names = ("key", "round", "family", "exponent")
    task = make_task(
        num_directions=len(v["integers"]), local_steps=2, local_lr=number(v["local_lr"]), **{n: v[n] for n in names}
    )
    encoded = Encoded(np.array(v["integers"], np.int64), (0,), 0, 0)
    after = local_update(task, table_of(v["shapes"]), from_bits(v["before"]), encoded, v["step"], FAST)
    assert v["after"] == to_bits(after)


def check_exponents(v: Vector) -> None:
    two = credited([{"shape": [2], "kept": "", "credit": [i, "loss", [], False]} for i in range(2)])
    tables = {1: table_of([[2]]), 2: two}
    assert [v["first"]] == [FIRST_EXPONENT] == list(next_exponents(tables[1], 15, None))
    assert measures_scale(None, 15)
    for case in v["cases"]:
        row = make_row(
            [[[1, 1]]],
            round=v["last_round"],
            applied=False,
            participants=list(range(case["participants"])),
            **{name: case[name] for name in ("exponents", "magnitudes", "nonfinite")},
        )
        following = next_exponents(tables[len(case["exponents"])], case["bits"], row, case["clip"])
        assert (case["next"], case["calibrates"]) == (list(following), measures_scale(row, case["bits"]))
        applied = msgspec.structs.replace(row, applied=True)
        assert not measures_scale(applied, case["bits"])
        assert not measures_scale(msgspec.structs.replace(row, round=3), case["bits"])


def draws(texts: Sequence[str]) -> Callable[[int], bytes]:
    """In place of the operating system's entropy: these bytes, in this order."""
    left = [bytes.fromhex(text) for text in texts]

    def draw(size: int) -> bytes:
        assert len(left[0]) == size
        return left.pop(0)

    return draw


def check_secure_keys(v: Vector) -> None:
    own = Identity.make(bytes.fromhex(v["secret"]))
    assert (v["signing"], v["sealing"]) == (own.card.signing.hex(), own.card.sealing.hex())
    private, self_seed = mask_key(bytes.fromhex(v["mask_seed"])), bytes.fromhex(v["self_seed"])
    public = private.public_key().public_bytes_raw()
    pair, sealed = v["pair_mask"], v["sealed"]
    client, other = pair["clients"]
    here = context(v["key"], v["round"], client)
    assert (v["mask_public"], v["context"]) == (public.hex(), here.hex())
    assert v["self_commitment"] == commitment(here, self_seed).hex()
    assert v["self_mask"] == self_mask(self_seed, here, len(v["self_mask"])).tolist()
    both = context(v["key"], v["round"], client, other)
    words = pair_mask(private, bytes.fromhex(pair["mask_public"]), both, len(pair["words"]))
    assert pair["words"] == words.tolist()
    there = sealing(v["key"], v["round"], client, sealed["holder"], public)
    card, shares = PublicKeys(b"", bytes.fromhex(sealed["card"])), bytes.fromhex(sealed["shares"])
    assert sealed["bytes"] == own.seal(card, there, shares).hex()


def check_graph(v: Vector) -> None:
    cohort, degree = v["cohort"], v["neighbours"]
    last = word3(Purpose.GRAPH)
    drawn = [word for i in range(-(-len(cohort) // 4)) for word in block([v["key"], v["round"]], [i, 0, 0, last])]
    assert words(v["words"]) == drawn[: len(cohort)]
    assert v["circle"] == [cohort[i] for i in sorted(range(len(cohort)), key=lambda i: drawn[i])]
    for place, client in enumerate(v["circle"]):
        near = [v["circle"][(place + step) % len(cohort)] for step in range(-(degree // 2), degree // 2 + 1)]
        assert v["holders"][str(client)] == sorted(near)
    around = neighbourhoods(cohort, (v["key"], v["round"]), degree)
    assert v["holders"] == {str(client): list(near) for client, near in around.items()}
    assert v["thresholds"] == {n: threshold(int(n)) for n in v["thresholds"]}


def check_shares(v: Vector) -> None:
    secret, need = bytes.fromhex(v["secret"]), len(v["coefficients"]) + 1
    with patch("os.urandom", draws(v["coefficients"])):
        assert v["shares"] == [share.hex() for share in split(secret, need, len(v["shares"]))]
    last = range(len(v["shares"]) - need, len(v["shares"]))
    assert recombine([[i + 1 for i in last]], [[bytes.fromhex(v["shares"][i]) for i in last]]) == [secret]


def check_secure_round(v: Vector) -> None:
    """Clients and server say what the document says they do, from the same random bytes."""
    identities = {c["client"]: Identity.make(bytes.fromhex(c["secret"])) for c in v["clients"]}
    cards = {client: identity.card for client, identity in identities.items()}
    clients = {client: SecureClient(identity, client, v["key"]) for client, identity in identities.items()}
    server = SecureRound(v["key"], v["round"], list(cards), cards, len(v["total"]), len(v["counts"]), word=v["word"])
    assert v["word"] == word_bits(v["bits"], v["weight_sum"])
    pack = msgspec.msgpack.encode
    for case in v["clients"]:
        card = cards[case["client"]]
        assert case["card"] == {"signing": card.signing.hex(), "sealing": card.sealing.hex()}
        with patch("os.urandom", draws([case["mask_seed"], case["self_seed"], *case["coefficients"]])):
            advert = clients[case["client"]].advertise(v["round"], list(cards), cards)
        assert case["advert"] == pack(advert).hex()
        server.advertise(advert)
    alive = {case["client"]: case for case in v["clients"] if "unmasked_first" in case}
    for case in v["clients"]:
        client, values = case["client"], np.array(case["values"], np.int64)
        assert case["introduced"] == pack(server.introduce(client)).hex()
        introduced = decode_introductions(bytes.fromhex(case["introduced"]))
        weight, clipped, nonfinite = (case["reply"][name] for name in ("weight", "clipped", "nonfinite"))
        reply = Reply(
            round=v["round"],
            client=client,
            weight=weight,
            scalars=b"",
            magnitudes=tuple(case["reply"]["magnitudes"]),
            clipped=clipped,
            nonfinite=nonfinite,
        )
        assert case["counts"] == list(counts_of(reply))
        masked = clients[client].mask(v["round"], introduced, values, case["counts"], v["word"])
        assert case["masked"] == pack(masked).hex()
        if client in alive:
            server.add(masked)
    assert list(server.survive().clients) == list(alive)
    for name, told in zip(("unmasked_first", "unmasked_last"), v["survivors"], strict=True):
        assert told == pack(server.survivors_for(v["clients"][0]["client"])).hex()
        for client, case in alive.items():
            unmasked = clients[client].unmask(server.survivors_for(client))
            assert case[name] == pack(unmasked).hex()
            server.unmask(unmasked)
    total, counts = server.total()
    assert (v["total"], v["counts"]) == (total.tolist(), list(counts))
    low, high = v["counts"][3:]
    assert low + 2**15 * high == sum(case["reply"]["magnitudes"][0] for case in alive.values())
    plain = [np.array([*case["values"], *case["counts"]]) for case in alive.values()]
    assert v["total"] + v["counts"] == np.sum(plain, axis=0).tolist()


CHECKS: dict[str, Callable[[Vector], None]] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_") and name != "check_encoded"
}


@pytest.mark.parametrize("name", CHECKS)
def test_vector(name: str) -> None:
    CHECKS[name](VECTORS[name])


def test_every_block_is_checked() -> None:
    assert set(VECTORS) == set(CHECKS) | {"journal"}


def test_vector_journal(tmp_path: Path) -> None:
    v = VECTORS["journal"]
    method = msgspec.convert(v["method"], Method)
    shapes, initial = {name: tuple(shape) for name, shape in v["shapes"].items()}, from_bits(v["initial"])
    kept = {name: bytes.fromhex(text) for name, text in v["kept"].items()}
    table = tuple(msgspec.structs.replace(spec, kept=kept[spec.name]) for spec in make_table(shapes))
    config = RunConfig(
        method=method, key=v["key"], rounds=1, evaluate_every=1, snapshot_every=1, table=table, plan={}, clients=(1,)
    )
    rows = [bytes.fromhex(row) for row in v["rows"]]
    journal = Journal.create(tmp_path / "run", config, initial)
    for i, row in enumerate(rows):
        journal.commit(row, record(i))
    journal.close()
    assert v["rows.bin"] == (tmp_path / "run" / "rows.bin").read_bytes().hex()
    # the same, as the document puts it
    listed = json.loads((tmp_path / "run" / "config.json").read_text())["method"]
    assert (listed, list(listed)) == (v["method"], list(v["method"]))
    credit = [0, "loss", [], False]
    tensors = [
        {"name": s.name, "shape": list(s.shape), "offset": s.offset, "kept": kept[s.name], "credit": credit}
        for s in table
    ]
    assert v["settings"] == msgspec.msgpack.encode([4, v["method"], v["key"], tensors]).hex()
    settings = bytes.fromhex(v["settings"])
    checksum = hashlib.sha256(b"baffle journal\x0a" + settings + weights_sha256(initial)).digest()
    assert v["start"] == checksum.hex()
    data = b""
    for row in rows:
        checksum = hashlib.sha256(checksum + row).digest()
        data += len(row).to_bytes(4, "little") + (~len(row) & 0xFFFFFFFF).to_bytes(4, "little") + row + checksum
    assert v["rows.bin"] == data.hex()


def record(round_: int) -> Record:
    numbers = dict.fromkeys(Record.__struct_fields__, 0)
    return msgspec.convert({**numbers, "round": round_, "applied": True, "weights_sha256": ""}, Record)


# Tables and sentences


def kind_of(field: schema.Type) -> str:
    match field:
        case schema.IntType():
            return "integer"
        case schema.FloatType():
            return "float64"
        case schema.StrType() | schema.LiteralType():
            return "text"
        case schema.BytesType():
            return "bytes"
        case schema.BoolType():
            return "boolean"
        case schema.UnionType(types=types) if len(types) == 2 and isinstance(types[1], schema.NoneType):
            return f"{kind_of(types[0])} or nil"
        case schema.VarTupleType(item_type=schema.TupleType(item_types=items)) if len(items) == 2:
            return "array of pairs"
        case schema.TupleType(item_types=items) if len(items) == 4 and {type(i) for i in items} == {schema.IntType}:
            return "array of four integers"
        case schema.VarTupleType(item_type=item):
            return f"array of {kind_of(item)}"
        case schema.StructType():
            return "map"
        case schema.DictType(key_type=key, value_type=value):
            return f"map of {kind_of(key)} to {kind_of(value)}"
    raise AssertionError(f"{field}: the document has no word for it")


WRITTEN: dict[type[msgspec.Struct], type[msgspec.Struct]] = {Task: Task, Reply: Reply, Row: encoding._Row4}
"""What is encoded for each kind of message."""
LETTERS: list[type[msgspec.Struct]] = [PublicKeys, KeysResponse, Introduced, Masked, Survivors, UnmaskResponse]
CARRIERS: list[type[msgspec.Struct]] = [KeysRequest, MaskedTrainResponse, UnmaskRequest]
DEFAULTS = {
    "slices": 1,
    "bits": 15,
    "unit_sizes": [],
    "secure": 0,
    "word": 32,
    "next_cohort": [],
    "complaints": [],
    "signatures": [],
    "state_sha256": b"",
}


@pytest.mark.parametrize("message", [*DECODERS, *LETTERS, *CARRIERS])
def test_tables_of_fields(message: type[msgspec.Struct]) -> None:
    info = schema.type_info(WRITTEN.get(message, message))
    assert isinstance(info, schema.StructType)
    heading = message.__name__ if info.tag is None else str(info.tag).capitalize()
    section = TEXT.split(f"\n### {heading}\n")[1].split("\n#")[0]
    listed = re.findall(r"^\| `(\w+)` \| ([\w ]+) \| \S.* \|$", section, re.MULTILINE)
    assert listed == [(field.encode_name, kind_of(field.type)) for field in info.fields]
    left_out = {f.encode_name: f.default for f in info.fields if not f.required}
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in left_out.items()} == {
        name: DEFAULTS[name] for name in left_out
    }


def test_tables_of_purposes_and_families() -> None:
    assert re.findall(r"^\| `([A-Z]+)` \| (\d+) \|", TEXT, re.MULTILINE) == [(p.name, str(int(p))) for p in Purpose]
    families = re.findall(r"^\| `(\w+)` \| [\w ]+ \| [\w ]+ \| (\S+) \| (\d+) \|$", TEXT, re.MULTILINE)
    units = {"1": 1.0, "2⁻¹⁰": 2.0**-10}
    names: list[Family] = ["rank1", "rademacher", "gaussian"]
    made = [Directions(make_table({"w": (2, 2)}), name, (0, 0)) for name in names]
    assert [(name, units[unit], int(most)) for name, unit, most in families] == [
        (d.family, d.unit, d.largest) for d in made
    ]


def test_the_lists_of_names() -> None:
    listed = re.findall(r"^\| (\w+) \| ((?:`[\w-]+`(?:, )?)+) \|$", TEXT, re.MULTILINE)
    kinds = {"family": get_args(Family), "sharing": get_args(Sharing), "difference": get_args(Difference)}
    kinds["optimizer"] = tuple(optim.COEFFICIENTS)
    assert {name: tuple(re.findall(r"`([\w-]+)`", names)) for name, names in listed} == kinds
    for name, chosen in kinds.items():
        for place, value in enumerate(chosen):
            coefficients = dict.fromkeys(optim.COEFFICIENTS[value], 0.5) if name == "optimizer" else {"lr": 0.5}
            coefficients |= {"weight_decay": 0.0}
            row = make_row([[[1, 1]]], **{name: value, "coefficients": coefficients})
            written = msgspec.msgpack.decode(encode_message(row))
            assert written[5][list(kinds).index(name)] == place
            assert decode_row(encode_message(row)) == row


def test_what_is_no_row() -> None:
    data = bytes.fromhex(VECTORS["messages"]["messages"][2]["bytes"])
    row, fields = decode_row(data), msgspec.msgpack.decode(data)
    whole = [2 if isinstance(value, float) else value for value in fields]
    assert decode_row(msgspec.msgpack.encode(whole)) == msgspec.structs.replace(row, sigma=2.0)
    for place in range(len(fields)):
        with pytest.raises(msgspec.DecodeError):
            decode_row(msgspec.msgpack.encode(fields[:place]))
        with pytest.raises(msgspec.DecodeError):
            decode_row(msgspec.msgpack.encode([*fields[:place], [b"?"], *fields[place + 1 :]]))
    for end in range(len(data)):
        with pytest.raises(msgspec.DecodeError):
            decode_row(data[:end])
    names, floats = fields[5], fields[20]
    for place, value in ((0, 3), (1, 2), (2, 2), (3, 3), (0, -1), (3, -1)):
        changed = [*names[:place], value, *names[place + 1 :]]
        with pytest.raises(msgspec.DecodeError):
            decode_row(msgspec.msgpack.encode([*fields[:5], changed, *fields[6:]]))
    for wrong in (b"", floats[:4], floats[:8], floats[:-1], floats + bytes(8)):
        with pytest.raises(msgspec.DecodeError):
            decode_row(msgspec.msgpack.encode([*fields[:20], wrong, *fields[21:]]))
    with pytest.raises(msgspec.DecodeError):
        decode_row(msgspec.msgpack.encode([*fields, 0]))


MAPS = [*VECTORS["messages"]["messages"][:2], {"type": "Row", "bytes": VECTORS["earlier_row"]["bytes"]}]


@pytest.mark.parametrize("case", MAPS, ids=lambda case: str(case["type"]))
def test_what_a_receiver_takes_and_refuses(case: Vector) -> None:
    kind = next(kind for kind in DECODERS if kind.__name__ == case["type"])
    decode, data = DECODERS[kind], bytes.fromhex(case["bytes"])
    message, fields = decode(data), msgspec.msgpack.decode(data)
    refused = (ReplyError, msgspec.DecodeError)
    assert decode(msgspec.msgpack.encode(dict(reversed(fields.items())))) == message
    assert decode(msgspec.msgpack.encode(fields | {"colour": "red"})) == message
    whole = {name: 2 for name, value in fields.items() if isinstance(value, float)}
    for name, value in msgspec.structs.asdict(decode(msgspec.msgpack.encode(fields | whole))).items():
        assert name not in whole or (value == 2 and type(value) is float)
    for name in fields:
        lacking = msgspec.msgpack.encode({n: value for n, value in fields.items() if n != name})
        if kind is Task and name in DEFAULTS and name != "state_sha256":  # what they are then is said
            assert decode(lacking) == msgspec.structs.replace(message, **{name: fields_default(name)})
            assert f"lacks `{name}`" in TEXT
        else:
            with pytest.raises(refused, match=name):
                decode(lacking)
        with pytest.raises(refused, match=name):
            decode(msgspec.msgpack.encode(fields | {name: [b"?"]}))
    for end in range(len(data)):
        with pytest.raises(refused):
            decode(data[:end])


def fields_default(name: str) -> object:
    value = DEFAULTS[name]
    return tuple(value) if isinstance(value, list) else value


def test_a_void_row() -> None:
    """What the document says of a row without a sum: nothing is applied, and the scale stays."""
    task = make_task()
    total = nothing(task)
    row = make_row(
        total.vectors.tolist(),
        participants=total.participants,
        weight_sum=total.weight_sum,
        clipped=total.clipped,
        nonfinite=total.nonfinite,
        magnitudes=total.magnitudes,
        applied=False,
        round=9,
    )
    assert (row.participants, row.weight_sum, row.clipped) == ((), 1, 0)
    assert row.nonfinite == task.local_steps * task.num_directions
    assert not row.integers.any()
    assert next_exponents(table_of([[2, 2]]), task.bits, row) == row.exponents
