"""The chat engine against transformers' own generate, with a small random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deployments.conversation import ChatRequest, Reply, Sampling
from deployments.engines.chat import Chat
from deployments.engines.generation import Generation
from deployments.engines.sampling import Choice
from deployments.engines.tool_calls import CallParser
from deployments.load_progress import LoadProgress
from deployments.messages import Refusal
from deployments.spec import CheckpointError, ItemError, ModelSpec
from tests.checkpoints import CHAT, causal_reranker, edit, gpt2

GREEDY = Sampling(temperature=0)
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Seoul", "Busan"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "note": {"type": "string"}, "n": {"type": "integer", "maximum": 9}},
    "required": ["ok", "note", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_reranker(tmp_path_factory.mktemp("chat") / "model", chat=True)


@pytest.fixture
def engine(folder: Path) -> Chat:
    return load(folder)


def load(folder: Path, **more: Any) -> Chat:
    spec = ModelSpec("chat", "chat", str(folder), precision="fp32", **more)
    return Chat.load(spec, folder, LoadProgress(lambda _: None))


def request(text: str = "It rains in April.", **more: Any) -> ChatRequest:
    return ChatRequest([{"role": "user", "content": text}], **{"sampling": GREEDY, "max_tokens": 24, **more})


def expected(folder: Path, text: str, tokens: int) -> str:
    """What transformers answers, as text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        written = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def finish(engine: Chat, works: list[Generation]) -> list[Any]:
    while left := [work for work in works if work.result is None]:
        engine.step(left)
    return [work.result for work in works]


TEXTS = ["It rains in April.", "두레는 마을의 품앗이다.", "yes no " * 20, "The deposit"]


def test_greedy_answers_are_those_of_transformers_alone_and_together(engine: Chat, folder: Path) -> None:
    wanted = [expected(folder, text, 24) for text in TEXTS]
    assert [engine.run([engine.prepare(request(text))])[0].text for text in TEXTS] == wanted
    assert [reply.text for reply in engine.run([engine.prepare(request(text)) for text in TEXTS])] == wanted
    assert len(set(wanted)) == len(TEXTS)


def test_answers_do_not_change_when_others_join_midway_or_prompts_come_in_chunks(engine: Chat, folder: Path) -> None:
    engine.pace.most = 7
    works = [engine.begin(engine.prepare(request(TEXTS[0])))]
    for text in TEXTS[1:]:
        engine.step(works)
        works.append(engine.begin(engine.prepare(request(text))))
    assert [reply.text for reply in finish(engine, works)] == [expected(folder, text, 24) for text in TEXTS]


def test_the_youngest_are_put_off_where_memory_is_short_and_none_is_lost(engine: Chat, folder: Path) -> None:
    items = [engine.prepare(request(text)) for text in TEXTS]
    engine.cache_tokens = max(len(item.ids) for item in items) + 30
    works = [engine.begin(item) for item in items]
    put_off = 0
    while left := [work for work in works if work.result is None]:
        engine.step(left)
        put_off += sum(work.sequence is None and work.written > 0 for work in works if work.result is None)
    assert put_off
    assert [work.result.text for work in works if isinstance(work.result, Reply)] == [
        expected(folder, text, 24) for text in TEXTS
    ]


def test_a_kept_conversation_is_read_from_where_it_goes_on(engine: Chat, folder: Path) -> None:
    first = request()
    [answer] = finish(engine, [engine.begin(engine.prepare(first))])
    assert answer.cached_tokens == 0
    messages = [*(first.messages or []), {"role": "assistant", "content": answer.text}]
    turn = ChatRequest([*messages, {"role": "user", "content": "And in May?"}], sampling=GREEDY, max_tokens=12)
    [known] = finish(engine, [engine.begin(engine.prepare(turn))])
    [fresh] = engine.run([engine.prepare(turn)])
    assert known.text == fresh.text
    assert known.cached_tokens >= answer.prompt_tokens
    [strange] = finish(engine, [engine.begin(engine.prepare(ChatRequest(turn.messages, tenant="b", max_tokens=1)))])
    assert strange.cached_tokens == 0, "tenants share nothing"


def test_deltas_make_the_answer_even_if_some_are_lost(engine: Chat) -> None:
    work = engine.begin(engine.prepare(request()))
    whole = []
    lossy: list[Any] = []
    step = 0
    while work.result is None:
        engine.step([work])
        step += 1
        if delta := work.take_delta():
            assert delta.first <= len(whole)
            whole += delta.pieces[len(whole) - delta.first :]
            if step % 2:
                assert delta.first <= len(lossy)
                lossy += delta.pieces[len(lossy) - delta.first :]
    assert isinstance(work.result, Reply)
    assert list(work.result.pieces[: len(whole)]) == whole
    assert list(work.result.pieces[: len(lossy)]) == lossy


