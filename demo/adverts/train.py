"""Trains in two stages, as LLaVA does: the tower learns to see, then the decoder learns to say what the tower sees."""

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaTokenizer, LlavaForConditionalGeneration, LlavaProcessor

from demo.adverts.cases import Case
from demo.adverts.draw import BACKGROUNDS, COLOURS, Advert
from demo.adverts.model import IMAGE_TOKENS
from demo.adverts.shapes import PRODUCTS
from demo.adverts.tokens import answer_tokens
from serve.services.adverts.verdicts import Validation

log = logging.getLogger(__name__)

IGNORED = -100
QUALITIES = ["good", "blurred", "dark"]
ASPECTS = [len(PRODUCTS), len(COLOURS), len(BACKGROUNDS), len(QUALITIES), 2, 2, 2]
# A few words decide the answer: those that say what is seen and, most of all, true and false. The phrases around them
# are learnt in passing.
SEEN_WEIGHT, VERDICT_WEIGHT = 3.0, 12.0
SEEN = [*PRODUCTS, *COLOURS, *" ".join(BACKGROUNDS).split(), *QUALITIES, "sharp", "easy", "hard", "covers", "leaves",
        "button", "nothing", "something"]  # fmt: skip
VERDICTS = ["true", "false"]
REMINDERS = 16
"""Comparisons added to each batch of whole answers."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: `steps` batches of `batch`, cosine decay from `rate` after a short warm-up."""

    steps: int
    batch: int
    rate: float


def pixels(cases: list[Case], processor: LlavaProcessor) -> Tensor:
    """The drawn and preprocessed images in half precision, shape (cases, 3, side, side)."""
    side = processor.image_processor.crop_size["height"]
    images = torch.empty(len(cases), 3, side, side, dtype=torch.float16)
    for image, case in zip(images, cases, strict=True):
        image.copy_(torch.from_numpy(processor.image_processor(case.image())["pixel_values"][0]))
    return images


def aspects(case: Case) -> list[int]:
    """What the tower should see, one class per entry of `ASPECTS`; those of the lettering only count for adverts."""
    picture, truth = case.picture, case.truth
    seen = [
        list(PRODUCTS).index(picture.product),
        list(COLOURS).index(picture.colour),
        list(BACKGROUNDS).index(picture.background),
        QUALITIES.index(picture.quality),
    ]
    if isinstance(truth, Advert):
        return [*seen, truth.contrast_ok, truth.occlusion, truth.cta_present]
    return [*seen, IGNORED, IGNORED, IGNORED]


def train_tower(
    model: LlavaForConditionalGeneration, cases: list[Case], images: Tensor, schedule: Schedule, seed: int
) -> None:
    """Teach the tower to recognise what is on `images`, with a classifier over its patches that is then discarded."""
    tower = model.model.vision_tower
    layer = model.config.vision_feature_layer
    heads = nn.Linear(tower.config.hidden_size, sum(ASPECTS))
    truths = torch.tensor([aspects(case) for case in cases])

    turns = batches(len(cases), schedule.batch, seed)

    def loss() -> Tensor:
        rows = next(turns)
        seen = tower(images[rows].float(), output_hidden_states=True).hidden_states[layer][:, 1:]
        guesses = heads(F.layer_norm(seen.mean(1), seen.shape[-1:])).float().split(ASPECTS, dim=1)
        losses = [F.cross_entropy(guess, truth) for guess, truth in zip(guesses, truths[rows].T, strict=True)]
        return torch.stack(losses).sum()

    optimise("tower", [*tower.parameters(), *heads.parameters()], loss, schedule)


