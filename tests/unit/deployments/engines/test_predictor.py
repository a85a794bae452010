"""Next words compared with their definition, written plainly: a full pass for each token of each candidate."""

from __future__ import annotations

import copy
import errno
import functools
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    PreTrainedModel,
)

from demo.next_word.check import heldout
from deployments.engine_loading import load_engine
from deployments.engines import sequences
from deployments.engines.predictor import Predictor
from deployments.engines.prefix_cache import Prefixes
from deployments.engines.sequences import Sequence
from deployments.load_progress import LoadProgress
from deployments.messages import Prompt, Word
from deployments.spec import CheckpointError
from serve.config.tasks import model_spec
from tests import checkpoints

PROMPTS = 200


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    spec = model_spec("m", "next_word", "demo/next_word/checkpoint", precision="fp32")
    engine: Predictor = load_engine(spec, LoadProgress(lambda _: None))
    return engine


@functools.cache
def plain_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained("demo/next_word/checkpoint", dtype=torch.float32).eval()


def no_memory(*_: object, **__: object) -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def ask(predictor: Predictor, *prompts: Prompt) -> list[list[Word]]:
    return predictor.run([predictor.prepare(prompt) for prompt in prompts])


def reference(predictor: Predictor, prompt: Prompt, model: PreTrainedModel | None = None) -> list[tuple[str, float]]:
    """Words and confidences by the definition of a next word, with a full forward pass for every token."""
    tokenizer, model = predictor.tokenizer, model or plain_model()
    text = prompt.text.rstrip()
    ids = tokenizer.encode(text, add_special_tokens=False)[-128:] if text else [tokenizer.bos_token_id]
    begins = text != prompt.text or not text
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)

    def probabilities(row: list[int], temperature: float) -> torch.Tensor:
        with torch.inference_mode():
            return torch.softmax(model(torch.tensor([row])).logits[0, -1].float() / temperature, -1)

    first = probabilities(ids, prompt.temperature)
    allowed = [token for token in range(len(tokens)) if not begins or tokens[token].startswith("▁")]
    allowed.sort(key=lambda token: -float(first[token]))
    best: dict[str, float] = {}
    for token in [token for token in allowed[: min(3 * prompt.top_k, 50)] if token not in special]:
        word, confidence = [token], float(first[token])
        while len(word) < 10:
            after = probabilities(ids + word, 1.0)
            likeliest = int(after.argmax())
            if tokens[likeliest].startswith("▁") or likeliest in special:
                break
            word.append(likeliest)
            confidence *= float(after[likeliest])
        text = "".join(tokens[each] for each in word).replace("▁", "")
        if text:
            best[text] = max(confidence, best.get(text, 0))
    return sorted(best.items(), key=lambda pair: -pair[1])[: prompt.top_k]


def assert_as_defined(
    predictor: Predictor, prompt: Prompt, words: list[Word], model: PreTrainedModel | None = None
) -> None:
    expected = reference(predictor, prompt, model)
    assert [word.text for word in words] == [text for text, _ in expected], prompt
    assert np.allclose([word.confidence for word in words], [confidence for _, confidence in expected], atol=1e-3)


@pytest.mark.parametrize("text", ["오늘 날씨가", "오늘 날씨가 ", "임대인은", "보증금", "", "계약을 ", "hello"])
def test_next_words_follow_their_definition(predictor: Predictor, text: str) -> None:
    [words] = ask(predictor, Prompt(text))
    assert_as_defined(predictor, Prompt(text), words)


def test_next_words_of_held_out_prompts_follow_their_definition_in_any_batch(predictor: Predictor) -> None:
    draw = random.Random(0)
    prompts = []
    for prefix, next_word in draw.sample(heldout(), PROMPTS):
        text = draw.choice([prefix, prefix + " ", f"{prefix} {next_word[:1]}"])
        prompts.append(Prompt(text, top_k=draw.randint(1, 4), temperature=draw.choice([0.5, 0.8, 2.0])))
    rest = list(prompts)
    while rest:
        batch = [rest.pop() for _ in range(min(len(rest), draw.randint(1, 16)))]
        for prompt, words in zip(batch, ask(predictor, *batch), strict=True):
            assert_as_defined(predictor, prompt, words)


