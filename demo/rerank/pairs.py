"""Queries with their documents, written from the grammar. The same seed always gives the same texts."""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from demo.rerank.language import LANGUAGES, Facet, Language, Names, Situation


@dataclass(frozen=True)
class Case:
    """A query, its documents and how near each document is to it.

    Nearness is 1 for the one relevant document, less for those that share the subject, the facet or some of the words,
    and 0 for those that share nothing. `split` is `training`, or names what of the query training never sees: the
    `combination` of subject and facet, or the `subject`.
    """

    query: str
    documents: tuple[str, ...]
    nearness: tuple[float, ...]
    language: str
    split: str

    @property
    def relevant(self) -> int:
        """Index of the relevant document."""
        return self.nearness.index(1.0)


@dataclass(frozen=True)
class Topic:
    """What a query asks and a document answers."""

    subject: Names
    kind: str
    facet: Facet
    situation: Situation | None = None


class Writer:
    """Writes cases in one language."""

    def __init__(self, language: Language, rng: Random) -> None:
        self.language = language
        self.rng = rng
        self.other_words = re.findall(r"\w+", " ".join(language.fillers + language.loose_answers + language.loose_asks))
        self.known = {split: topics(language, split) for split in ("training", "combination", "subject")}

    def case(self, split: str, size: int) -> Case:
        """One case with `size` documents. In training some subjects are invented, so that the model learns to match
        words."""
        draw = self.rng.random()
        if split == "training" and draw < 0.2:
            return self._loose_case(size)
        topic = self.rng.choice(self.known[split])
        if split == "training" and draw < 0.5:
            topic = replace(topic, subject=self._invented_subject())
        if split == "subject":
            topic = replace(topic, subject=(self.rng.choice(topic.subject),))  # training has not seen its other names
        if self.rng.random() < 0.35:
            topic = replace(topic, situation=self._situation())
        answered = [topic, *self._others(topic, size - 1)]
        nearness = [nearness_of(other, topic) for other in answered]
        return self._shuffled(self._query(topic), [self._document(other) for other in answered], nearness, split)

    def _shuffled(self, query: str, documents: list[str], nearness: list[float], split: str) -> Case:
        order = self.rng.sample(range(len(documents)), len(documents))
        return Case(
            query, tuple(documents[i] for i in order), tuple(nearness[i] for i in order), self.language.code, split
        )

    def _others(self, topic: Topic, count: int) -> list[Topic]:
        """Topics near the query's: with another situation, another facet, another subject, or nothing in common."""
        others: list[Topic] = []
        while len(others) < count:
            other = self.rng.choice(self.known["training"])
            draw = self.rng.random()
            if topic.situation and draw < 0.25:
                other = replace(topic, situation=self._situation())
            elif draw < 0.6:
                other = replace(topic, facet=other.facet)
            elif draw < 0.85:
                subject = self._invented_subject() if len(others) % 3 == 2 else other.subject
                other = Topic(subject, other.kind, topic.facet, topic.situation)
            elif self.rng.random() < 0.3:
                other = replace(other, situation=self._situation())
            if nearness_of(other, topic) < 1 and self._may_appear(other, topic):
                others.append(other)
        return others

    def _may_appear(self, other: Topic, topic: Topic) -> bool:
        """Whether subject and facet fit each other, and belong to training or to the subject of a held-out query."""
        if other.kind not in other.facet.kinds:
            return False
        held_out = split_of(self.language, topic) != "training"
        return split_of(self.language, other) == "training" or (held_out and other.subject == topic.subject)

    def _situation(self) -> Situation:
        if self.rng.random() < 0.6:
            return self.rng.choice(self.language.situations)
        place = "".join(self.rng.choice(part) for part in self.language.place_parts)
        asks, answers = (
            tuple(text.format(place=place) for text in texts)
            for texts in (self.language.place.asks, self.language.place.answers)
        )
        return Situation(asks, answers)

    def _invented_word(self) -> str:
        return "".join(self.rng.choice(self.language.syllables) for _ in range(self.rng.randint(2, 3)))

    def _invented_subject(self) -> Names:
        concepts = self.rng.sample(self.language.concepts, 2)
        if self.rng.random() < 0.3:
            return (f"{self.rng.choice(concepts[0])} {self._invented_word()}",)
        if self.rng.random() < 0.4:
            return concepts[0]
        return tuple(" ".join(self.rng.choice(concept) for concept in concepts) for _ in range(2))

    def _filled(self, template: str, subject: Names) -> str:
        values = {name: self.rng.choice(texts) for name, texts in self.language.values.items()}
        text = with_particles(template.format(s=self.rng.choice(subject), **values))
        return text[0].upper() + text[1:]

    def _query(self, topic: Topic) -> str:
        situation = self.rng.choice(topic.situation.asks) if topic.situation else ""
        if self.rng.random() < 0.15:
            words = [self.rng.choice(topic.subject), self.rng.choice(topic.facet.keywords), situation]
            return " ".join(word for word in words if word)
        text = self._filled(self.rng.choice(topic.facet.asks), topic.subject)
        if not situation:
            return text
        return self.language.joined.format(ask=text[:-1], situation=situation, end=text[-1])

    def _document(self, topic: Topic) -> str:
        sentences = [self._filled(self.rng.choice(topic.facet.answers), topic.subject)]
        if topic.situation:
            sentences.insert(self.rng.randint(0, 1), self.rng.choice(topic.situation.answers))
        if self.rng.random() < 0.4:
            sentences.insert(self.rng.randint(0, len(sentences)), self.rng.choice(self.language.fillers))
        return " ".join(sentences)

    def _loose_case(self, size: int) -> Case:
        """A query of up to three notions. The relevant document has all of them, perhaps in other words; others have
        fewer."""
        asked = [self._notion() for _ in range(3)]
        ask = self.rng.choice(self.language.loose_asks)
        used = [slot for slot in "abc" if f"{{{slot}}}" in ask]
        wanted = asked[: len(used)]
        documents, nearness = [self._loose_text(asked, self.language.loose_answers)], [1.0]
        for _ in range(size - 1):
            kept = self.rng.sample(wanted, self.rng.randint(0, len(wanted) - 1))
            notions = kept + [self._notion() for _ in range(3 - len(kept))]
            documents.append(self._loose_text(self.rng.sample(notions, 3), self.language.loose_answers))
            nearness.append(0.6 * len(kept) / len(wanted))
        return self._shuffled(self._loose_text(wanted, (ask,)), documents, nearness, "training")

    def _notion(self) -> Names:
        return (self._invented_word(),) if self.rng.random() < 0.2 else self.rng.choice(self.language.concepts)

    def _loose_text(self, notions: list[Names], templates: tuple[str, ...]) -> str:
        """The notions in a template, or scattered among other words, because real texts have many unknown words."""
        words = [self.rng.choice(notion) for notion in notions]
        if self.rng.random() < 0.5:
            return with_particles(self.rng.choice(templates).format(**dict(zip("abc", words, strict=False))))
        for _ in range(self.rng.randint(0, 2 * len(words))):
            words.insert(self.rng.randint(0, len(words)), self.rng.choice(self.other_words))
        return " ".join(words)


