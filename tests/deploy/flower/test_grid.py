"""The private names of Flower's Grid that are used are there."""

from __future__ import annotations

from types import SimpleNamespace

from flwr.superlink.grid.http_grid import HttpGrid

from baffle.deploy.flower.grid import QuickGrid, quick


def test_the_private_names_that_are_used_are_there() -> None:
    grid = HttpGrid("127.0.0.1:9", insecure=True, token="t")
    fast = quick(grid)
    assert isinstance(fast, QuickGrid)
    assert grid._runtime_client is fast._client
    for name in ("PushMessages", "PullMessages", "PushObject", "PullObject", "ConfirmMessageReceived", "GetNodes"):
        assert callable(getattr(grid._runtime_client, name))
    assert grid.node.node_id == 1
    grid.close()
    other = SimpleNamespace()
    assert quick(other) is other  # type: ignore[arg-type]  # any other Grid stays what it is
