"""Korean sentences on everyday and legal topics, written by a grammar.

The files in `grammar/` hold definitions (`fruit = 사과 | 딸기`) and sentence templates, one per line. In a template
`[a|b|]` is a choice, `{fruit}` takes an entry of a definition, `을/를` becomes the particle that fits, and
`먹다+었어요` is a verb with its ending (see `korean`). Earlier options of a choice are chosen more often, because words
differ in frequency.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from demo.next_word.korean import inflect

GRAMMAR = Path(__file__).parent / "grammar"
SEED = 20240601
DRAWS_PER_TEMPLATE = 120
COPIES_AT_MOST = 2
HELD_OUT_ONE_IN = 30
RANK_EXPONENT = 0.7

CHOICE = re.compile(r"\[([^\[\]]*)\]")
NAME = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Grammar:
    words: dict[str, list[str]]
    templates: list[str]


@cache
def read_grammar() -> Grammar:
    """All definitions and templates of the folder `grammar`."""
    words: dict[str, list[str]] = {}
    templates: list[str] = []
    for file in sorted(GRAMMAR.glob("*.txt")):
        for line in file.read_text(encoding="utf-8").splitlines():
            name, is_definition, entries = line.partition(" = ")
            if is_definition:
                words[name] = entries.split(" | ")
            elif line and not line.startswith("#"):
                templates.append(line)
    return Grammar(words, templates)


class Writer:
    """Writes sentences from templates with one source of randomness."""

    def __init__(self, grammar: Grammar, seed: int) -> None:
        self.grammar = grammar
        self.random = random.Random(seed)

    def choose(self, options: list[str]) -> str:
        weights = [rank**-RANK_EXPONENT for rank in range(1, len(options) + 1)]
        return self.random.choices(options, weights)[0]

    def sentence(self, template: str) -> str:
        """One sentence of the template; no entry of a definition occurs twice in it."""
        used: set[str] = set()

        def entry(match: re.Match[str]) -> str:
            word = self.choose([entry for entry in self.grammar.words[match[1]] if entry not in used])
            used.add(word)
            return word

        text = template
        while "[" in text or "{" in text:
            text = CHOICE.sub(lambda match: self.choose(match[1].split("|")), text)
            if "[" not in text:
                text = NAME.sub(entry, text, count=1)
        return " ".join(inflect(text).split())


@dataclass(frozen=True)
class Corpus:
    """`training` may repeat sentences. It has no sentence of `held_out`, not even with other punctuation."""

    training: list[str]
    held_out: list[str]


def is_held_out(sentence: str) -> bool:
    """Whether a sentence belongs to the fixed share that is held out. Only its letters decide."""
    letters = "".join(filter(str.isalpha, sentence))
    return int.from_bytes(sha256(letters.encode()).digest()[:4]) % HELD_OUT_ONE_IN == 0


def write_corpus(seed: int = SEED) -> Corpus:
    """The corpus of a seed, in random order; the same seed writes the same sentences."""
    grammar = read_grammar()
    writer = Writer(grammar, seed)
    copies = Counter(writer.sentence(template) for template in grammar.templates for _ in range(DRAWS_PER_TEMPLATE))
    training = [
        text for text, count in copies.items() if not is_held_out(text) for _ in range(min(count, COPIES_AT_MOST))
    ]
    held_out = [text for text in copies if is_held_out(text)]
    writer.random.shuffle(training)
    writer.random.shuffle(held_out)
    return Corpus(training, held_out)
