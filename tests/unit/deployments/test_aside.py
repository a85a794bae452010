"""Functions that are run in processes of their own."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from deployments import aside
from deployments.load_progress import LoadEvent, LoadProgress
from deployments.spec import CheckpointError

HERE = "tests.unit.deployments.test_aside"


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "INLINE", False)


class Unsendable(Exception):
    """Can't be pickled, as it holds a function of its own."""

    def __init__(self) -> None:
        super().__init__("first line\nsecond line")
        self.function = lambda: None


def doubled(number: int, progress: LoadProgress) -> tuple[int, int]:
    progress.checkpoint(50.0, 1, 2)
    print("what libraries print is no answer")
    return 2 * number, os.getpid()


def damaged(progress: LoadProgress) -> None:
    raise CheckpointError("model.safetensors is damaged")


def unsendable(progress: LoadProgress) -> None:
    raise Unsendable


def dies(progress: LoadProgress) -> None:
    os._exit(9)


def loads_torch(progress: LoadProgress) -> bool:
    import torch  # noqa: F401

    return True


def run(function: str, *arguments: Any) -> tuple[Any, list[LoadEvent]]:
    told: list[LoadEvent] = []
    return aside.run(f"{HERE}:{function}", *arguments, progress=LoadProgress(told.append)), told


def test_what_a_function_returns_and_tells_comes_back() -> None:
    (result, process), told = run("doubled", 21)
    assert result == 42
    assert process != os.getpid()
    assert [event.message for event in told if event.message]


def test_an_error_keeps_its_type_and_text() -> None:
    with pytest.raises(CheckpointError, match=r"^model\.safetensors is damaged$"):
        run("damaged")


def test_an_error_that_cannot_be_sent_is_told_in_a_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        run("unsendable")
    assert "first line" in str(caught.value)
    assert "second" not in str(caught.value)


def test_a_process_that_dies_is_an_error_with_its_code() -> None:
    with pytest.raises(aside.Died, match="code 9"):
        run("dies")


def test_what_a_function_imports_stays_out_of_this_process() -> None:
    code = (
        "import sys; from deployments import aside; from deployments.load_progress import LoadProgress\n"
        f"assert aside.run({HERE + ':loads_torch'!r}, progress=LoadProgress(lambda event: None))\n"
        "assert 'torch' not in sys.modules"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
