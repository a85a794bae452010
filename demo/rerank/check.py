"""Measures how well a reranker finds the relevant document among ten that it was not trained on."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import islice

from demo.rerank.pairs import Case, write_cases

SEED = 71
DOCUMENTS = 10
CASES_PER_SPLIT = 150
BOUND = 0.80  # share of queries whose relevant document must be scored first

Score = Callable[[str, list[str]], list[float]]


@dataclass(frozen=True)
class Figures:
    """Share of queries whose relevant document is scored first, over all and by language and split."""

    cases: int
    first: float
    by_language: dict[str, float]
    by_split: dict[str, float]

    @property
    def holds(self) -> bool:
        """Whether the bound is met, over all and in every language."""
        return min(self.first, *self.by_language.values()) >= BOUND


@cache
def heldout() -> list[Case]:
    """Cases to check with: subjects, and pairs of subject and facet, that training never sees."""
    splits = ("combination", "subject")
    return [case for split in splits for case in islice(write_cases(SEED, split, DOCUMENTS), CASES_PER_SPLIT)]


def evaluate(score: Score) -> Figures:
    """Measure `score`, which takes a query and its documents and returns a number for each, higher for better ones."""
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    for case in heldout():
        scores = score(case.query, list(case.documents))
        hit = max(range(len(scores)), key=scores.__getitem__) == case.relevant
        for name in ("all", case.language, case.split):
            hits[name].append(hit)
    share = {name: sum(found) / len(found) for name, found in hits.items()}
    return Figures(
        cases=len(hits["all"]),
        first=share["all"],
        by_language={name: share[name] for name in sorted({case.language for case in heldout()})},
        by_split={name: share[name] for name in sorted({case.split for case in heldout()})},
    )
