"""What the grammar needs of a language. The words themselves are in the TOML files in this folder."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

Names = tuple[str, ...]  # words for the same thing


@dataclass(frozen=True)
class Facet:
    """One thing that can be asked about a subject.

    `asks` and `answers` are templates: `{s}` is the subject, and any other slot names a list in `Language.values`.
    """

    kinds: tuple[str, ...]  # kinds of subjects that it fits
    keywords: tuple[str, ...]
    asks: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Situation:
    """A condition that narrows a question. An answer for another situation does not answer it."""

    asks: tuple[str, ...]  # joined to the question
    answers: tuple[str, ...]  # a sentence of its own


@dataclass(frozen=True)
class Language:
    """Words and templates of one language."""

    code: str
    share: int  # share of the cases, relative to those of the other languages
    joined: str  # template of a question in a situation, with the slots {ask}, {situation} and {end}
    subjects: dict[str, tuple[Names, ...]]  # by kind
    facets: tuple[Facet, ...]
    situations: tuple[Situation, ...]
    place: Situation  # with the slot {place}
    place_parts: tuple[tuple[str, ...], ...]
    values: dict[str, tuple[str, ...]]
    fillers: tuple[str, ...]
    concepts: tuple[Names, ...]
    loose_asks: tuple[str, ...]  # with the slots {a}, {b}, {c}
    loose_answers: tuple[str, ...]
    syllables: tuple[str, ...]  # for invented words

    @classmethod
    def load(cls, path: Path) -> Language:
        """Read a language from its TOML file."""
        words = tomllib.loads(path.read_text(encoding="utf-8"))
        return cls(
            code=words["code"],
            share=words["share"],
            joined=words["joined"],
            subjects={kind: nested(groups) for kind, groups in words["subjects"].items()},
            facets=tuple(
                Facet(**{name: tuple(texts) for name, texts in facet.items()}) for facet in words["facets"].values()
            ),
            situations=tuple(Situation(tuple(each["asks"]), tuple(each["answers"])) for each in words["situations"]),
            place=Situation(tuple(words["place"]["asks"]), tuple(words["place"]["answers"])),
            place_parts=nested(words["place"]["parts"]),
            values={name: tuple(texts) for name, texts in words["values"].items()},
            fillers=tuple(words["fillers"]),
            concepts=nested(words["concepts"]),
            loose_asks=tuple(words["loose_asks"]),
            loose_answers=tuple(words["loose_answers"]),
            syllables=tuple(words["syllables"].split()),
        )


def nested(groups: list[list[str]]) -> tuple[tuple[str, ...], ...]:
    """Lists of lists as tuples of tuples."""
    return tuple(tuple(group) for group in groups)


LANGUAGES = tuple(Language.load(Path(__file__).parent / name) for name in ("english.toml", "korean.toml"))