def test_searches_that_join_or_leave_between_steps_change_nothing_for_the_others(predictor: Predictor) -> None:
    prompts = [Prompt(text) for text in ("오늘 날씨가", "임대인은 ", "보증금을 돌려", "계약을 ")]
    searches = []
    for prompt in prompts:
        searches.append(predictor.begin(predictor.prepare(prompt)))
        predictor.step([search for search in searches if search.result is None])
    del searches[1]
    while left := [search for search in searches if search.result is None]:
        predictor.step(left)
    for search in searches:
        assert search.result
        assert_as_defined(predictor, search.item.prompt, search.result)


def test_a_text_that_grows_as_it_is_typed_gives_what_a_fresh_start_gives(predictor: Predictor) -> None:
    text = " ".join(prefix for prefix, _ in heldout()[:12])
    prompts = [Prompt(text[:end], top_k=2) for end in range(10, len(text))]
    known = []
    for prompt in prompts:
        search = predictor.begin(predictor.prepare(prompt))
        known.append(predictor.prefixes.sequence("", search.item.ids).length)
        while search.result is None:
            predictor.step([search])
        if len(known) % 3 == 1:  # not all, because the reference is slow
            assert_as_defined(predictor, prompt, search.result)
    assert known[0] == 0
    assert known[-1] > 0.7 * len(search.item.ids), "most of the text had been read before"


def test_prefixes_are_kept_within_bounds_and_the_most_recently_used_stays(predictor: Predictor) -> None:
    prefixes = Prefixes(max_bytes=10**6)
    kept = Sequence()
    for layer in range(4):
        kept.of_layer(layer, torch.zeros(4, 40, 64), 40)
    kept.length = 40
    for start in range(200):
        prefixes.keep("a", list(range(start, start + 40)), kept)
        assert prefixes.nbytes <= 10**6
        prefixes.sequence("a", list(range(41)))
    assert prefixes.sequence("a", list(range(41))).length == 40
    assert prefixes.sequence("a", list(range(199, 220))).length == 20, "the last token is never taken from a prefix"
    assert prefixes.sequence("a", list(range(100, 141))).length == 0


def test_what_was_read_for_one_tenant_is_not_used_for_another(predictor: Predictor) -> None:
    text = "오늘 날씨가 좋아서 친구와 산책을 갔다 " * 3
    first, again, other = (Prompt(text, tenant=tenant) for tenant in ("acme", "acme", "rival"))
    read = []
    for prompt in (first, again, other):
        search = predictor.begin(predictor.prepare(prompt))
        read.append(len(search.turn(predictor.prefixes).ids))
        while search.result is None:
            predictor.step([search])
    assert read[1] == 1
    assert read[0] == read[2] == len(search.item.ids)


