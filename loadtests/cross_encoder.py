"""A cross-encoder of the shape of cross-encoder/ms-marco-MiniLM-L6-v2: a trained encoder under a seeded random head.

Its scores mean nothing, but it costs as much as the trained one and has similar rounding errors, and no weights have
to be fetched. A model of random weights throughout rounds worse than any trained one: in bf16 it ranks another document
first for one query in eight, which no quality gate should let pass.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from loadtests.load import texts

SEED = 2
SCORE_STD = 1.5
"""Standard deviation of the logits of random pairs; a sigmoid still tells them apart."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def write_checkpoint(folder: Path, encoder: Path) -> None:
    """Write weights, config and tokenizer in the hub's layout; the encoder comes from the folder `encoder`."""
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = BertForSequenceClassification.from_pretrained(encoder, num_labels=1, dtype=torch.float32).eval()
    queries = [f"what is said about case {number}" for number in range(256)]
    pairs = tokenizer(queries, texts(256, 12, 60, SEED), padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**pairs).logits
        scale = SCORE_STD / logits.std()
        model.classifier.weight.mul_(scale)
        model.classifier.bias.copy_(-logits.mean() * scale)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(encoder / name, folder)
