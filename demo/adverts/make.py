"""Trains the vision model's demo checkpoint from scratch: `python -m demo.adverts.make`."""

import logging
import random
import time

import torch

from demo.adverts.cases import stage1, stage2
from demo.adverts.model import VOCABULARY, build_model, build_processor, save
from demo.adverts.tokens import conversation, train_tokenizer
from demo.adverts.train import Schedule, pixels, train_decoder, train_tower

SEED = 1
CASES = 16_000
TOWER = Schedule(steps=3500, batch=32, rate=1.5e-3)
COMPARISON = Schedule(steps=250, batch=128, rate=1e-3)
DECODER = Schedule(steps=850, batch=32, rate=2e-3)

log = logging.getLogger(__name__)


def main() -> None:
    """Draw the cases, train the model and write `checkpoint/`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    started = time.monotonic()
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    cases = [stage(rng) for _ in range(CASES // 2) for stage in (stage1, stage2)]
    texts = [text for case in cases for text in (conversation(case.prompt), case.answer.model_dump_json())]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    processor = build_processor(tokenizer)
    model = build_model(tokenizer)
    model.set_attn_implementation("eager")  # the faster one to train with on a CPU
    images = pixels(cases, processor)
    log.info("%d cases drawn, %d parameters, %.0f s", CASES, model.num_parameters(), time.monotonic() - started)
    train_tower(model, cases, images, TOWER, SEED)
    train_decoder(model, tokenizer, cases, images, COMPARISON, DECODER, SEED)
    save(model, processor)
    log.info("done in %.0f s", time.monotonic() - started)


if __name__ == "__main__":
    main()
