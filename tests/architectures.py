"""Builds tiny encoders of many architectures with random weights, most with MiniLM's tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.checkpoints import MINILM, edit

WORDS = 30522
SIZES: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
}  # fmt: skip
RANGE: dict[str, Any] = {"initializer_range": 0.2, "pad_token_id": 0}
BERT: dict[str, Any] = SIZES | RANGE | {"vocab_size": WORDS, "max_position_embeddings": 512}
XLNET: dict[str, Any] = RANGE | {"vocab_size": WORDS, "d_model": 48, "n_head": 4, "d_inner": 96}
REFORMER: dict[str, Any] = RANGE | {
    "vocab_size": WORDS, "hidden_size": 48, "num_attention_heads": 4, "attention_head_size": 12,
    "feed_forward_size": 96, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 32], "num_buckets": 8,
    "attn_layers": ["local", "lsh"], "max_position_embeddings": 512, "is_decoder": False, "hash_seed": 7,
}  # fmt: skip
FNET = {key: value for key, value in BERT.items() if key != "num_attention_heads"}

Build = Callable[[], hf.PreTrainedModel]

HEED_THEIR_MASKS: dict[str, Build] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**BERT)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**BERT | {"max_position_embeddings": 514, "pad_token_id": 1})),
    "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**BERT | {"max_position_embeddings": 514})),
    "modernbert": lambda: modernbert(16),
    "longformer": lambda: hf.LongformerModel(
        hf.LongformerConfig(**BERT | {"max_position_embeddings": 1026, "attention_window": 32, "pad_token_id": 1})
    ),
    "bigbird": lambda: hf.BigBirdModel(hf.BigBirdConfig(**BERT, block_size=8, num_random_blocks=2)),
    "xlnet": lambda: hf.XLNetModel(hf.XLNetConfig(**XLNET, n_layer=2)),
}
FEEL_THE_PADDING: dict[str, Build] = {
    "convbert": lambda: hf.ConvBertModel(hf.ConvBertConfig(**BERT, embedding_size=48)),
    "fnet": lambda: hf.FNetModel(hf.FNetConfig(**FNET)),
    "yoso": lambda: hf.YosoModel(hf.YosoConfig(**BERT | {"max_position_embeddings": 514})),
    "nystromformer": lambda: hf.NystromformerModel(hf.NystromformerConfig(**BERT)),
    "reformer": lambda: hf.ReformerModel(hf.ReformerConfig(**REFORMER)),
    "funnel": lambda: hf.FunnelModel(
        hf.FunnelConfig(**XLNET, d_head=12, block_sizes=[1, 1], block_repeats=[1, 1], num_decoder_layers=1)
    ),
}


def modernbert(window: int, positions: int = 512) -> hf.PreTrainedModel:
    """A ModernBERT whose local layers attend within `window` tokens."""
    layers = {"local_attention": window, "global_attn_every_n_layers": 2, "max_position_embeddings": positions}
    specials = {"cls_token_id": 101, "sep_token_id": 102, "bos_token_id": 101, "eos_token_id": 102}
    return hf.ModernBertModel(hf.ModernBertConfig(**BERT | layers | specials))


def scoring_convbert() -> hf.PreTrainedModel:
    return hf.ConvBertForSequenceClassification(hf.ConvBertConfig(**BERT, embedding_size=48, num_labels=1))


def save(folder: Path, build: Build, limit: int = 500, **tokenizer: Any) -> Path:
    """Save the model, which takes up to `limit` tokens, with MiniLM's tokenizer."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINILM / name, folder)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    edit(folder / "tokenizer_config.json", **told, model_max_length=limit, **tokenizer)
    torch.manual_seed(11)
    build().save_pretrained(folder)
    return folder


def canine(folder: Path) -> Path:
    """A model of characters, without a tokenizer in Rust or a table of embeddings."""
    hf.CanineTokenizer(model_max_length=500).save_pretrained(folder)
    torch.manual_seed(11)
    hf.CanineModel(hf.CanineConfig(**SIZES, initializer_range=0.2, max_position_embeddings=512)).save_pretrained(folder)
    return folder
