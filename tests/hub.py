"""Writes a hub cache with the models of configs/gpu.yaml and configs/examples, without tokenizers or weights.

Configs are real. Weight files have the real headers and sizes but are sparse, so they take almost no disk space.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

from deployments.checkpoints.outline import write_holes

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def llava(width: int, inner: int, layers: int, heads: int) -> Any:
    tower = CLIPVisionConfig(
        image_size=336,
        patch_size=14,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32_064,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=text, image_seq_length=576))


def mini_lm(kind: Any, **more: Any) -> Any:
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return kind(BertConfig(vocab_size=30_522, **shape, **more))


def xlm_roberta(kind: Any, width: int, layers: int, positions: int = 514, **more: Any) -> Any:
    shape = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    heads = {"num_attention_heads": width // 64, "max_position_embeddings": positions, "type_vocab_size": 1}
    return kind(XLMRobertaConfig(vocab_size=250_002, **shape, **heads, **more))


MODELS = {
    "skt/kogpt2-base-v2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=51_200)),
    "llava-hf/llava-1.5-7b-hf": lambda: llava(4096, 11_008, 32, 32),
    "llava-hf/llava-1.5-13b-hf": lambda: llava(5120, 13_824, 40, 40),
    "sentence-transformers/all-MiniLM-L6-v2": lambda: mini_lm(BertModel),
    "cross-encoder/ms-marco-MiniLM-L6-v2": lambda: mini_lm(BertForSequenceClassification, num_labels=1),
    "jhgan/ko-sroberta-multitask": lambda: RobertaModel(
        RobertaConfig(vocab_size=32_000, max_position_embeddings=514, type_vocab_size=1)
    ),
    "intfloat/multilingual-e5-base": lambda: xlm_roberta(XLMRobertaModel, 768, 12),
    "intfloat/multilingual-e5-large": lambda: xlm_roberta(XLMRobertaModel, 1024, 24),
    "BAAI/bge-reranker-base": lambda: xlm_roberta(XLMRobertaForSequenceClassification, 768, 12, num_labels=1),
    "BAAI/bge-reranker-v2-m3": lambda: xlm_roberta(XLMRobertaForSequenceClassification, 1024, 24, 8194, num_labels=1),
}


def write_cache(folder: Path) -> None:
    for name, build in MODELS.items():
        repository = folder / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(COMMIT, encoding="utf-8")
        with torch.device("meta"):
            model = build()
        model.config.save_pretrained(snapshot)
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        write_holes(snapshot / "model.safetensors", header(shapes))


def header(shapes: dict[str, list[int]]) -> dict[str, Any]:
    """Header of a safetensors file of 16-bit tensors."""
    tensors: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        tensors[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    return tensors
