"""Reading in steps against transformers' `generate`, with a small random model of each kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deployments.checkpoints.loading import _quantise_dynamically
from deployments.engines.sequences import Reader, Sequence, Turn
from deployments.spec import CheckpointError

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOW = {"sliding_window": 8}
BOTH = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
HEADS = {"head_dim": 8}
GEMMA = HEADS | BOTH | {"query_pre_attn_scalar": 8}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
SCALES = {"logits_scaling": 5.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
READ: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "mixtral": WINDOW | EXPERTS,
    "gemma": HEADS,
    "gemma2": GEMMA | CAPS,
    "gemma3_text": GEMMA,
    "cohere": {"logit_scale": 0.25},
    "cohere2": BOTH | {"logit_scale": 0.25},
    "granite": SCALES,
    "qwen2": BOTH | {"use_sliding_window": True},
    "qwen3": HEADS,
    "phi": {},
    "phi3": WINDOW,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "gpt_oss": HEADS | BOTH | EXPERTS,
    "olmo2": {},
    "olmo3": BOTH,
    "smollm3": BOTH | {"use_sliding_window": True},
    "starcoder2": WINDOW,
    "exaone4": BOTH,
    "roberta": {"is_decoder": True},
    "xlm-roberta": {"is_decoder": True, "pad_token_id": 5},
    "bert": {"is_decoder": True},
    "modernbert-decoder": {"local_attention": 8},
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8}
STATE = "a state that is not keys and values"
OWN = "its own attention implementation"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "falcon": ({"alibi": True}, OWN),
    "bloom": ({}, OWN),
    "mpt": ({}, OWN),
    "gptj": ({"rotary_dim": 8}, OWN),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, STATE),
    "granitemoehybrid": (MAMBA | {"layer_types": ["mamba", "attention"], "num_local_experts": 2}, STATE),
    "recurrent_gemma": ({}, STATE),
    "minimax": (EXPERTS, STATE),
    "nemotron_h": ({}, STATE),
    "mamba": ({}, STATE),
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}, STATE),
    "falcon_h1": (MAMBA | {"mamba_d_ssm": 64}, STATE),
    "qwen3_next": ({}, STATE),
    "nemotron": ({}, "pass on"),
    "llama4_text": ({"attention_chunk_size": 8, "num_local_experts": 2}, "chunked_attention"),
    "deepseek_v3": ({"num_key_value_heads": 4, "n_routed_experts": 8}, "keys and values have different widths"),
    "roberta": ({}, "differ"),  # an encoder: tokens attend to those after them
    "diffllama": ({}, "differ"),
}
FIRST_POSITION = {"roberta": 1, "xlm-roberta": 6}
"""Positions begin after the padding id, as the model's forward has it. `generate` counts from 0 unless it is told."""
PROMPTS = [[3, 14, 15, 92, 65, 35], [8], [97 - n for n in range(2, 28)]]
NEW_TOKENS = 12


def random_model(kind: str, changes: dict[str, Any]) -> PreTrainedModel:
    names = AutoConfig.for_model(kind).attribute_map
    sizes = {names.get(name, name): value for name, value in SIZES.items()}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | changes)), dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():  # large enough that attention decides what comes next
            weights.add_(torch.randn_like(weights), alpha=0.3)
    return model.eval()


@torch.inference_mode()
def generated(model: PreTrainedModel, prompt: list[int], first: int | None) -> list[int]:
    """What transformers writes after the prompt, without a cache. `first` is the position of the first token."""
    ids = torch.tensor([prompt])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "use_cache": False, "pad_token_id": 0}
    if first is not None:
        options["position_ids"] = torch.arange(first, first + len(prompt))[None]
    written: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    return written


