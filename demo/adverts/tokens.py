"""A tokenizer of Llama's kind (SentencePiece BPE with byte fallback), trained on the demo's own sentences."""

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer

from demo.adverts.cases import Case

SPECIALS = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Merges stay within a word, a digit or a run of punctuation, so `{"` never merges with the text before it.
PIECES = Regex(r"▁?[A-Za-z_]+|\d|▁|\n|[^A-Za-z_\d▁\n]+")


def conversation(prompt: str) -> str:
    """LLaVA 1.5's turn up to the answer, which follows without a space."""
    return f"USER: <image>\n{prompt} ASSISTANT:"


def train_tokenizer(texts: Iterable[str], size: int) -> LlamaTokenizer:
    """Learn at most `size` pieces from `texts`, with LLaVA's special tokens."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.pre_tokenizer = pre_tokenizers.Split(PIECES, "isolated")
    alphabet = [chr(code) for code in range(32, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIALS + BYTES, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    return LlamaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        add_bos_token=True,
        model_max_length=1024,
    )


def answer_tokens(tokenizer: LlamaTokenizer, case: Case) -> tuple[list[int], list[int]]:
    """Token ids of the question, with `<image>` once, and of its answer with the end token."""
    question = conversation(case.prompt)
    asked = tokenizer(question).input_ids
    both = tokenizer(question + case.answer.model_dump_json()).input_ids
    assert both[: len(asked)] == asked, "a token spans question and answer"
    return asked, [*both[len(asked) :], tokenizer.eos_token_id]
