"""The demo checkpoints keep their figures on a part of the held-out data; `make demo-check` takes all of it."""

from __future__ import annotations

import random
from itertools import islice

from demo.adverts import check as adverts
from demo.check import answers, engine, predictor, scorer
from demo.next_word import check as next_word
from demo.rerank import check as rerank


def test_next_words_of_held_out_sentences() -> None:
    predict = predictor(engine("predictor"))
    pairs = random.Random(0).sample(next_word.heldout(), 150)
    assert sum(word in predict(prefix + " ", 5) for prefix, word in pairs) / len(pairs) > 0.6
    assert set(predict("오늘 날씨가", 5)) & {"정말", "너무", "참", "좋아서", "아주", "좋네요."}


def test_judgements_of_held_out_adverts() -> None:
    cases = adverts.heldout(40)
    figures = {row.judgement: row.right for row in adverts.evaluate(cases, answers(engine("vision"), cases)).rows}
    assert min(figures[name] for name in ("contrast_ok", "occlusion", "cta_present")) >= 0.9
    assert figures["is_valid"] >= 0.85


def test_relevant_document_comes_first() -> None:
    score = scorer(engine("reranker"))
    cases = list(islice(rerank.heldout(), 0, None, 5))
    first = [max(range(10), key=score(case.query, list(case.documents)).__getitem__) for case in cases]
    assert sum(best == case.relevant for best, case in zip(first, cases, strict=True)) / len(cases) > 0.85
