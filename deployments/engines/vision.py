"""LLaVA: looks at an image and answers in JSON that matches a schema."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher
from PIL import Image
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    ProcessorMixin,
)

from deployments.checkpoints.loading import Placement, load_model
from deployments.engines.contract import Stepping
from deployments.engines.grammar import COMPACT, Closing, Writing, choose
from deployments.engines.prefix_cache import Prefixes
from deployments.engines.sequences import Reader, Turn
from deployments.images import decode
from deployments.load_progress import LoadProgress
from deployments.messages import Answer, Question, Refusal
from deployments.spec import CheckpointError, Facts, ItemError, ModelSpec, first_line

CONVERSATION = "USER: <image>\n{prompt} ASSISTANT:"
"""LLaVA 1.5's prompt template, https://huggingface.co/llava-hf/llava-1.5-7b-hf."""
MAX_ANSWER_TOKENS = 512


@dataclass(frozen=True)
class Seen:
    """An item: the prompt's ids, including the image's, the image's pixels, and the answer's grammar."""

    ids: list[int]
    key: list[int]
    """`ids` with a number unique to the image in place of its tokens, so that equal keys mean equal images, too."""
    pixels: torch.Tensor
    grammar: str
    tenant: str


class Look:
    """The work on one item."""

    def __init__(self, item: Seen) -> None:
        self.item = item
        self.writing: Writing | None = None
        self.steps = 0
        self.result: Answer | Refusal | None = None

    @property
    def cost(self) -> int:
        """Tokens that the next step reads."""
        return len(self.writing.to_read) if self.writing else len(self.item.ids)

    @property
    def written(self) -> int:
        return len(self.writing.written) if self.writing else 0