def nearness_of(other: Topic, topic: Topic) -> float:
    """How near a document about `other` is to a query about `topic`; 1 if it answers the query."""
    same_subject = bool(set(other.subject) & set(topic.subject))
    if same_subject and other.facet == topic.facet:
        return 1.0 if topic.situation in (None, other.situation) else 0.5
    if same_subject:
        return 0.25
    return 0.15 if other.facet == topic.facet else 0.0


def split_of(language: Language, topic: Topic) -> str:
    """The split of a pair of subject and facet: every eighth subject and a seventh of the other pairs are held out."""
    subjects = language.subjects[topic.kind]
    if topic.subject not in subjects:
        return "training"
    if subjects.index(topic.subject) % 8 == 7:
        return "subject"
    mark = zlib.crc32(f"{topic.kind}/{topic.subject[0]}/{topic.facet.asks[0]}".encode())
    return "combination" if mark % 7 == 0 else "training"


def topics(language: Language, split: str) -> list[Topic]:
    """All pairs of subject and facet that belong to a split."""
    pairs = (
        Topic(subject, kind, facet)
        for facet in language.facets
        for kind in facet.kinds
        for subject in language.subjects[kind]
    )
    return [topic for topic in pairs if split_of(language, topic) == split]


def with_particles(text: str) -> str:
    """Choose between the two forms of a Korean particle, written `을(를)`, by the final of the preceding syllable."""

    def chosen(match: re.Match[str]) -> str:
        before, closed, opened = match.groups()
        has_final = "가" <= before <= "힣" and (ord(before) - ord("가")) % 28 != 0
        return before + (closed if has_final else opened)

    return re.sub(r"(\S)(을|이|은|과|으로)\((를|가|는|와|로)\)", chosen, text)


def write_cases(seed: int, split: str, size: int) -> Iterator[Case]:
    """Endless cases with `size` documents each."""
    rng = Random(seed)
    writers = [Writer(language, rng) for language in LANGUAGES]
    while True:
        yield rng.choices(writers, [writer.language.share for writer in writers])[0].case(split, size)