def test_a_seed_gives_the_same_text_in_any_batch(engine: Chat) -> None:
    def drawn(seed: int | None, others: int) -> str:
        items = [engine.prepare(request(sampling=Sampling(seed=seed)))]
        items += [engine.prepare(request(text, sampling=Sampling(seed=9))) for text in TEXTS[:others]]
        return str(engine.run(items)[0].text)

    assert len({drawn(5, 0), drawn(5, 1), drawn(5, 3)}) == 1
    assert len({drawn(None, 0) for _ in range(4)}) > 1


def test_what_ends_an_answer(engine: Chat) -> None:
    [long] = engine.run([engine.prepare(request(max_tokens=40))])
    assert (long.finish, long.tokens) == ("length", 40)
    stop = long.text[5:8]
    [stopped] = engine.run([engine.prepare(request(max_tokens=40, stops=(stop,)))])
    assert (stopped.finish, stopped.text) == ("stop", long.text[: long.text.index(stop)])
    end = engine.tokenizer.eos_token_id
    biased = Sampling(temperature=0, logit_bias={end: 100.0})
    [ended] = engine.run([engine.prepare(request(sampling=biased))])
    assert (ended.finish, ended.text, ended.tokens) == ("stop", "", 0)
    [forced] = engine.run([engine.prepare(request(sampling=biased, ignore_eos=True, max_tokens=3))])
    assert (forced.finish, forced.tokens) == ("length", 3)
    late = engine.begin(engine.prepare(request()))
    engine.step([late])
    late.end_by(0)
    [cut] = finish(engine, [late])
    assert (cut.finish, cut.tokens) == ("length", 1)


def test_logprobs_are_of_the_models_own_distribution(engine: Chat) -> None:
    [reply] = engine.run([engine.prepare(request(sampling=Sampling(temperature=0, top_logprobs=3), max_tokens=5))])
    tokens = [each for piece in reply.pieces for each in piece.logprobs]
    assert len(tokens) == 5
    assert all(len(each.top) == 3 and each.top[0][1] == pytest.approx(each.logprob) for each in tokens)
    assert b"".join(each.raw for each in tokens).decode(errors="replace") == reply.text
    stop = reply.text[1:3]
    known = Sampling(temperature=0, top_logprobs=0)
    [stopped] = engine.run([engine.prepare(request(sampling=known, max_tokens=5, stops=(stop,)))])
    shown = "".join(each.token for piece in stopped.pieces for each in piece.logprobs)
    assert stop not in shown


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=1), Sampling(temperature=0, top_logprobs=1)])
def test_answers_match_their_schema_even_at_their_limit(engine: Chat, sampling: Sampling) -> None:
    items = [
        engine.prepare(request(text, schema=json.dumps(SCHEMA), sampling=sampling, max_tokens=60)) for text in TEXTS
    ]
    for reply in engine.run(items):
        jsonschema.validate(json.loads(reply.text), SCHEMA)
        assert reply.forced if sampling.top_logprobs is None else not reply.forced


@pytest.mark.parametrize("choice", ["required", "=weather"])
def test_a_call_can_be_required(tmp_path: Path, choice: str) -> None:
    folder = causal_reranker(tmp_path / "model", chat=True)
    edit(folder / "config.json", max_position_embeddings=1024)
    engine = load(folder)
    [reply] = engine.run([engine.prepare(request(tools=TOOLS, tool_choice=choice, max_tokens=60))])
    [call] = reply.calls
    assert (call.name, reply.finish, reply.text) == ("weather", "tool_calls", "")
    assert json.loads(call.arguments)["city"] in ("Seoul", "Busan")


def test_arguments_of_free_calls_match_their_tools_schema(folder: Path, tmp_path: Path) -> None:
    other = causal_reranker(tmp_path / "tools", chat=False)
    edit(other / "tokenizer_config.json", chat_template=CHAT + "{% if tools %}<tool_call>{% endif %}")
    engine = load(other)
    ids = engine.tokenizer.encode('<tool_call>\n{"name": "weather", "arguments": {"city": ', add_special_tokens=False)
    item = engine.prepare(request(tools=TOOLS, max_tokens=80))
    matcher = item.matcher
    assert matcher
    assert matcher.try_consume_tokens(ids) == len(ids)
    wrong = engine.tokenizer.encode('"Tokyo"', add_special_tokens=False)
    assert matcher.try_consume_tokens(wrong) < len(wrong)
    assert item.call_format == "hermes"


