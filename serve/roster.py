"""Who reports to an actor again and again, and who has fallen silent."""

from __future__ import annotations

import time
from typing import Generic, TypeVar

Name = TypeVar("Name")


class Roster(Generic[Name]):
    """One that has not been heard of for `silence_s` is gone: its process has ended, or its machine."""

    def __init__(self, silence_s: float) -> None:
        self.silence_s = silence_s
        self._heard: dict[Name, float] = {}
        """By time.monotonic."""

    def hear(self, name: Name) -> None:
        self._heard[name] = time.monotonic()

    def silent(self) -> list[Name]:
        """Those who have fallen silent since the last time; they are forgotten."""
        before = time.monotonic() - self.silence_s
        gone = [name for name, heard in self._heard.items() if heard < before]
        for name in gone:
            del self._heard[name]
        return gone
