"""How much of new prompts a step may read, so that running answers keep their pace."""

from __future__ import annotations

SLOWER = 4.0
"""A step that reads prompts may take this many times as long as one that only writes."""
LEAST, MOST = 16, 512
"""Tokens of prompts per step. The most is read while nobody waits for a next token."""
WEIGHT = 0.1
"""Weight of a new measurement in the moving averages."""


class PromptPace:
    """Measures steps of a model: those that only write, and those that read prompts, too."""

    def __init__(self) -> None:
        self.most = MOST
        self._writing_s = 0.0
        """Of a step that writes one token of each answer."""
        self._token_s = 0.0
        """More for each token of a prompt."""

    @property
    def room(self) -> int:
        """Tokens of prompts that the next step may read beside running answers."""
        if not self._writing_s or not self._token_s:
            return LEAST * 4
        return int(min(MOST, max(LEAST, (SLOWER - 1) * self._writing_s / self._token_s)))

    def observe(self, tokens: int, written: int, seconds: float) -> None:
        """A step has read `tokens` and written the next token of `written` answers."""
        if tokens <= 2 * written:  # with the tokens that grammars force
            self._writing_s = _moved(self._writing_s, seconds)
        elif self._writing_s and tokens >= LEAST:
            self._token_s = _moved(self._token_s, max(0.0, seconds - self._writing_s) / (tokens - written))
        else:
            self._token_s = _moved(self._token_s, seconds / tokens)


def _moved(average: float, new: float) -> float:
    return (1 - WEIGHT) * average + WEIGHT * new if average else new