@torch.inference_mode()
def read(reader: Reader, prompts: list[list[int]], tokens: int = NEW_TOKENS) -> list[list[int]]:
    """What the reader writes after the prompts, all at once. Each prompt joins a step after the one before it."""
    sequences = [Sequence() for _ in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    for step in range(tokens + len(prompts) - 1):
        active = [at for at in range(len(prompts)) if at <= step and len(written[at]) < tokens]
        turns = []
        for at in active:
            length = sequences[at].length
            ids = [*prompts[at], *written[at]][length:]
            turns.append(Turn(sequences[at], ids, list(range(length, length + len(ids)))))
        ends = np.cumsum([len(turn.ids) for turn in turns]) - 1
        logits = reader.logits(reader.read(turns)[ends])
        for at, turn, token in zip(active, turns, logits.argmax(-1).tolist(), strict=True):
            turn.sequence.length += len(turn.ids)
            written[at].append(token)
    return written


@pytest.mark.parametrize("kind", READ)
def test_what_is_read_in_steps_is_what_generate_gives(kind: str) -> None:
    model = random_model(kind, READ[kind])
    expected = [generated(model, prompt, FIRST_POSITION.get(kind)) for prompt in PROMPTS]
    assert read(Reader(model), PROMPTS) == expected


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_read_in_steps_is_refused_by_name(kind: str) -> None:
    changes, reason = REFUSED[kind]
    model = random_model(kind, changes)
    with pytest.raises(
        CheckpointError, match=rf"^{type(model).__name__} can't be read in steps: [^\n]*{reason}[^\n]*$"
    ):
        Reader(model)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt_oss", "gpt2"])
@torch.inference_mode()
def test_branches_of_a_prompt_do_not_see_each_other(kind: str) -> None:
    """Tokens of all branches lie in one sequence, mixed, so a window can't go by where they lie."""
    model = random_model(kind, READ[kind])
    prompt, branches = PROMPTS[2], [[5, 6, 7], [9, 10, 11], [12, 5, 9]]
    whole = [model(torch.tensor([prompt + branch]), use_cache=False).logits[0] for branch in branches]
    reader, sequence = Reader(model), Sequence()
    reader.read([Turn(sequence, prompt, list(range(len(prompt))))])
    sequence.length = len(prompt)
    sequence = sequence.copy_of_first(len(prompt) - 4)  # as a prompt that begins alike does
    reader.read([Turn(sequence, prompt[-4:], list(range(len(prompt)))[-4:])])
    sequence.length = len(prompt)
    for step in range(3):
        eyes = [np.eye(len(branches), dtype=bool)] * (step + 1)
        visible = np.hstack([np.ones((len(branches), len(prompt)), bool), *eyes])
        at = len(prompt) + step
        turn = Turn(sequence, [branch[step] for branch in branches], [at] * len(branches), visible)
        logits = reader.logits(reader.read([turn]))
        sequence.length += len(branches)
        assert torch.allclose(logits, torch.stack([each[at] for each in whole]), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mixtral", "gemma2", "gpt2"])
def test_rounding_is_no_reason_to_refuse_a_model(kind: str, dtype: torch.dtype) -> None:
    model = random_model(kind, READ[kind]).to(dtype)
    [written] = read(Reader(model), PROMPTS[:1], tokens=3)
    assert len(written) == 3


@pytest.mark.parametrize("kind", ["mistral", "gpt2"])
def test_nor_are_int8_layers(kind: str) -> None:
    Reader(_quantise_dynamically(random_model(kind, READ[kind])))


def test_a_model_can_be_given_to_another_reader() -> None:
    model = random_model("mistral", WINDOW)
    assert read(Reader(model), PROMPTS) == read(Reader(model), PROMPTS)


ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("kind", "changes", "tokens"),
    [
        ("llama", {}, 128),
        ("phi3", {"rope_parameters": ROPE, "original_max_position_embeddings": 64}, 64),
        ("roberta", {"is_decoder": True}, 127),
        ("opt", READ["opt"], 128),
    ],
)
def test_a_sequence_is_as_long_as_the_model_reads_it_beside_others(
    kind: str, changes: dict[str, Any], tokens: int
) -> None:
    assert Reader(random_model(kind, changes)).max_tokens == tokens


def test_a_model_with_hardly_any_positions_is_refused() -> None:
    with pytest.raises(CheckpointError, match="4 positions"):
        Reader(random_model("gpt2", {"n_positions": 4}))
