"""Predictions that are asked of a model as seldom as possible."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest

from deployments.messages import Prompt, Word
from serve import errors
from serve.caller import Caller
from serve.calls.cache import MemoryCache
from serve.calls.next_words import Predictions
from serve.errors import DureError


@dataclass
class Watch:
    now: str | None = "one"

    def version(self, model: str) -> str | None:
        return self.now


@dataclass
class Model:
    """Says who answered; holds its answers back until `go`."""

    name: str = "m"
    watch: Watch = field(default_factory=Watch)
    asked: list[Prompt] = field(default_factory=list)
    cancelled: int = 0
    fails: bool = False
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def results(self, requests: list[Prompt], caller: Caller, param: str) -> list[list[Word]]:
        self.asked += requests
        told = str(self.watch.now)
        try:
            async with asyncio.timeout(caller.left_s()):
                await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        except TimeoutError as error:
            raise errors.too_late(self.name, caller.timeout_s) from error
        if self.fails:
            raise errors.internal()
        return [[Word(told, f" {told}", 0.5)]]


def run(scenario: Callable[[Predictions, Any], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await scenario(Predictions(MemoryCache(60, 10**6)), Model())

    asyncio.run(asyncio.wait_for(main(), 10))


def ask(predictions: Predictions, model: Any, **prompt: Any) -> asyncio.Task[bytes]:
    return asyncio.ensure_future(predictions.of(model, Prompt(**{"text": "a", **prompt}), Caller.waiting(5)))


def text(answer: bytes) -> str:
    word: str = orjson.loads(answer)[0]["text"]
    return word


def test_the_same_is_worked_out_once_however_many_ask_at_once() -> None:
    async def scenario(predictions: Predictions, model: Model) -> None:
        asking = [ask(predictions, model) for _ in range(20)]
        other = ask(predictions, model, top_k=3)
        await asyncio.sleep(0.01)
        model.go.set()
        assert {text(answer) for answer in await asyncio.gather(*asking, other)} == {"one"}
        assert [prompt.top_k for prompt in model.asked] == [5, 3]
        await ask(predictions, model)
        assert len(model.asked) == 2, "it is kept"

    run(scenario)


@pytest.mark.parametrize(
    "other", [{"text": "a "}, {"top_k": 4}, {"temperature": 0.7}, {"complete_word": False}], ids=str
)
def test_whatever_is_asked_otherwise_is_another_question(other: dict[str, Any]) -> None:
    async def scenario(predictions: Predictions, model: Model) -> None:
        model.go.set()
        await ask(predictions, model)
        await ask(predictions, model, **other)
        assert len(model.asked) == 2

    run(scenario)


def test_it_is_worked_out_as_long_as_anybody_waits_for_it() -> None:
    async def scenario(predictions: Predictions, model: Model) -> None:
        first, second = ask(predictions, model), ask(predictions, model)
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.01)
        assert model.cancelled == 0
        second.cancel()
        await asyncio.sleep(0.01)
        assert model.cancelled == 1
        third = ask(predictions, model)
        await asyncio.sleep(0.01)
        model.go.set()
        assert text(await third) == "one"

    run(scenario)


def test_a_failure_is_told_to_all_and_not_kept() -> None:
    async def scenario(predictions: Predictions, model: Model) -> None:
        model.fails = True
        model.go.set()
        answers = await asyncio.gather(*(ask(predictions, model) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(answer, DureError) for answer in answers)
        model.fails = False
        assert text(await ask(predictions, model)) == "one"

    run(scenario)


def test_a_model_that_was_loaded_anew_answers_for_itself() -> None:
    async def scenario(predictions: Predictions, model: Model) -> None:
        model.go.set()
        await ask(predictions, model)
        model.watch.now = "two"
        assert text(await ask(predictions, model)) == "two"
        model.watch.now = None  # while its replicas differ
        await ask(predictions, model)
        await ask(predictions, model)
        assert len(model.asked) == 4

    run(scenario)


def test_an_answer_during_which_the_model_changed_is_not_kept() -> None:
    async def scenario(predictions: Predictions, model: Model) -> None:
        asking = ask(predictions, model)
        await asyncio.sleep(0.01)
        model.watch.now = "two"
        model.go.set()
        await asking
        model.watch.now = "one"
        await ask(predictions, model)
        assert len(model.asked) == 2

    run(scenario)


def test_who_joins_has_a_deadline_of_their_own() -> None:
    async def scenario(predictions: Predictions, model: Model) -> None:
        first = asyncio.ensure_future(predictions.of(model, Prompt("a"), Caller.waiting(0.1)))
        await asyncio.sleep(0.01)
        patient = ask(predictions, model)
        hasty = asyncio.ensure_future(predictions.of(model, Prompt("a"), Caller.waiting(0.02)))
        for late in (hasty, first):
            with pytest.raises(DureError) as caught:
                await late
            assert caught.value.status == 504
        model.go.set()
        assert text(await patient) == "one"
        assert len(model.asked) <= 2

    run(scenario)
