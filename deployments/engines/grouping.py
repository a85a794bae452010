"""Which items of an encoder may share a batch, found by comparing its answers for an item alone and in company.

Attention masks do not reach everything that a model computes: Fourier mixing, convolutions and attention in blocks see
the padding too. A vector would then depend on who else asks at the moment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np

from deployments import disk_cache
from deployments.checkpoints.modules import contents
from deployments.engines import calibration
from deployments.engines.inputs import Encoded
from deployments.memory import is_out_of_memory
from deployments.spec import Batches, ItemError, first_line

if TYPE_CHECKING:
    from deployments.engines.encoder import Encoder, Output

logger = logging.getLogger("ray.serve")

Item = TypeVar("Item")
Run = Callable[[list[Any]], np.ndarray]
Example = tuple[Any, np.ndarray]
"""An item and the answer for it alone."""

LONGEST = 2048
"""Longest item compared, in tokens: longer ones would take minutes on a CPU. They fill a batch and run alone."""
SHORT = 3
"""Length of the second shortest example, in words."""
TOLERANCE = {"fp32": 5e-4, "fp16": 5e-3, "bf16": 3e-2, "int8": 6e-2}
"""Largest distance between two answers for the same item, as a fraction of their length. In batches of another shape,
models that heed their masks came within 1e-6 in fp32 and 1e-2 in bf16; those that don't were 0.2 to 0.9 apart."""
SAID: dict[str, str] = {
    "equal_lengths": "padding changes this model's answers, so only items of equal length share a batch",
    "single": "company in a batch changes this model's answers, so its items run one at a time",
}


def in_groups(items: list[Item], batches: Batches, length: Callable[[Item], int], run: Run) -> np.ndarray:
    """Run items in batches that do not change their answers; returns one row per item, in order."""
    groups: dict[tuple[str, int], list[int]] = {}
    for place, item in enumerate(items):
        tokens = length(item)
        if batches == "single" or tokens > LONGEST:
            group = ("alone", place)
        else:
            group = ("together", tokens if batches == "equal_lengths" else 0)
        groups.setdefault(group, []).append(place)
    rows = np.concatenate([run([items[place] for place in places]) for places in groups.values()])
    ordered: np.ndarray = rows[np.argsort(np.concatenate(list(groups.values())))]
    return ordered


def batches_of(encoder: Encoder, output: Output, folder: Path) -> Batches:
    """Which items may share a batch, as measured on this machine now or earlier."""
    facts = encoder.facts
    name = "batches-" + disk_cache.key(
        *(output, facts.runtime, facts.precision, encoder.max_tokens, disk_cache.hardware(facts.device == "cuda")),
        *(contents(folder), disk_cache.versions(), disk_cache.code()),
    )
    known = (disk_cache.read(name) or {}).get("batches")
    found: Batches | None = next((each for each in get_args(Batches) if each == known), None)
    if found is None:
        items = _examples(encoder, output)
        found = measure(encoder.run_together, items, TOLERANCE.get(facts.precision, TOLERANCE["int8"]))
        disk_cache.write(name, {"batches": found})
    if found in SAID:
        logger.warning("%s: %s", folder.name, SAID[found])
    return found


def measure(run: Run, items: list[Any], tolerance: float) -> Batches:
    """Compare what `run` answers for each item alone and beside others. `items` are in order of length.

    A batch that fails where its items alone do not counts as different.
    """
    alone = [(item, rows) for item in items if (rows := _alone(run, item)) is not None]
    if not alone or (_agrees(run, alone[:2], tolerance) and _agrees(run, alone[1:] or alone, tolerance)):
        return "mixed"
    pairs = [[example, mate] for example in alone if (mate := _mate(run, example[0]))]
    return "equal_lengths" if pairs and all(_agrees(run, pair, tolerance) for pair in pairs) else "single"


def _examples(encoder: Encoder, output: Output) -> list[Any]:
    """Items in order of length: the shortest, some of middle length, and one of at most LONGEST tokens."""
    words = " ".join(calibration.read()["texts"]).split()
    words *= -(-LONGEST // len(words))
    query = None if output == "sentence_embedding" else words[0]
    longest = _example(encoder, query, words, LONGEST)
    items = [
        *(longest, _example(encoder, query, words[:SHORT]), _example(encoder, query, words[:1])),
        _example(encoder, query, words, encoder.tokens(longest) // 2) if longest else None,
    ]
    if query is None and isinstance(longest, Encoded):
        items.append(encoder.prepare_ids([int(longest.ids[0])]))
    by_length = {encoder.tokens(item): item for item in items if item is not None}
    return [by_length[length] for length in sorted(by_length)]


def _example(encoder: Encoder, query: str | None, words: list[str], most: int = LONGEST) -> Any:
    """An item of these words, or of as many of them as make at most `most` tokens; None if the model takes none."""
    while True:
        text = " ".join(words)
        try:
            item = encoder.prepare(text) if query is None else encoder.prepare(query, text)
        except ItemError as error:
            logger.info("an example was not compared: %s", error)
            return None
        if not words or encoder.tokens(item) <= most:
            return item
        words = words[: len(words) * most // encoder.tokens(item)]


def _mate(run: Run, item: Any) -> Example | None:
    """Another item of the same length with its answer alone; None if there is no telling how long an item is."""
    if not isinstance(item, Encoded):
        return None
    ids = item.ids.copy()
    ids[1:-1] = ids[1:-1][::-1]
    rows = _alone(run, mate := replace(item, ids=ids))
    return None if rows is None else (mate, rows)


def _alone(run: Run, item: Any) -> np.ndarray | None:
    """The answer for a single item; None if the model can't take it, which has nothing to do with others."""
    try:
        return run([item])
    except Exception as error:  # a model may raise anything
        logger.info("an example was not compared: %s", first_line(error))
        return None


def _agrees(run: Run, examples: list[Example], tolerance: float) -> bool:
    try:
        rows = run([item for item, _ in examples])
    except Exception as error:  # a model may raise anything
        return is_out_of_memory(error)  # which is no difference
    alone = np.concatenate([row for _, row in examples])
    return distance(rows, alone) <= tolerance


def distance(rows: np.ndarray, expected: np.ndarray) -> float:
    """Largest distance between a row and the expected one, as a fraction of the latter's length.

    A logit below 1 counts as 1, since what it is worth does not depend on how close to 0 it is.
    """
    least = 1.0 if expected.shape[1] == 1 else np.finfo(np.float32).tiny
    lengths = np.maximum(np.linalg.norm(expected, axis=1), least)
    return float((np.linalg.norm(rows - expected, axis=1) / lengths).max())
