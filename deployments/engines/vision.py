"""LLaVA, which looks at an image and answers in JSON that obeys a schema."""

from __future__ import annotations

import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import AutoProcessor, LlavaForConditionalGeneration, LogitsProcessor, ProcessorMixin

from deployments.items import Answer, Question
from deployments.loading import load_model
from deployments.progress import LoadProgress
from deployments.spec import CheckpointError, Facts, ItemError, ModelSpec, Refusal

CONVERSATION = "USER: <image>\n{prompt} ASSISTANT:"
"""LLaVA 1.5's, https://huggingface.co/llava-hf/llava-1.5-7b-hf."""
MAX_ANSWER_TOKENS = 512
MAX_ASPECT = 50
"""The processor first scales an image's shorter side up to the tower's; a thin line would become gigabytes."""
COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}


@dataclass(frozen=True)
class Seen:
    """An item: the prompt's ids with the image's places among them, the image's pixels, and the answer's grammar."""

    ids: list[int]
    pixels: torch.Tensor
    grammar: str


class Vision:
    """Greedy decoding under a grammar made from the schema, so even a bad model answers in the schema."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: ProcessorMixin, facts: Facts) -> None:
        self.model = model
        self.processor = processor
        self.facts = facts
        self.tokenizer = processor.tokenizer
        self.eos: int = self.tokenizer.eos_token_id
        self.grammar_tokens = llguidance.hf.from_tokenizer(self.tokenizer)
        self.specials = [token for token in self.tokenizer.all_special_tokens if token.strip()]
        self.specials += [processor.image_token]

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Vision:
        progress.tokenizer()
        try:
            processor = AutoProcessor.from_pretrained(folder, backend="pil")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the processor in {folder} can't be read: {error}") from error
        build = functools.partial(LlavaForConditionalGeneration.from_pretrained, folder)
        model, facts = load_model(build, folder, spec.precision, progress, quantise=True)
        return cls(model, processor, facts)

    def warm_up(self) -> None:
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), "white").save(picture, "PNG")
        schema = json.dumps({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]})
        self.run([self.prepare(Question(picture.getvalue(), "Is it white?", schema))])

    def prepare(self, request: Question) -> Seen:
        image = _read(request.image)
        prompt = request.prompt
        for special in self.specials:
            prompt = prompt.replace(special, special[0] + " " + special[1:])
        seen = self.processor(text=CONVERSATION.format(prompt=prompt), images=image, return_tensors="pt")
        room = self.model.config.text_config.max_position_embeddings - MAX_ANSWER_TOKENS
        ids: list[int] = seen["input_ids"][0].tolist()
        if len(ids) > room:
            raise ItemError(
                f"the prompt has {len(ids)} tokens with the image, more than {room}; shorten the text", "prompt"
            )
        return Seen(ids, seen["pixel_values"][0], _grammar(request.schema))

    def cost(self, item: Seen) -> int:
        return len(item.ids)

    @torch.inference_mode()
    def run(self, items: list[Seen]) -> list[Answer | Refusal]:
        longest = max(len(item.ids) for item in items)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos
        ids = torch.tensor([[pad] * (longest - len(item.ids)) + item.ids for item in items])
        mask = torch.tensor([[0] * (longest - len(item.ids)) + [1] * len(item.ids) for item in items])
        device = self.model.device
        written = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pixel_values=torch.stack([item.pixels for item in items]).to(device, self.model.dtype),
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=self.eos,
            logits_processor=[Constraint([LLMatcher(self.grammar_tokens, item.grammar) for item in items], self.eos)],
        )[:, longest:]
        return [self._answer(row[row != pad].tolist()) for row in written]

    def _answer(self, ids: list[int]) -> Answer | Refusal:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        try:
            json.loads(text)
        except ValueError:
            return Refusal(f"the answer did not end within {MAX_ANSWER_TOKENS} tokens", "failed")
        return Answer(text, len(ids))


class Constraint(LogitsProcessor):  # type: ignore[misc]
    """Lets each row go on only with tokens that its grammar allows, and ends it when its grammar ends."""

    def __init__(self, matchers: list[LLMatcher], eos: int) -> None:
        self.matchers = matchers
        self.eos = eos
        self.started = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.started:
            for matcher, token in zip(self.matchers, input_ids[:, -1].tolist(), strict=True):
                if not matcher.is_stopped():
                    matcher.consume_token(token)
        self.started = True
        allowed = np.zeros(scores.shape, dtype=bool)
        for row, matcher in enumerate(self.matchers):
            if matcher.is_stopped():
                allowed[row, self.eos] = True
                continue
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            width = min(bits.size, scores.shape[1])
            allowed[row, :width] = bits[:width]
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)


def _read(encoded: bytes) -> Image.Image:
    """The image the right way up, in 8-bit RGB. Raises ItemError for what can't be read or is too thin to scale."""
    try:
        image = Image.open(io.BytesIO(encoded))
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ItemError(
                f"the image is {image.width}x{image.height}; crop it, one side is over {MAX_ASPECT} times the other"
            )
        return _eight_bit(ImageOps.exif_transpose(image)).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, OverflowError, MemoryError) as error:
        raise ItemError(f"the image can't be read ({error}); send PNG, JPEG or WebP") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """Images of more than 8 bits a channel scaled to 8, where Pillow's own conversion would cut them off at white."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    full = 65535 if image.mode.startswith("I;16") or values.max() > 255 else 255 if values.max() > 1 else 1
    return Image.fromarray((values / full * 255).clip(0, 255).astype(np.uint8))


@functools.lru_cache(maxsize=64)
def _grammar(schema: str) -> str:
    return str(LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT))
