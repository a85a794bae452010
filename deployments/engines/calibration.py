"""The texts on which precisions are compared, and the figures of the comparison."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".toml")
PERCENTILE = 5


@functools.cache
def read() -> dict[str, list[str]]:
    """Calibration texts: `texts`, `queries` with their `documents`, and `prompts`."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def cosine(original: np.ndarray, rows: np.ndarray) -> float:
    """5th percentile, over rows, of the cosine between a row and its original."""
    lengths = np.linalg.norm(original, axis=1) * np.linalg.norm(rows, axis=1)
    return float(np.percentile((original * rows).sum(axis=1) / np.maximum(lengths, 1e-12), PERCENTILE))


def spearman(original: np.ndarray, values: np.ndarray) -> float:
    """Spearman's rank correlation, with ties at their mean rank; 1 if neither varies."""
    first, second = _ranks(original), _ranks(values)
    if not first.std() or not second.std():
        return float(first.std() == second.std())
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    mean: np.ndarray = (np.cumsum(count) - (count - 1) / 2)[place]
    return mean
