"""Measures how often a vision model judges right, on adverts that it was not trained on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from demo.adverts.cases import Case, stage1, stage2

HELDOUT_SEED = 777
PER_STAGE = 150
BOUNDS = {"is_valid": 0.85, "contrast_ok": 0.85, "occlusion": 0.85, "cta_present": 0.85}
JUDGEMENTS = ["is_valid", "image_quality_ok", "on_brief", "occlusion", "contrast_ok", "cta_present"]


@dataclass(frozen=True)
class Figure:
    """The figures of one judgement: the share that is right, and the share of cases where the right answer is true."""

    judgement: str
    cases: int
    right: float
    true: float

    @property
    def bound(self) -> float:
        """The smallest share that must be right; 0 if none is required."""
        return BOUNDS.get(self.judgement, 0.0)

    @property
    def ok(self) -> bool:
        """Whether enough is right, on cases balanced enough for that to mean something."""
        return self.right >= self.bound and (not self.bound or 0.35 <= self.true <= 0.65)

    def __str__(self) -> str:
        wanted = f", wanted {self.bound:.0%}" if self.bound else ""
        return f"{self.judgement}: {self.right:.1%} of {self.cases} right{wanted} ({self.true:.0%} are true)"


@dataclass(frozen=True)
class Figures:
    """The figures of all judgements."""

    rows: Sequence[Figure]

    @property
    def ok(self) -> bool:
        """Whether every judgement meets its bound."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        return "\n".join(str(row) for row in self.rows)


def heldout(per_stage: int = PER_STAGE) -> list[Case]:
    """Cases of both stages in turn, drawn with another seed than the training cases."""
    rng = random.Random(HELDOUT_SEED)
    return [stage(rng) for _ in range(per_stage) for stage in (stage1, stage2)]


def evaluate(cases: Sequence[Case], answers: Sequence[BaseModel]) -> Figures:
    """Compare the `answers`, one for each case, with the right ones."""
    pairs = [(case.answer, answer) for case, answer in zip(cases, answers, strict=True)]
    rows = []
    for name in JUDGEMENTS:
        both = [(getattr(truth, name), getattr(given, name)) for truth, given in pairs if hasattr(truth, name)]
        right = sum(truth == given for truth, given in both)
        rows.append(Figure(name, len(both), right / len(both), sum(truth for truth, _ in both) / len(both)))
    return Figures(rows)
