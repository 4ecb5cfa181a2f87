"""What a server and a client that keeps the state between rounds say to each other: MessagePack maps.

The first key, ``type``, names the kind. Large contents (state, weights, model) travel beside a message as parcels,
so that a transport can cut them into pieces and send the same piece once to many.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from baffle.core.types import Reply, Table, Task
from baffle.errors import ReplyError
from baffle.secure.messages import Advert, Card, Introduced, Masked, Survivors, Unmasked

STATE, WEIGHTS, SETUP = "state", "weights", "setup"
"""Names of parcels: the replay state, the weights alone, an encoded Setup."""
CARDS, INTRODUCED = "cards", "introduced"
"""In a secure sum: the cards of a client's neighbours, by number; what these advertised for it."""
LONGEST = 2**16
"""Bytes of a client's message besides its scalars, at most."""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What clients evaluate: named by the SHA-256 of its encoding."""

    table: Table
    frozen: str
    """Hash of the parameters that are not trained; empty if there are none."""
    shape: tuple[int, ...]
    """Of one example."""
    classes: int
    vocabulary: int | None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    """How bytes of pixels become numbers, channel by channel: (x / 255 - mean) / std."""
    options: dict[str, str | int | float | bool | None]
    """Those of ``baffle train`` that make the model and its runtime."""
    bundle: bytes | None
    """A client bundle, for runtimes that only infer; without one the client builds the model by its name."""


class Enrol(msgspec.Struct, frozen=True, tag="enrol"):
    """Who are you? Beside it, the setup."""

    setup: str
    """SHA-256 of the setup."""


class Present(msgspec.Struct, frozen=True, kw_only=True, tag="present"):
    """The answer: a client that is ready for this setup, and the state that it has, if any."""

    name: str
    examples: int
    plan: dict[str, str | int]
    state_sha256: bytes
    round: int
    card: Card | None = None
    """For secure sums, from a client that can take part in them."""


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag="ask"):
    """A task, and what leads from the state that a client has to the task's.

    ``rows`` continue that state, or the one in the parcel ``state``; with the parcel ``weights`` there is no state.
    Whoever has the same state is asked the same: the client's number travels beside it.
    """

    setup: str
    task: Task
    rows: tuple[bytes, ...]
    calibrate: bool = False
    """Find a sigma instead of answering."""


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """The reply to a task."""

    reply: Reply
    state_sha256: bytes = b""
    """Hash of the replay state that it was evaluated at, from a client that keeps one."""


class Found(msgspec.Struct, frozen=True, tag="found"):
    """How large a client finds the relative error of its scalars for each sigma, and what it cost to measure."""

    sigmas: tuple[float, ...]
    errors: tuple[float, ...]
    forward_passes: int
    samples_forwarded: int


class Advertise(msgspec.Struct, frozen=True, kw_only=True, tag="advertise"):
    """Make keys for a round of a secure sum, and shares of them. Beside it, cards."""

    setup: str
    key: int
    round: int
    neighbours: int
    cohort: tuple[int, ...]


class Concealed(msgspec.Struct, frozen=True, kw_only=True, tag="concealed"):
    """The reply to a task in a secure sum, and an advert for the next round, if the client can make one."""

    masked: Masked
    advert: Advert | None
    state_sha256: bytes = b""


class Unmask(msgspec.Struct, frozen=True, kw_only=True, tag="unmask"):
    """Give shares, so that the sum of the survivors can be unmasked."""

    setup: str
    key: int
    survivors: Survivors


class Behind(msgspec.Struct, frozen=True, tag="behind"):
    """The client cannot get to the task's state from what it has: which state that is, and whether it has the setup."""

    round: int
    state_sha256: bytes
    setup: bool


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The client could not do it, and why."""

    reason: str


Question: TypeAlias = Enrol | Ask | Advertise | Unmask
Response: TypeAlias = Present | Answer | Found | Advert | Concealed | Unmasked | Behind | Failed

_questions = msgspec.msgpack.Decoder(Question)
_responses = msgspec.msgpack.Decoder(Response)
_cards = msgspec.msgpack.Decoder(dict[int, Card])
_introductions = msgspec.msgpack.Decoder(tuple[Introduced, ...])
_setups = msgspec.msgpack.Decoder(Setup)


def encode(message: Question | Response | Setup) -> bytes:
    """Bytes of a message.

    Examples:
        >>> decode_response(encode(Failed("no data")))
        Failed(reason='no data')
    """
    return msgspec.msgpack.encode(message)


def decode_question(data: bytes) -> Question:
    """What a server asks; ReplyError if it is nothing of the kind."""
    try:
        question: Question = _questions.decode(data)
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"malformed question: {error}") from error
    return question


def decode_response(data: bytes) -> Response:
    """What a client says; ReplyError if it is nothing of the kind."""
    try:
        response: Response = _responses.decode(data)
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"malformed response: {error}") from error
    return response


def decode_setup(data: bytes) -> Setup:
    """The setup in ``data``; ReplyError if it is none."""
    try:
        return _setups.decode(data)
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"malformed setup: {error}") from error


def decode_cards(data: bytes) -> dict[int, Card]:
    """The parcel of cards; ReplyError if it is none."""
    try:
        return _cards.decode(data)
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"malformed cards: {error}") from error


def decode_introductions(data: bytes) -> tuple[Introduced, ...]:
    """The parcel of introductions; ReplyError if it is none."""
    try:
        return _introductions.decode(data)
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"malformed introductions: {error}") from error


def printable(text: str, most: int = 2000) -> str:
    """A foreign text on one line, without control characters.

    Examples:
        >>> printable("no\\x1b[31m\\n data")
        'no [31m data'
    """
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text[:most]).split())
