"""Measures how often the true next eojeol is among the top five, on sentences that the model was not trained on."""

from collections.abc import Callable
from dataclasses import dataclass

from demo.next_word.corpus import write_corpus

HELD_OUT_SENTENCES = 300
TOP = 5
REQUIRED_SHARE = 0.50
SHOWN = ("오늘 날씨가", "오늘 점심으로", "계약서를", "저는 어제 친구와", "보증금을", "피고는 원고에게", "안녕하세요.")

Predict = Callable[[str, int], list[str]]


@dataclass(frozen=True)
class Figures:
    """The `share` of `prefixes` whose true next word is among the top five, and the top five after some prefixes."""

    share: float
    prefixes: int
    shown: dict[str, list[str]]

    @property
    def good_enough(self) -> bool:
        return self.share >= REQUIRED_SHARE


def heldout() -> list[tuple[str, str]]:
    """Each prefix of whole eojeols of the held-out sentences, with the next eojeol and its punctuation."""
    pairs = []
    for sentence in write_corpus().held_out[:HELD_OUT_SENTENCES]:
        words = sentence.split()
        pairs += [(" ".join(words[:place]), words[place]) for place in range(1, len(words))]
    return pairs


def evaluate(predict: Predict) -> Figures:
    """Measure a predictor. A trailing space tells it that the last eojeol is complete."""
    pairs = heldout()
    hits = sum(word in predict(prefix + " ", TOP) for prefix, word in pairs)
    return Figures(hits / len(pairs), len(pairs), {text: predict(text + " ", TOP) for text in SHOWN})
