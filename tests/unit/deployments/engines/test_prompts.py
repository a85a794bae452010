"""Query is not document: a model's own prompts come before its texts, as sentence-transformers puts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer

from deployments.engine_loading import load_engine
from deployments.load_progress import LoadProgress
from deployments.messages import Pair, Text
from deployments.spec import ItemError
from serve.config.tasks import model_spec
from tests import checkpoints

TEXTS = ["When is the deposit returned?", "The deposit is returned within 14 days. " * 80, ""]
QUERY = "Represent this sentence for searching relevant passages: "


def load(task: str, folder: Path, runtime: Any) -> Any:
    spec = model_spec("m", task, str(folder), precision="fp32", runtime=runtime)
    return load_engine(spec, LoadProgress(lambda _: None))


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        ({"query": QUERY, "document": "passage: "}, None),
        ({"query": "query: ", "document": "passage: "}, "query"),
        ({"query": QUERY}, None),
        ({}, None),
        ({"query": "q: ", "passage": "p: ", "corpus": "c: ", "classify": "classify: "}, "classify"),
    ],
)
def test_texts_are_embedded_as_the_library_embeds_them(
    runtime: str, pooled: bool, prompts: dict[str, str], default: str | None, tmp_path: Path
) -> None:
    folder = checkpoints.with_prompts(tmp_path / "model", prompts, default, pooled)
    engine, model = load("embedding", folder, runtime), SentenceTransformer(str(folder), device="cpu")
    kinds: list[tuple[dict[str, Any], np.ndarray]] = [
        ({}, model.encode(TEXTS)),
        ({"input_type": "query"}, model.encode_query(TEXTS)),
        ({"input_type": "document"}, model.encode_document(TEXTS)),
        *(({"prompt_name": name}, model.encode(TEXTS, prompt_name=name)) for name in prompts),
    ]
    items = [engine.prepare(Text(text, **kind)) for kind, _ in kinds for text in TEXTS]
    found = engine.run(items).vectors
    assert np.allclose(found, np.concatenate([expected for _, expected in kinds]), atol=1e-4)
    with pytest.raises(ItemError, match=r"no prompt 'nothing'; it has .*query"):
        engine.prepare(Text("rain", prompt_name="nothing"))


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_cross_encoders_default_prompt_comes_before_the_query(runtime: str, tmp_path: Path) -> None:
    folder = checkpoints.copy(checkpoints.CROSS, tmp_path / "cross")
    asking: dict[str, Any] = {"prompts": {"ask": "Is this true? "}, "default_prompt_name": "ask"}
    plain = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": "float32"}, **asking)
    plain.save_pretrained(str(folder))
    expected = plain.predict([("rain", "It rains."), ("deposit", "")])
    engine = load("rerank", folder, runtime)
    scores = engine.run([engine.prepare(Pair("rain", "It rains.")), engine.prepare(Pair("deposit", ""))]).logits
    assert np.allclose(1 / (1 + np.exp(-scores)), expected, atol=1e-4)
    assert not np.allclose(
        CrossEncoder(str(checkpoints.CROSS), device="cpu").predict([("rain", "It rains.")]), expected[:1]
    )