def test_when_memory_runs_out_prefixes_are_dropped_and_the_step_can_be_repeated(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = Prompt("오늘 날씨가 " * 20)
    [expected] = ask(predictor, prompt)
    search = predictor.begin(predictor.prepare(prompt))
    predictor.prefixes.clear()
    kept = Sequence()
    kept.of_layer(0, torch.zeros(4, 40, 64), 40)
    kept.length = 40
    predictor.prefixes.keep("a", list(range(40)), kept)
    assert predictor.prefixes.nbytes
    with monkeypatch.context() as patch:
        patch.setattr(sequences.mmap, "mmap", no_memory)
        predictor.prefixes.keep("a", list(range(1, 41)), kept)
        assert not predictor.prefixes.nbytes
        with pytest.raises(MemoryError):
            predictor.step([search])
    while search.result is None:
        predictor.step([search])
    assert search.result == expected


def test_single_tokens_and_whole_words_share_a_batch(predictor: Predictor) -> None:
    prompt = Prompt("오늘 날씨가 ", top_k=10)
    tokens = replace(prompt, complete_word=False)
    mixed = [[word.text for word in words] for words in ask(predictor, tokens, prompt, tokens)]
    alone = [[word.text for word in ask(predictor, each)[0]] for each in (tokens, prompt)]
    assert mixed == [alone[0], alone[1], alone[0]]
    assert "따뜻" in alone[0]  # the beginning of 따뜻하고, 따뜻해서 and others
    assert "따뜻" not in alone[1]


STRANGE = ["\U0001f469\u200d\U0001f467", "\x00\x07\u202e", "汉字かな", "a" * 100_000, "긴 글 " * 30_000, " " * 100_000]


@pytest.mark.parametrize("text", STRANGE)
def test_any_text_has_an_answer(predictor: Predictor, text: str) -> None:
    [words] = ask(predictor, Prompt(text))
    assert len(words) <= 5
    assert all(word.text and 0 < word.confidence <= 1 for word in words)


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 10])
def test_any_temperature_has_an_answer(predictor: Predictor, temperature: float) -> None:
    [words] = ask(predictor, Prompt("오늘 날씨가 ", temperature=temperature))
    assert words[0].text == "좋아서"
    assert all(0 <= word.confidence <= 1 for word in words)


@pytest.mark.parametrize("kind", ["gemma2", "cohere2"])
def test_next_words_of_a_model_with_sliding_windows_follow_their_definition(kind: str, predictor: Predictor) -> None:
    """The window is shorter than the prompt, and the words of a search grow beyond it."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "sliding_window": 4}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    of_kind = {"head_dim": 8, "logit_scale": 0.3, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0}
    config = AutoConfig.for_model(kind, vocab_size=2400, pad_token_id=3, **layers, **sizes, **of_kind)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weights in model.parameters():
        torch.nn.init.normal_(weights, mean=float(weights.ndim < 2), std=0.2)
    windowed = Predictor(copy.deepcopy(model), predictor.tokenizer, predictor.facts, prefix_bytes=10**6)
    prompts = [
        Prompt(text, top_k=4) for text in ("오늘 날씨가 좋아서 친구와 산책을", "임대인은 ", "보증금을 돌려받지 못한")
    ]
    for prompt, words in zip(prompts, ask(windowed, *prompts), strict=True):
        assert_as_defined(windowed, prompt, words, model)


def test_a_model_that_cannot_be_read_in_steps_is_refused_at_load(tmp_path: Path) -> None:
    folder = tmp_path / "bloom"
    config = BloomConfig(vocab_size=2400, hidden_size=32, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(folder)
    shutil.copy(checkpoints.NEXT_WORD / "tokenizer.json", folder)
    with pytest.raises(CheckpointError, match=r"^BloomForCausalLM can't be read in steps: .*$"):
        load_engine(model_spec("m", "next_word", str(folder), precision="fp32"), LoadProgress(lambda _: None))


@pytest.mark.parametrize("space", [" ", "\n", "\t "])
def test_space_after_a_text_does_not_push_it_out(predictor: Predictor, space: str) -> None:
    first, second = ask(predictor, Prompt("오늘 날씨가" + space), Prompt("오늘 날씨가" + space * 2100))
    assert [word.text for word in first] == [word.text for word in second]


def test_a_text_without_spaces_keeps_its_end(predictor: Predictor) -> None:
    assert len(predictor.prepare(Prompt("가" * 2060 + " 오늘")).ids) == predictor.max_input_tokens


def test_a_masked_language_model_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.copy(checkpoints.NEXT_WORD, tmp_path / "masked")
    checkpoints.edit(folder / "config.json", architectures=["XLMRobertaForMaskedLM"])
    with pytest.raises(CheckpointError, match=r"causal language model.*XLMRobertaForMaskedLM"):
        load_engine(model_spec("m", "next_word", str(folder), precision="fp32"), LoadProgress(lambda _: None))
