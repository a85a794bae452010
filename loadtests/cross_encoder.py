"""A cross-encoder of the shape of cross-encoder/ms-marco-MiniLM-L6-v2 with seeded random weights.

What it says means nothing, but it costs what the trained one costs, and no weights have to be fetched.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from loadtests.load import texts

SEED = 2
LINEAR_STD = 0.08
"""BERT's own 0.02 gives nearly the same score to every pair."""
SCORE_STD = 1.5
"""Of the logits of random pairs; a sigmoid still tells them apart."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def write_checkpoint(folder: Path, tokenizer_folder: Path) -> None:
    """Write weights, config and tokenizer in the hub's layout."""
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=1,
        initializer_range=LINEAR_STD,
    )
    model = BertForSequenceClassification(config).eval()
    queries = [f"what is said about case {number}" for number in range(256)]
    pairs = tokenizer(queries, texts(256, 12, 60, SEED), padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**pairs).logits
        scale = SCORE_STD / logits.std()
        model.classifier.weight.mul_(scale)
        model.classifier.bias.copy_(-logits.mean() * scale)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_folder / name, folder)
