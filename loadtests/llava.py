"""Checkpoints of LLaVA 1.5's form with seeded random weights, which cost as much as trained ones.

The tokenizer is of Llama's kind. It is trained on the README, so that the names of a verdict's fields take several
tokens as they do in Llama, and filled up to Llama's size with made-up strings. A fixed share of these ends a sentence
and the JSON string around it, so that answers have natural lengths. Otherwise the answers mean nothing.
"""

from __future__ import annotations

import random
import shutil
import string
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from demo.adverts.tokens import train_tokenizer
from loadtests.load import WORDS_FILE
from loadtests.servers import ROOT

VOCABULARY = 32_064
LEARNT = 3_000
END_SHARE, SPACE_SHARE = 0.03, 0.5
SIDE, PATCH = 336, 14
SEED = 5
STD = 0.02
CHAT = (
    "{% for message in messages %}{% if message.role == 'user' %}USER: "
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %} ASSISTANT:"
)
"""LLaVA 1.5's chat template, for servers that read it from the checkpoint."""


@dataclass(frozen=True)
class Shape:
    width: int
    inner: int
    layers: int
    heads: int
    tower_width: int
    tower_layers: int
    tower_heads: int


SHAPES = {
    "0.5b": Shape(1280, 3456, 20, 20, 384, 12, 6),
    "7b": Shape(4096, 11008, 32, 32, 1024, 24, 16),
    "13b": Shape(5120, 13824, 40, 40, 1024, 24, 16),
}
"""The last two are LLaVA 1.5's own."""


def write_checkpoint(folder: Path, size: str, device: str = "cpu") -> Path:
    """Write weights in half precision, tokenizer and processor, unless they are there. Returns the folder."""
    if (folder / "written").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = _tokenizer()
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        torch.set_default_dtype(torch.float16)
        try:
            model = LlavaForConditionalGeneration(_config(SHAPES[size], tokenizer))
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.inference_mode():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.empty_like(parameter, dtype=torch.float32).normal_(0, STD))
    model.save_pretrained(folder, max_shard_size="2GB")
    processor.save_pretrained(folder)
    (folder / "written").touch()
    return folder


def _config(shape: Shape, tokenizer: LlamaTokenizer) -> LlavaConfig:
    vision = CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=shape.tower_width,
        intermediate_size=4 * shape.tower_width,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=(SIDE // PATCH) ** 2,
    )


def _tokenizer() -> LlamaTokenizer:
    draw = random.Random(SEED)
    texts = [(ROOT / "README.md").read_text(encoding="utf-8"), WORDS_FILE.read_text(encoding="utf-8")]
    tokenizer = train_tokenizer((line for text in texts for line in text.splitlines()), LEARNT)
    known = set(tokenizer.get_vocab())
    fillers: list[str] = []
    while len(fillers) < VOCABULARY - len(tokenizer):
        letters = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(4, 7)))
        filler = (" " if draw.random() < SPACE_SHARE else "") + letters + ('."' if draw.random() < END_SHARE else "")
        if filler not in known:
            known.add(filler)
            fillers.append(filler)
    tokenizer.add_tokens([AddedToken(filler, normalized=False) for filler in fillers])
    tokenizer.model_max_length = 4096
    return tokenizer
