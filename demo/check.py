"""`make demo-check`: measures the demo checkpoints on held-out data, run by the engines that serve them."""

from __future__ import annotations

import io
import json
import sys
import time
from itertools import islice
from typing import Any

import yaml
from PIL import Image
from pydantic import BaseModel

from demo.adverts import check as adverts
from demo.next_word import check as next_word
from demo.rerank import check as rerank
from deployments.checkpoints.sources import ROOT
from deployments.engine_loading import load_engine
from deployments.load_progress import LoadProgress
from deployments.messages import Pair, Prompt, Question
from serve.config.tasks import model_spec

BATCH = 8


def engine(name: str) -> Any:
    """The engine of a model as configs/local.yaml serves it."""
    config = yaml.safe_load((ROOT / "configs/local.yaml").read_text(encoding="utf-8"))
    settings = config["applications"][0]["args"]["models"][name]
    return load_engine(model_spec(name, settings["task"], settings["source"]), LoadProgress(lambda _: None))


def predictor(engine: Any) -> next_word.Predict:
    def predict(text: str, top_k: int) -> list[str]:
        [words] = engine.run([engine.prepare(Prompt(text, top_k))])
        return [word.text for word in words]

    return predict


def answers(engine: Any, cases: list[adverts.Case]) -> list[BaseModel]:
    """The engine's answers about the images of the cases, BATCH at a time."""
    given: list[BaseModel] = []
    remaining = iter(cases)
    while batch := list(islice(remaining, BATCH)):
        questions = [Question(_png(case.image()), case.prompt, _schema(type(case.answer))) for case in batch]
        written = engine.run([engine.prepare(question) for question in questions])
        given += [type(case.answer).model_validate_json(a.json) for case, a in zip(batch, written, strict=True)]
    return given


def scorer(engine: Any) -> rerank.Score:
    def score(query: str, documents: list[str]) -> list[float]:
        scores: list[float] = engine.run([engine.prepare(Pair(query, text)) for text in documents]).logits.tolist()
        return scores

    return score


def check_next_word() -> bool:
    figures = next_word.evaluate(predictor(engine("predictor")))
    print(f"true next eojeol among the top five: {figures.share:.1%} of {figures.prefixes} prefixes, wanted 50%")
    for text, words in figures.shown.items():
        print(f"  {text} -> {', '.join(words)}")
    return figures.good_enough


def check_adverts() -> bool:
    cases = adverts.heldout()
    figures = adverts.evaluate(cases, answers(engine("vision"), cases))
    print(figures)
    return figures.ok


def check_rerank() -> bool:
    figures = rerank.evaluate(scorer(engine("reranker")))
    print(f"the relevant of ten documents first: {figures.first:.1%} of {figures.cases} queries, wanted 80%")
    print("  " + ", ".join(f"{name} {share:.1%}" for name, share in (figures.by_language | figures.by_split).items()))
    return figures.holds


def main() -> None:
    """Print all figures, and exit with 1 if one misses its bound."""
    held = []
    for name, check in (("next word", check_next_word), ("adverts", check_adverts), ("rerank", check_rerank)):
        started = time.monotonic()
        print(f"== {name}")
        held.append(check())
        print(f"{'ok' if held[-1] else 'MISSED'} in {time.monotonic() - started:.0f} s", flush=True)
    sys.exit(not all(held))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _schema(answer: type[BaseModel]) -> str:
    return json.dumps(answer.model_json_schema())


if __name__ == "__main__":
    main()
