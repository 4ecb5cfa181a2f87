"""A stateless client for an inference-only device: ``python -m baffle.client.edge BUNDLE DATA.npz``.

It needs numpy, onnxruntime (or openvino), msgspec and safetensors: ``pip install 'baffle[ort]'``. It reads requests
from standard input and writes answers to standard output (``baffle.protocol.pipes``), so that anything that carries
bytes can connect it to a server: a pipe, ssh, a serial line. Its data never leave it: it sends K integers per task.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import BinaryIO, NoReturn

import numpy as np

from baffle.client.calibrate import measure
from baffle.client.examples import check_labels, load_examples
from baffle.client.respond import check_task, draw, respond
from baffle.core.types import Weights, table_size
from baffle.data import Dataset
from baffle.errors import BaffleError, ReplyError
from baffle.protocol.messages import FailedResponse, TrainResponse
from baffle.protocol.pipes import MARK, MOST_BYTES, Hello, Message, WorkRequest, decode, receive_frame, send
from baffle.runtimes import Runtime
from baffle.runtimes.onnx.bundle import Bundle
from baffle.runtimes.onnx.load import load_runtime

_REASON = 2000  # characters


def serve(runtime: Runtime, bundle: Bundle, data: Dataset, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until their stream ends. An error is reported to the server as the answer.

    Args:
        runtime: evaluates the bundle.
        bundle: that the server uses, too.
        data: the client's examples.
        requests: stream to read from.
        answers: stream to write to.

    Raises:
        DataError: if the model has no output for a label.
        ReplyError: for a malformed frame, since the start of the next one is then unknown.
    """
    check_labels(runtime, bundle, data)
    answers.write(MARK)
    send(answers, Hello(len(data), bundle.sha256, runtime.plan))
    longest = 4 * table_size(runtime.table) + MOST_BYTES
    while (request := receive_frame(requests, longest)) is not None:
        try:
            answer = _answer(runtime, data, decode(request))
        except BaffleError as error:
            answer = FailedResponse(str(error)[:_REASON])
        except Exception as error:  # for values that no server sends
            answer = FailedResponse(f"{type(error).__name__}: {error}"[:_REASON])
        send(answers, answer)


def main(arguments: list[str] | None = None) -> int:
    """Run the client. Errors are one line on stderr and exit code 2."""
    parser = _Parser("python -m baffle.client.edge", description="A client that can only infer.")
    parser.add_argument("bundle", metavar="BUNDLE", help="file of 'baffle export'")
    parser.add_argument("data", metavar="DATA.npz", help="arrays x and y, as the bundle's model takes them")
    parser.add_argument("--runtime", choices=["ort", "openvino"], default="ort")
    parser.add_argument("--precision", help="openvino: bf16, or fp16, instead of the bundle's fp32")
    parser.add_argument("--threads", type=int, default=1, help="passes side by side (default: 1)")
    options = parser.parse_args(arguments)
    if sys.stdin is None or sys.stdout is None:
        parser.error("standard input or output is closed: expected pipes")
    try:
        with os.fdopen(os.dup(1), "wb") as answers:
            os.dup2(2, 1)  # output of a library must not mix with the answers
            bundle = Bundle.load(options.bundle)
            data = load_examples(options.data, bundle)
            runtime = load_runtime(bundle, options.runtime, options.threads, options.precision)
            serve(runtime, bundle, data, sys.stdin.buffer, answers)
    except BaffleError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (BrokenPipeError, KeyboardInterrupt):  # the server has gone
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    """Reports errors on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def _answer(runtime: Runtime, data: Dataset, request: Message) -> Message:
    if not isinstance(request, WorkRequest):
        raise ReplyError(f"{type(request).__name__}: expected a task")
    task, client = request.task, request.client
    check_task(task, runtime.table)
    weights = _weights(request.weights, table_size(runtime.table))
    if request.calibrate:
        return measure(task, runtime, weights, data, client)
    return TrainResponse(
        respond(task, runtime, weights, lambda step: draw(task, data, client, step), client, len(data))
    )


def _weights(data: bytes, size: int) -> Weights:
    if len(data) != 4 * size:
        raise ReplyError(f"weights of {len(data)} bytes: expected {4 * size}, for the tensors of this bundle")
    weights = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(weights).all():
        raise ReplyError("weights with NaN or infinity: expected finite numbers")
    return weights


if __name__ == "__main__":
    sys.exit(main())