@pytest.mark.parametrize(
    ("asked", "field", "said"),
    [
        ({"schema": '{"type": "object", "properties": 3}'}, "response_format", "schema"),
        ({"schema": '{"type": "nonsense"}'}, "response_format", "schema"),
        ({"schema": '{"type": "string", "pattern": "(?=a)b"}'}, "response_format", "schema"),
        ({"schema": json.dumps({"enum": ["x" * 300_000]})}, "response_format", "simplify"),
        ({"sampling": Sampling(logit_bias={10**6: 1.0})}, "logit_bias", "token 1000000"),
    ],
)
def test_what_can_not_be_honoured_is_refused_by_name(
    engine: Chat, asked: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(ItemError, match=said) as refused:
        engine.prepare(request(**asked))
    assert refused.value.field == field


@pytest.mark.parametrize("text", ["yes " * 300, "yes " * 10_000_000])
def test_a_prompt_over_the_context_is_refused_with_both_numbers(engine: Chat, text: str) -> None:
    with pytest.raises(ItemError, match=r"has \d+ \w+, .* 256") as refused:
        engine.prepare(request(text))
    assert refused.value.code == "context_length_exceeded"


def test_texts_are_continued_without_a_template(engine: Chat) -> None:
    text = engine.run([engine.prepare(ChatRequest(prompt="It rains", sampling=GREEDY, max_tokens=6))])[0].text
    ids = engine.tokenizer.encode("It rains")
    assert engine.run([engine.prepare(ChatRequest(prompt=ids, sampling=GREEDY, max_tokens=6))])[0].text == text
    assert engine.run([engine.prepare(ChatRequest(prompt="", sampling=GREEDY, max_tokens=2))])[0].tokens == 2


def test_a_model_without_a_template_only_continues(tmp_path: Path) -> None:
    engine = load(gpt2(tmp_path / "gpt2"))
    engine.warm_up()
    with pytest.raises(ItemError, match="no chat_template"):
        engine.prepare(request())


def test_what_is_no_language_model_is_refused(tmp_path: Path) -> None:
    folder = causal_reranker(tmp_path / "model", chat=True)
    edit(folder / "config.json", architectures=["BertForMaskedLM"])
    with pytest.raises(CheckpointError, match="needs a causal language model"):
        load(folder)


def test_defaults_are_those_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    other = causal_reranker(tmp_path / "model", chat=True)
    path = other / "generation_config.json"
    edit(path, do_sample=True, temperature=0.3, top_k=11)
    item = load(other).prepare(request(sampling=Sampling(top_k=4)))
    assert (item.sampling.temperature, item.sampling.top_k) == (0.3, 4)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1e-39, temperature=1, top_p=0.9),
        Sampling(temperature=1e-30, seed=1),
        Sampling(top_k=1),
    ],
)
def test_extreme_sampling_harms_nobody(engine: Chat, folder: Path, sampling: Sampling) -> None:
    [_, plain] = engine.run([engine.prepare(request(sampling=sampling)), engine.prepare(request())])
    assert plain.text == expected(folder, TEXTS[0], 24)


def test_a_step_that_fails_leaves_all_as_they_were(engine: Chat, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = [engine.begin(engine.prepare(request(text))) for text in TEXTS]
    engine.step(works)
    with monkeypatch.context() as patched:
        patched.setattr("deployments.engines.chat.choose", raises)
        with pytest.raises(MemoryError):
            engine.step(works)
    assert [reply.text for reply in finish(engine, works)] == [expected(folder, text, 24) for text in TEXTS]


def raises(*_: Any) -> None:
    raise MemoryError


def test_an_answer_cut_within_what_its_grammar_forces_says_so(engine: Chat) -> None:
    schema = json.dumps({"const": "a long constant that takes many tokens"})
    [reply] = engine.run([engine.prepare(request(schema=schema, max_tokens=3))])
    assert (reply.finish, reply.tokens) == ("length", 3)


def test_one_call_ends_an_answer_without_parallel_calls(engine: Chat) -> None:
    work = engine.begin(engine.prepare(request(max_tokens=200, parallel_calls=False)))
    work.calls = CallParser("hermes", ["weather"])
    text = '<tool_call>{"name": "weather", "arguments": {}}</tool_call> and more'
    for token in engine.tokenizer.encode(text, add_special_tokens=False):
        if work.result is None:
            work.write(Choice(token))
    assert isinstance(work.result, Reply)
    assert (work.result.text, len(work.result.calls), work.result.finish) == ("", 1, "tool_calls")


def test_a_grammar_that_fails_is_this_answers_alone(engine: Chat) -> None:
    broken = engine.begin(engine.prepare(request(schema=json.dumps(SCHEMA))))
    assert broken.matcher
    broken.matcher.consume_tokens([engine.tokenizer.encode("x", add_special_tokens=False)[0]] * 3)
    other = engine.begin(engine.prepare(request()))
    results = finish(engine, [broken, other])
    assert isinstance(results[0], Refusal)
    assert isinstance(results[1], Reply)
