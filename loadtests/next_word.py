"""A checkpoint of the shape of skt/kogpt2-base-v2 with seeded random weights, in KoGPT2's layout.

Its predictions mean nothing, but it costs as much as the trained one. A token is one character. 35 % of the tokens
begin a word, so that words end as often as in Korean, and the probabilities of the first tokens differ enough to
compare answers between precisions.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace, Split
from tokenizers.pre_tokenizers import Sequence as Steps
from transformers import GPT2Config, GPT2LMHeadModel

from deployments.engines.predictor import SPECIALS, WORD_START

VOCABULARY = 51_200
BEGIN_SHARE = 0.35
SEED = 4
WEIGHT_STD = 0.06
"""Three times GPT-2's own, which makes probabilities as uneven as those of a trained model."""
RANGES = ((0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x3400, 0x4DBF))
CHARACTERS = [chr(code) for first, last in RANGES for code in range(first, last + 1)]
"""Ideographs and Hangul syllables."""


def write_checkpoint(folder: Path) -> Path:
    """Write weights, config and tokenizer, and a file of words of two tokens each. Returns the path of that file."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(SEED)
    specials = sorted(set(SPECIALS.values()))
    begin = draw.sample(CHARACTERS, int(BEGIN_SHARE * VOCABULARY))
    inner = draw.sample(CHARACTERS, VOCABULARY - len(begin) - len(specials))
    tokens = [*(WORD_START + character for character in begin), *inner]
    draw.shuffle(tokens)
    vocabulary = {token: id for id, token in enumerate([*specials, *tokens])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Steps([Metaspace(), Split(Regex(f"{WORD_START}?."), "isolated")])
    tokenizer.save(str(folder / "tokenizer.json"))
    words = folder / "words.txt"
    words.write_text("\n".join(draw.choice(begin) + draw.choice(inner) for _ in range(4000)), encoding="utf-8")
    torch.manual_seed(SEED)
    config = GPT2Config(vocab_size=VOCABULARY, bos_token_id=vocabulary["</s>"], eos_token_id=vocabulary["</s>"])
    model = GPT2LMHeadModel(config)
    with torch.inference_mode():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, WEIGHT_STD)
    model.save_pretrained(folder)
    return words
