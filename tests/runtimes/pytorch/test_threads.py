"""PyTorch's kernels run on one thread while lanes work, and the setting is restored."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baffle.runtimes.pytorch.runtime import TorchRuntime
from baffle.runtimes.pytorch.threads import one_thread
from contract import batch, linear, passes


class TestThreads:
    def test_nested_and_restored(self) -> None:
        before = torch.get_num_threads()
        with one_thread():
            with one_thread():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == before

    def test_restored_when_it_fails(self) -> None:
        before = torch.get_num_threads()
        with pytest.raises(ValueError, match="inside"), one_thread():
            raise ValueError("inside")
        assert torch.get_num_threads() == before

    def test_unwanted_it_changes_nothing(self) -> None:
        before = torch.get_num_threads()
        with one_thread(False):
            assert torch.get_num_threads() == before

    def test_from_several_threads(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        inside, leave = threading.Barrier(3), threading.Barrier(3)

        def work(_: int) -> int:
            with one_thread():
                inside.wait(10)
                found = torch.get_num_threads()
                leave.wait(10)
            return found

        try:
            with one_thread(), ThreadPoolExecutor(3) as pool:
                assert list(pool.map(work, range(3))) == [1, 1, 1]
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(before)


def test_a_pass_takes_one_thread_and_the_setting_comes_back() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return x

    runtime = TorchRuntime(linear(spy=Spy()), F.cross_entropy, threads=2)
    runtime.losses(runtime.initial_weights(), passes(runtime), batch())
    assert set(seen) == {1}
    assert torch.get_num_threads() == before
