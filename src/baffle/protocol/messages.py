"""Messages between a server and a stateful client across a network: MessagePack maps, request and response in pairs.

| request | response | purpose |
| --- | --- | --- |
| EnrolRequest | EnrolResponse | learn a client's name, examples and state |
| TrainRequest | TrainResponse; MaskedTrainResponse in a secure sum | a task: the client's scalars for it |
| TrainRequest with ``calibrate`` | CalibrateResponse | measure which sigma to use |
| KeysRequest | KeysResponse | a secure sum: make keys for a round |
| UnmaskRequest | UnmaskResponse | a secure sum: give shares that unmask the sum |
| any | BehindResponse, FailedResponse | the client lacks something, or cannot answer |

The first key of a map, ``type``, names its kind. Large contents (state, weights, model) travel beside a message as
attachments, so that a transport can cut them into pieces and send the same piece once to many clients.

KeysResponse and UnmaskResponse are defined in ``baffle.secure.messages``.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from baffle.core.types import Reply, Table, Task
from baffle.errors import ReplyError
from baffle.secure.messages import Introduced, KeysResponse, Masked, PublicKeys, Survivors, UnmaskResponse

STATE, WEIGHTS, SETUP = "state", "weights", "setup"
"""Names of attachments: the replay state, the weights alone, an encoded Setup."""
PUBLIC_KEYS, INTRODUCED = "cards", "introduced"
"""Attachments of a secure sum: public keys of a client's neighbours, by number; what the neighbours sent for it."""
MOST_BYTES = 2**16
"""Upper limit of a client's message, in bytes, without its scalars."""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What clients evaluate. Its name is the SHA-256 of its encoding."""

    table: Table
    frozen: str
    """Hash of the parameters that are not trained; empty if there are none."""
    shape: tuple[int, ...]
    """Shape of one example."""
    classes: int
    vocabulary: int | None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    """How pixel bytes become numbers, per channel: (x / 255 - mean) / std."""
    options: dict[str, str | int | float | bool | None]
    """The options of ``baffle train`` that determine the model and its runtime."""
    bundle: bytes | None
    """A client bundle, for runtimes that only infer; without one the client builds the model by its name."""


class EnrolRequest(msgspec.Struct, frozen=True, tag="enrol"):
    """Ask a node who it is. The setup is attached."""

    setup: str
    """SHA-256 of the setup."""


class EnrolResponse(msgspec.Struct, frozen=True, kw_only=True, tag="present"):
    """A client that is ready for the setup, and the state that it has, if any."""

    name: str
    examples: int
    plan: dict[str, str | int]
    state_sha256: bytes
    round: int
    card: PublicKeys | None = None
    """For secure sums; None from a client that cannot take part in them."""


class TrainRequest(msgspec.Struct, frozen=True, kw_only=True, tag="ask"):
    """A task, and the rows that lead from a state that the client has to the task's state.

    ``rows`` continue the client's state, or the attached one; with attached weights no state is involved.
    Clients with the same state get byte-identical requests; the client's number travels separately.
    """

    setup: str
    task: Task
    rows: tuple[bytes, ...]
    calibrate: bool = False
    """Measure a sigma instead of answering the task."""


class TrainResponse(msgspec.Struct, frozen=True, tag="answer"):
    """The reply to a task."""

    reply: Reply
    state_sha256: bytes = b""
    """Hash of the replay state that the task was evaluated at; empty from a stateless client."""


class CalibrateResponse(msgspec.Struct, frozen=True, tag="found"):
    """A client's estimate of the relative error of its scalars for each sigma, and what measuring cost."""

    sigmas: tuple[float, ...]
    errors: tuple[float, ...]
    forward_passes: int
    samples_forwarded: int


class KeysRequest(msgspec.Struct, frozen=True, kw_only=True, tag="advertise"):
    """Make keys for a round of a secure sum, and shares of them. The neighbours' public keys are attached."""

    setup: str
    key: int
    round: int
    neighbours: int
    cohort: tuple[int, ...]


class MaskedTrainResponse(msgspec.Struct, frozen=True, kw_only=True, tag="concealed"):
    """The reply to a task in a secure sum, and keys for the next round, if the client can make them."""

    masked: Masked
    advert: KeysResponse | None
    state_sha256: bytes = b""


class UnmaskRequest(msgspec.Struct, frozen=True, kw_only=True, tag="unmask"):
    """Ask for shares, so that the sum over the surviving clients can be unmasked."""

    setup: str
    key: int
    survivors: Survivors


class BehindResponse(msgspec.Struct, frozen=True, tag="behind"):
    """The client cannot reach the task's state: the state that it has instead, and whether it has the setup."""

    round: int
    state_sha256: bytes
    setup: bool


class FailedResponse(msgspec.Struct, frozen=True, tag="failed"):
    """The client could not answer, and the reason."""

    reason: str


AnyRequest: TypeAlias = EnrolRequest | TrainRequest | KeysRequest | UnmaskRequest
AnyResponse: TypeAlias = (
    EnrolResponse
    | TrainResponse
    | CalibrateResponse
    | KeysResponse
    | MaskedTrainResponse
    | UnmaskResponse
    | BehindResponse
    | FailedResponse
)

_requests = msgspec.msgpack.Decoder(AnyRequest)
_responses = msgspec.msgpack.Decoder(AnyResponse)
_public_keys = msgspec.msgpack.Decoder(dict[int, PublicKeys])
_introductions = msgspec.msgpack.Decoder(tuple[Introduced, ...])
_setups = msgspec.msgpack.Decoder(Setup)


def encode(message: AnyRequest | AnyResponse | Setup) -> bytes:
    """Encode a message or a setup.

    Examples:
        >>> decode_response(encode(FailedResponse("no data")))
        FailedResponse(reason='no data')
    """
    return msgspec.msgpack.encode(message)


def decode_request(data: bytes) -> AnyRequest:
    """Decode a server's message. Raises ReplyError if it is malformed."""
    try:
        request: AnyRequest = _requests.decode(data)
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"malformed request: {error}") from error
    return request


def decode_response(data: bytes) -> AnyResponse:
    """Decode a client's message. Raises ReplyError if it is malformed."""
    try:
        response: AnyResponse = _responses.decode(data)
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"malformed response: {error}") from error
    return response


def decode_setup(data: bytes) -> Setup:
    """Decode an attached setup. Raises ReplyError if it is malformed."""
    try:
        return _setups.decode(data)
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"malformed setup: {error}") from error


def decode_public_keys(data: bytes) -> dict[int, PublicKeys]:
    """Decode attached public keys, by client number. Raises ReplyError if they are malformed."""
    try:
        return _public_keys.decode(data)
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"malformed public keys: {error}") from error


def decode_introductions(data: bytes) -> tuple[Introduced, ...]:
    """Decode attached introductions. Raises ReplyError if they are malformed."""
    try:
        return _introductions.decode(data)
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"malformed introductions: {error}") from error


def printable(text: str, most: int = 2000) -> str:
    """Make text from another machine safe to log: one line, no control characters, at most ``most`` characters.

    Examples:
        >>> printable("no\\x1b[31m\\n data")
        'no [31m data'
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text[:most]).split())
