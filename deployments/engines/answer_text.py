"""Turns the tokens of an answer into text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"


class AnswerText:
    """The text of one answer, given out piece by piece."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        """`decode` turns ids into text without special tokens."""
        self.decode = decode
        self.stops = [stop for stop in stops if stop]
        self.longest = max(map(len, self.stops), default=0)
        self.stopped_at: str | None = None
        """The stop string that ended the text."""
        self._ids: list[int] = []
        self._begin = self._done = 0
        """Ids from which the tail is decoded, and ids whose text is in `_held` or given out."""
        self._held = ""
        """Text that may be the beginning of a stop string."""

    @property
    def holds(self) -> bool:
        """Whether text is held back that may be the beginning of a stop string."""
        return bool(self._held)

    def add(self, ids: Sequence[int]) -> str:
        """The text that can be given out now. After a stop string nothing more is."""
        if self.stopped_at is not None:
            return ""
        self._ids += ids
        return self._checked(self._decoded())

    def end(self) -> str:
        """What is left when the answer ends: text held back, and a last character even if it is incomplete."""
        if self.stopped_at is not None:
            return ""
        rest = self._checked(self._decoded(whole=False))
        rest, self._held = rest + self._held, ""
        return rest

    def _decoded(self, whole: bool = True) -> str:
        before = self.decode(self._ids[self._begin : self._done])
        after = self.decode(self._ids[self._begin :])
        if len(after) <= len(before) or (whole and after.endswith(REPLACEMENT)):
            return ""
        self._begin, self._done = self._done, len(self._ids)
        return after[len(before) :]

    def _checked(self, new: str) -> str:
        if not self.stops:
            return new
        text = self._held + new
        found = [(at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.stopped_at = min(found, key=lambda each: (each[0], -len(each[1])))
            self._held = ""
            return text[:at]
        sizes = range(min(self.longest - 1, len(text)), 0, -1)
        keep = next((size for size in sizes if self._begins(text[-size:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _begins(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self.stops)
