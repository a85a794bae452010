"""LLaVA's answers compared with those of plain `generate` under the same grammar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from PIL import Image
from transformers import LlavaForConditionalGeneration, LogitsProcessor

from deployments.checkpoints.sources import resolve
from deployments.engine_loading import load_engine
from deployments.engines.vision import Look, Vision
from deployments.images import decode
from deployments.load_progress import LoadProgress
from deployments.messages import Answer, Question, Refusal
from deployments.spec import CheckpointError, ItemError
from serve.config.tasks import model_spec
from serve.services.adverts.verdicts import JUDGE, Judgement, Validation, validation_prompt
from tests import checkpoints
from tests.dure import ROOT
from tests.pictures import encoded, polyglot

EXAMPLES = sorted((ROOT / "demo/adverts/examples").glob("*.png"))
SOURCE = "demo/adverts/checkpoint"


@pytest.fixture(scope="module")
def vision() -> Vision:
    engine = load_engine(model_spec("m", "vision", SOURCE, precision="fp32"), LoadProgress(lambda _: None))
    assert isinstance(engine, Vision)
    return engine


@pytest.fixture(scope="module")
def model() -> Any:
    return LlavaForConditionalGeneration.from_pretrained(ROOT / SOURCE, dtype=torch.float32).eval()


class Constraint(LogitsProcessor):  # type: ignore[misc]
    """Allows only tokens with which an answer still obeys its grammar."""

    def __init__(self, matcher: LLMatcher, prompt: int, eos: int) -> None:
        self.matcher, self.prompt, self.eos = matcher, prompt, eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > self.prompt:
            self.matcher.consume_token(int(input_ids[0, -1]))
        allowed = np.zeros(scores.shape[1], dtype=bool)
        if self.matcher.is_stopped():
            allowed[self.eos] = True
        else:
            bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            allowed[: bits.size] = bits[: scores.shape[1]]
        return scores.masked_fill(~torch.from_numpy(allowed), -torch.inf)


def plain(vision: Vision, model: Any, question: Question) -> str:
    """The answer of transformers' own `generate`, with one forward pass for each token."""
    item = vision.prepare(question)
    constraint = Constraint(LLMatcher(vision.grammar_tokens, item.grammar), len(item.ids), vision.eos)
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([item.ids]),
            attention_mask=torch.ones(1, len(item.ids), dtype=torch.long),
            pixel_values=item.pixels[None],
            max_new_tokens=512,
            do_sample=False,
            eos_token_id=vision.eos,
            pad_token_id=vision.eos,
            logits_processor=[constraint],
        )
    text: str = vision.tokenizer.decode(output[0, len(item.ids) :], skip_special_tokens=True)
    return text


def questions() -> list[Question]:
    judge = [Question(path.read_bytes(), JUDGE, json.dumps(Judgement.model_json_schema())) for path in EXAMPLES]
    schema = json.dumps(Validation.model_json_schema())
    copies = ["A red mug for slow mornings", "Fresh bread every day", ""]
    validate = [
        Question(path.read_bytes(), validation_prompt(copy), schema)
        for path, copy in zip(EXAMPLES, copies, strict=True)
    ]
    return judge + validate


def seen(vision: Vision, content: bytes) -> torch.Tensor:
    """The pixels that the model gets for an image file."""
    return vision.prepare(Question(content, JUDGE, json.dumps({"type": "boolean"}))).pixels


def test_the_model_sees_an_image_as_it_was_checked(vision: Vision) -> None:
    advert = Image.open(EXAMPLES[0]).convert("RGB")
    mask = Image.radial_gradient("L").resize(advert.size)
    transparent = advert.copy()
    transparent.putalpha(mask)
    composed = Image.composite(advert, Image.new("RGB", advert.size, "white"), mask)
    assert (seen(vision, encoded(transparent)) - seen(vision, encoded(composed))).abs().max() < 0.03
    grey = decode(polyglot())
    assert seen(vision, polyglot()).equal(seen(vision, encoded(grey)))
    with pytest.raises(ItemError, match="more than 50 megapixels"):
        seen(vision, encoded(Image.new("L", (7200, 7200))))


def test_answers_are_those_of_plain_decoding_in_fewer_steps(vision: Vision, model: Any) -> None:
    answers = vision.run([vision.prepare(question) for question in questions()])
    for question, answer in zip(questions(), answers, strict=True):
        assert isinstance(answer, Answer)
        assert answer.json == plain(vision, model, question)
        assert answer.steps <= answer.tokens - answer.forced + 1
        assert answer.forced >= 10, "the names of a verdict's fields leave no choice"


