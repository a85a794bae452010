"""Trains the demo cross-encoder from scratch and writes its checkpoint: `python -m demo.rerank.make`."""

import argparse
import math
import shutil
import time
from itertools import islice
from pathlib import Path

import torch
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from demo.rerank.check import heldout
from demo.rerank.pairs import Case, write_cases
from demo.rerank.tokens import POSITIONS, train_tokenizer

CHECKPOINT = Path(__file__).parent / "checkpoint"
SEED = 20240607
GROUP = 6  # documents per query in training
QUERIES = 24  # per step
PARTS = 3  # batches per step, each of similar lengths
STEPS = 2000
REPORT = 100  # steps
PEAK = 2e-3
SHARD = "450KB"
FAST_BF16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))  # without it, bf16 is slower than fp32


def build(vocabulary: int) -> BertForSequenceClassification:
    """An untrained encoder whose first layers already find, for each token, the same token in the other text.

    Query and key share one rotation, so equal tokens attend to each other. The key mirrors the direction that tells
    the two texts apart, so a token attends to its equal in the other text more than to itself. Learning to compare
    words from scratch would take most of the training.
    """
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
        pad_token_id=0,
    )
    config.num_labels = 1
    model = BertForSequenceClassification._from_config(config, attn_implementation="eager")  # the fastest to train here
    side = torch.sign(torch.randn(config.hidden_size))
    mirror = torch.eye(config.hidden_size) - 2 * torch.outer(side, side) / config.hidden_size
    with torch.no_grad():
        embeddings = model.bert.embeddings
        embeddings.position_embeddings.weight.mul_(0.3)
        embeddings.token_type_embeddings.weight.copy_(torch.stack([side, -side]) * 0.03)
        for layer in model.bert.encoder.layer[:2]:
            attention = layer.attention.self
            torch.nn.init.orthogonal_(attention.query.weight, gain=1.3)
            attention.key.weight.copy_(attention.query.weight @ mirror)
    return model


def logits_of(model: BertForSequenceClassification, tokenizer: BertTokenizer, cases: list[Case]) -> torch.Tensor:
    """One logit per case and document. Pairs of similar length share a batch, to save padding."""
    queries = [case.query for case in cases for _ in case.documents]
    documents = [document for case in cases for document in case.documents]
    tokens = tokenizer(queries, documents, truncation=True)
    order = torch.tensor([len(ids) for ids in tokens["input_ids"]]).argsort()
    logits = []
    with torch.autocast("cpu", torch.bfloat16, enabled=FAST_BF16):
        for part in order.chunk(PARTS):
            batch = tokenizer.pad({name: [rows[i] for i in part] for name, rows in tokens.items()}, return_tensors="pt")
            logits.append(model(**batch).logits[:, 0])
    return torch.cat(logits).float()[order.argsort()].view(len(cases), -1)


def loss_of(logits: torch.Tensor, nearness: torch.Tensor) -> torch.Tensor:
    """Loss for the relevant document not being first for its query, and for scores that differ from nearness."""
    first = functional.cross_entropy(logits, nearness.argmax(dim=1))
    return first + functional.binary_cross_entropy_with_logits(logits, 0.03 + 0.94 * nearness)


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short rise, then a cosine down to zero."""
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(model: BertForSequenceClassification, tokenizer: BertTokenizer, steps: int) -> None:
    """Train on cases that share no text with the held-out ones."""
    held = {text for case in heldout() for text in (case.query, *case.documents)}
    cases = (case for case in write_cases(SEED, "training", GROUP) if held.isdisjoint((case.query, *case.documents)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, steps))
    model.train()
    hits, losses, began = 0, 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        batch = list(islice(cases, QUERIES))
        nearness = torch.tensor([case.nearness for case in batch])
        logits = logits_of(model, tokenizer, batch)
        loss = loss_of(logits, nearness)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses += loss.item()
        hits += int((logits.argmax(dim=1) == nearness.argmax(dim=1)).sum())
        if step % REPORT == 0:
            first = hits / REPORT / QUERIES
            seconds = time.perf_counter() - began
            print(f"step {step}: loss {losses / REPORT:.3f}, first {first:.3f}, {seconds:.0f} s", flush=True)
            hits, losses = 0, 0.0


def main() -> None:
    """Train the model and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer()
    model = build(len(tokenizer))
    print(f"{len(tokenizer)} pieces, {model.num_parameters()} parameters")
    train(model, tokenizer, steps)
    shutil.rmtree(CHECKPOINT, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(CHECKPOINT, max_shard_size=SHARD)
    tokenizer.save_pretrained(CHECKPOINT)


if __name__ == "__main__":
    main()
