"""The log on stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from baffle.deploy.logs import log_to_stderr


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    log = logging.getLogger("baffle")
    handlers, level = list(log.handlers), log.level
    yield
    log.handlers[:], log.level = handlers, level


def test_a_message_is_printed_once_however_often_the_log_is_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr()
    log_to_stderr("baffle")
    logging.getLogger("baffle").info("client %d joined", 3)
    time, *words = capsys.readouterr().err.split()
    assert len(time) == len("12:34:56")
    assert words == ["baffle", "client", "3", "joined"]


def test_the_environment_sets_the_level(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAFFLE_LOG", "warning")
    log_to_stderr()
    logging.getLogger("baffle").info("not shown")
    assert capsys.readouterr().err == ""
    logging.getLogger("baffle").warning("shown")
    assert capsys.readouterr().err.endswith(" shown\n")