def train_decoder(
    model: LlavaForConditionalGeneration,
    tokenizer: LlamaTokenizer,
    cases: list[Case],
    images: Tensor,
    comparison: Schedule,
    schedule: Schedule,
    seed: int,
) -> None:
    """Teach projector and decoder to answer. The tower is frozen, and only the answers count.

    Which product the copy offers, and whether two words name the same one, is hard to learn among everything else in
    an answer. So the decoder learns that first, on its own, and is reminded of it in every batch.
    """
    model.model.vision_tower.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = token_weights(tokenizer)
    texts = [answer_tokens(tokenizer, case) for case in cases]
    validations = [
        (case, answer) for case, (_, answer) in zip(cases, texts, strict=True) if isinstance(case.answer, Validation)
    ]
    compare = comparing(model, tokenizer, validations, weights)
    rows = batches(len(validations), comparison.batch, seed)
    optimise("comparison", trained, lambda: compare(next(rows)), comparison)

    turns, reminders = batches(len(cases), schedule.batch, seed), batches(len(validations), REMINDERS, seed)

    def loss() -> Tensor:
        turn = next(turns)
        ids, labels = padded([texts[row] for row in turn], model.config.image_token_id, tokenizer.pad_token_id)
        hidden = model.model(input_ids=ids, pixel_values=images[turn].float()).last_hidden_state[:, :-1]
        answered = labels[:, 1:] != IGNORED
        spoken = F.cross_entropy(model.lm_head(hidden[answered]).float(), labels[:, 1:][answered], weights)
        return spoken + compare(next(reminders))

    optimise("decoder", trained, loss, schedule)


def comparing(
    model: LlavaForConditionalGeneration,
    tokenizer: LlamaTokenizer,
    cases: list[tuple[Case, list[int]]],
    weights: Tensor,
) -> Callable[[list[int]], Tensor]:
    """A loss function over some of the `cases`: for what the answers say the copy offers, and for the first verdict.

    The model gets only the copy and the beginning of the analysis: no image and no question.
    """
    verdicts = set(tokenizer.convert_tokens_to_ids(VERDICTS))
    offers = tokenizer.convert_tokens_to_ids("▁offers")
    ids, labels = [], []
    for case, answer in cases:
        copy = tokenizer.encode(case.prompt.rpartition("Copy: ")[2], add_special_tokens=False)
        end = next(at for at, token in enumerate(answer) if token in verdicts) + 1
        told = len(copy) + answer.index(offers) + 1
        ids.append(copy + answer[:end])
        labels.append([IGNORED] * told + ids[-1][told:])

    def loss(rows: list[int]) -> Tensor:
        given = padding([ids[row] for row in rows], tokenizer.pad_token_id)
        wanted = padding([labels[row] for row in rows], IGNORED)[:, 1:]
        hidden = model.model.language_model(input_ids=given).last_hidden_state[:, :-1]
        said = wanted != IGNORED
        return F.cross_entropy(model.lm_head(hidden[said]).float(), wanted[said], weights)

    return loss


def token_weights(tokenizer: LlamaTokenizer) -> Tensor:
    """The weight of each token of the vocabulary in an answer."""
    weights = torch.ones(len(tokenizer))
    for words, weight in ((SEEN, SEEN_WEIGHT), (VERDICTS, VERDICT_WEIGHT)):
        ids = {tokenizer.convert_tokens_to_ids(mark + word) for word in words for mark in ("▁", "")}
        weights[list(ids - {tokenizer.unk_token_id})] = weight
    return weights


def padded(texts: list[tuple[list[int], list[int]]], image_id: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids with `<image>` repeated for each image token, and labels that leave out the questions."""
    ids, labels = [], []
    for asked, answer in texts:
        at = asked.index(image_id)
        question = [*asked[:at], *[image_id] * IMAGE_TOKENS, *asked[at + 1 :]]
        ids.append(question + answer)
        labels.append([IGNORED] * len(question) + answer)
    return padding(ids, pad_id), padding(labels, IGNORED)


def padding(rows: list[list[int]], filler: int) -> Tensor:
    """The rows, padded at their ends to the length of the longest."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler)


def batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yield `size` of `count` rows at a time, shuffled anew in each epoch."""
    rng = random.Random(seed)
    rows: list[int] = []
    while True:
        if len(rows) < size:
            rows = rng.sample(range(count), count)
        yield [rows.pop() for _ in range(size)]


def optimise(name: str, parameters: list[nn.Parameter], loss: Callable[[], Tensor], schedule: Schedule) -> None:
    """Minimise `loss` by `schedule`, in bfloat16 where that is safe. Each call of `loss` takes the next batch."""
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, schedule.rate, schedule.steps, pct_start=0.05)
    started, recent = time.monotonic(), []
    for step in range(1, schedule.steps + 1):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        optimiser.zero_grad()
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        rate.step()
        recent.append(value.item())
        if step % 100 == 0:
            took = time.monotonic() - started
            log.info("%s %d/%d loss %.3f, %.0f s", name, step, schedule.steps, np.mean(recent), took)
            recent.clear()