def test_looks_that_join_between_steps_change_nothing_for_the_others(vision: Vision) -> None:
    items = [vision.prepare(question) for question in questions()]
    alone = [vision.run([item])[0] for item in items]
    looks: list[Look] = []
    for item in items:
        looks.append(vision.begin(item))
        vision.step([look for look in looks if look.result is None])
    while left := [look for look in looks if look.result is None]:
        vision.step(left)
    assert [look.result.json for look in looks if isinstance(look.result, Answer)] == [each.json for each in alone]


def test_a_schema_that_allows_only_one_answer_gets_it(vision: Vision) -> None:
    schema = json.dumps({"const": {"verdict": "none"}})
    [answer] = vision.run([vision.prepare(Question(EXAMPLES[0].read_bytes(), JUDGE, schema))])
    assert json.loads(answer.json) == {"verdict": "none"}


def test_an_answer_that_can_not_end_in_time_is_refused(vision: Vision) -> None:
    schema = json.dumps({"type": "array", "items": {"const": 1}, "minItems": 600})
    ends = json.dumps({"type": "boolean"})
    items = [vision.prepare(Question(EXAMPLES[0].read_bytes(), JUDGE, each)) for each in (schema, ends)]
    refused, answer = vision.run(items)
    assert isinstance(refused, Refusal)
    assert "did not end" in refused.reason
    assert json.loads(answer.json) in (True, False)


def test_an_image_seen_before_is_not_read_again(vision: Vision, model: Any) -> None:
    schema = json.dumps(Validation.model_json_schema())
    image = EXAMPLES[0].read_bytes()
    vision.prefixes.clear()
    read: list[int] = []
    reader_read = vision.reader.read

    def counted(turns: list[Any]) -> torch.Tensor:
        read.append(sum(len(turn.ids) for turn in turns))
        return reader_read(turns)

    vision.reader.read = counted  # type: ignore[method-assign]
    try:
        for copy in ("A red mug for slow mornings", "A red mug to love", "Fresh bread every day"):
            question = Question(image, validation_prompt(copy), schema)
            read.clear()
            [answer] = vision.run([vision.prepare(question)])
            assert answer.json == plain(vision, model, question)
            if copy.startswith("A red mug for"):
                whole = read[0]
            else:
                assert read[0] < 0.3 * whole
        other = Question(EXAMPLES[1].read_bytes(), validation_prompt("A red mug to love"), schema)
        read.clear()
        [answer] = vision.run([vision.prepare(other)])
        assert answer.json == plain(vision, model, other)
        assert read[0] > 0.9 * whole, "another image is read in full"
    finally:
        vision.reader.read = reader_read  # type: ignore[method-assign]


def test_a_model_spread_over_devices_answers_the_same(vision: Vision) -> None:
    """It is spread over memory and disk, by the hooks that would spread it over GPUs."""
    folder = resolve(SOURCE, None)
    spread = model_spec("m", "vision", str(folder), precision="fp32", device_map="auto", max_memory={"cpu": "3MB"})
    engine = load_engine(spread, LoadProgress(lambda _: None))
    assert set(engine.model.hf_device_map.values()) == {"cpu", "disk"}
    question = questions()[0]
    assert engine.run([engine.prepare(question)])[0].json == vision.run([vision.prepare(question)])[0].json


def test_an_answer_near_its_limit_is_brought_to_an_end(vision: Vision) -> None:
    """The schema's strings and list have room for far more tokens than the limit."""
    text = {"type": "string", "minLength": 0, "maxLength": 9000}
    fields = {"analysis": text, "issues": {"type": "array", "items": text}, "ok": {"type": "boolean"}}
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    item = vision.prepare(Question(EXAMPLES[0].read_bytes(), "Describe it at great length.", json.dumps(schema)))
    look = vision.begin(item)
    bias = torch.zeros(vision.model.config.text_config.vocab_size)
    pieces = vision.tokenizer.convert_ids_to_tokens(list(range(len(vision.tokenizer))))
    bias[[id for id, piece in enumerate(pieces) if '"' in piece or "]" in piece]] = -1e4  # never ends by itself
    head = vision.model.lm_head
    hook = head.register_forward_hook(lambda _module, _inputs, logits: logits + bias)
    try:
        while look.result is None:
            vision.step([look])
    finally:
        hook.remove()
    assert isinstance(look.result, Answer), look.result
    assert set(json.loads(look.result.json)) == set(fields)
    assert 380 < look.result.tokens <= 512


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"image_token_index": 1400}),
        ("processor_config.json", {"num_additional_image_tokens": 0}),
        ("processor_config.json", {"patch_size": 24}),
    ],
)
def test_a_processor_that_does_not_fit_the_image_features_is_refused(
    file: str, change: dict[str, Any], tmp_path: Path
) -> None:
    folder = checkpoints.copy(checkpoints.VISION, tmp_path / "model")
    checkpoints.edit(folder / file, **change)
    with pytest.raises(CheckpointError, match="features of an image"):
        load_engine(model_spec("m", "vision", str(folder), precision="fp32"), LoadProgress(lambda _: None))