class Vision(Stepping[Question, Seen, Look]):
    """Greedy decoding under a grammar made from the schema.

    In one pass, a step reads new images and prompts, and the last written tokens of other answers. Recent prompts stay
    in the prefix cache: if the image is the same and the text differs, only the text is read.
    """

    checks_files = True

    def __init__(
        self, model: LlavaForConditionalGeneration, processor: ProcessorMixin, facts: Facts, prefix_bytes: int
    ) -> None:
        self.model = model
        self.processor = processor
        self.facts = facts
        self.tokenizer = processor.tokenizer
        self.eos: int = self.tokenizer.eos_token_id
        self.grammar_tokens = llguidance.hf.from_tokenizer(self.tokenizer)
        self.specials = [token for token in self.tokenizer.all_special_tokens if token.strip()]
        self.specials += [processor.image_token]
        self.image_id: int = model.config.image_token_id
        self.closing = Closing(self.tokenizer)
        self.rows: int = model.get_input_embeddings().num_embeddings
        self.longest_token = max(map(len, self.tokenizer.get_vocab()))
        self.reader = Reader(model)
        self.room = self.reader.max_tokens - MAX_ANSWER_TOKENS
        """Most tokens of a prompt, including its image's."""
        self.device = self.reader.device
        self.prefixes = Prefixes(prefix_bytes)

    @classmethod
    def load(cls, spec: ModelSpec, folder: Path, progress: LoadProgress) -> Vision:
        progress.tokenizer()
        processor = _processor(folder)
        build = functools.partial(LlavaForConditionalGeneration.from_pretrained, folder)
        placement = Placement(spec.device_map, spec.max_memory)
        probe = functools.partial(_probed, processor)
        model, facts = load_model(build, folder, spec.precision, progress, probe, quantise=True, placement=placement)
        engine = cls(model, processor, facts, int(spec.prefix_cache_mb * 2**20))
        engine._require_whole_images(folder)
        return engine

    def warm_up(self) -> None:
        self.run([self._example()])

    def _example(self) -> Seen:
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), "white").save(picture, "PNG")
        schema = json.dumps({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]})
        return self.prepare(Question(picture.getvalue(), "Is it white?", schema))

    @torch.inference_mode()
    def _require_whole_images(self, folder: Path) -> None:
        """Raises CheckpointError if the prompt has no place for some of an image, or for more than there is of it."""
        if self.room <= 0:
            raise CheckpointError(f"the model in {folder} has no positions beside the {MAX_ANSWER_TOKENS} of an answer")
        example = self._example()
        [image] = self._images([self.begin(example)])
        if (tokens := example.ids.count(self.image_id)) != len(image):
            raise CheckpointError(
                f"the model in {folder} makes {len(image)} features of an image, but its processor {tokens} tokens; "
                "image_token_index, patch_size, num_additional_image_tokens and vision_feature_select_strategy of "
                "config.json and processor_config.json have to agree"
            )

    def prepare(self, request: Question) -> Seen:
        image = decode(request.image)
        prompt = request.prompt
        if len(prompt) > self.room * self.longest_token:  # certainly too long, so don't tokenise it
            raise ItemError(f"the prompt has more than {self.room} tokens; shorten the text", "prompt")
        for special in self.specials:
            prompt = prompt.replace(special, special[0] + " " + special[1:])
        seen = self.processor(text=CONVERSATION.format(prompt=prompt), images=image, return_tensors="pt")
        ids: list[int] = seen["input_ids"][0].tolist()
        if len(ids) > self.room:
            raise ItemError(
                f"the prompt has {len(ids)} tokens, image included, and the limit is {self.room}; shorten the text",
                "prompt",
            )
        unknown = next((id for id in ids if id >= self.rows and id != self.image_id), None)
        if unknown is not None:
            token = self.tokenizer.convert_ids_to_tokens(unknown)
            raise ItemError(
                f"token {token!r} has id {unknown}, for which the checkpoint has no embedding: there are {self.rows}",
                "prompt",
            )
        own = -int.from_bytes(hashlib.sha256(request.image).digest()) - 1
        key = [own if id == self.image_id else id for id in ids]
        return Seen(ids, key, seen["pixel_values"][0], _grammar(request.schema), request.tenant)

    def cost(self, item: Seen) -> int:
        return len(item.ids)

    def begin(self, item: Seen) -> Look:
        return Look(item)

    @torch.inference_mode()
    def step(self, works: list[Look]) -> None:
        begun = [look for look in works if look.writing is None]
        try:
            started = dict(zip(begun, self._start(begun), strict=True))
            writings, turns = zip(*(started.get(look) or self._turn(look) for look in works), strict=True)
            hidden = self.reader.read(turns)
            last = np.cumsum([len(turn.ids) for turn in turns]) - 1
            chosen = choose(self.reader.logits(hidden[last]), writings, self.closing)
        except Exception:  # perhaps out of memory
            self.prefixes.clear()
            raise
        # Works change only from here on, so a step that ran out of memory can be repeated.
        for look, writing, turn, token in zip(works, writings, turns, chosen, strict=True):
            turn.sequence.length += len(turn.ids)
            if look in started:
                self.prefixes.keep(look.item.tenant, look.item.key, turn.sequence)
            writing.write(token)
            look.writing = writing
            look.steps += 1
            if writing.ended or writing.is_full:
                look.result = self._answer(look, writing)

    def _start(self, looks: list[Look]) -> list[tuple[Writing, Turn]]:
        """First turns: each reads the prompt with the image in it, and the tokens that the grammar forces first."""
        sequences = [self.prefixes.sequence(look.item.tenant, look.item.key) for look in looks]
        unseen = [
            look
            for look, sequence in zip(looks, sequences, strict=True)
            if self.image_id in look.item.ids[sequence.length :]
        ]
        images = dict(zip(unseen, self._images(unseen), strict=True))
        embed = self.model.get_input_embeddings()
        started = []
        for look, sequence in zip(looks, sequences, strict=True):
            matcher = LLMatcher(self.grammar_tokens, look.item.grammar)
            writing = Writing(sequence, matcher, self.eos, MAX_ANSWER_TOKENS)
            ids = [*look.item.ids[sequence.length :], *writing.to_read]
            at = torch.tensor(ids, device=self.device)
            embeddings = embed(at)
            if look in images:
                image = images[look].to(embeddings)
                embeddings[at == self.image_id] = image[-int((at == self.image_id).sum()) :]
            places = list(range(sequence.length, sequence.length + len(ids)))
            started.append((writing, Turn(sequence, ids, places, embeddings=embeddings)))
        return started

    def _images(self, looks: list[Look]) -> list[torch.Tensor]:
        """The vision tower's features of each image, shape (tokens, width)."""
        if not looks:
            return []
        pixels = torch.stack([look.item.pixels for look in looks]).to(self.device, self.model.dtype)
        features: list[torch.Tensor] = list(self.model.model.get_image_features(pixels).pooler_output)
        return features

    def _turn(self, look: Look) -> tuple[Writing, Turn]:
        assert look.writing
        sequence, ids = look.writing.sequence, look.writing.to_read
        return look.writing, Turn(sequence, ids, list(range(sequence.length, sequence.length + len(ids))))

    def _answer(self, look: Look, writing: Writing) -> Answer | Refusal:
        text = self.tokenizer.decode(writing.written, skip_special_tokens=True)
        try:
            if len(writing.written) > MAX_ANSWER_TOKENS:
                raise ValueError
            json.loads(text)
        except ValueError:
            if writing.matcher.is_error():
                return Refusal(f"the schema is too complex for a grammar: {writing.matcher.get_error()}", "failed")
            return Refusal(f"the answer did not end within {MAX_ANSWER_TOKENS} tokens", "failed")
        return Answer(text, len(writing.written), look.steps, writing.forced)


def _processor(folder: Path) -> ProcessorMixin:
    """Load the processor, filling in what older layouts keep in the model's config.

    Raises CheckpointError naming what can't be read.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
    except Exception as error:  # settings of wrong types raise any kind of error
        raise CheckpointError(f"the config or processor in {folder} can't be read: {first_line(error)}") from error
    if not isinstance(config, LlavaConfig) or not isinstance(processor, LlavaProcessor):
        raise CheckpointError(f"vision needs a LLaVA; {folder} contains a {config.model_type}")
    if processor.patch_size is None:
        processor.patch_size = config.vision_config.patch_size
        # CLIP's towers put one token for the whole image before those of its patches.
        processor.num_additional_image_tokens = int("clip" in config.vision_config.model_type)
    if processor.vision_feature_select_strategy is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    return processor


@torch.inference_mode()
def _probed(processor: ProcessorMixin, model: LlavaForConditionalGeneration) -> torch.Tensor:
    text = CONVERSATION.format(prompt="What is it?")
    seen = processor(text=text, images=Image.new("RGB", (64, 64)), return_tensors="pt")
    logits: torch.Tensor = model(**seen.to(model.device, model.dtype)).logits
    return logits


@functools.lru_cache(maxsize=64)
def _grammar(schema: str) -> str:
    return str(LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT))
