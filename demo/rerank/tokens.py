"""The demo cross-encoder's tokenizer, trained on the words and templates of the grammar's training split."""

import re
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer

from demo.rerank.language import LANGUAGES
from demo.rerank.pairs import topics

VOCABULARY = 4500
POSITIONS = 256
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SYLLABLES = [chr(code) for code in range(ord("가"), ord("힣") + 1, 31)]  # 31 steps over all initials, medials, finals
PARTICLES = re.findall(r"\w+", "을 를 이 가 은 는 과 와 에 의 도 만 에서 에게 으로 로 까지 부터 인데 입니다 인가요")


def corpus() -> Iterator[str]:
    """The words of the lists and templates except held-out subjects, then letters and particles inside made-up words.

    Words are spelled without their particles, so that a Korean noun is the same piece in a question and in an answer.
    Each letter occurs both at the start of a word and inside one.
    """
    for language in LANGUAGES:
        for topic in topics(language, "training"):
            yield from topic.subject
        for facet in language.facets:
            yield from facet.keywords + facet.asks + facet.answers
        for situation in (*language.situations, language.place):
            yield from situation.asks + situation.answers
        yield from (text for texts in (*language.values.values(), *language.concepts) for text in texts)
        yield from language.fillers + language.loose_asks + language.loose_answers
    yield from (first + second for first in LETTERS for second in LETTERS)
    yield from ("가" + ending for ending in SYLLABLES + PARTICLES * 20)


def without_slots(text: str) -> str:
    """A template without its slots and their particles."""
    return re.sub(r"\{\w*\}(\S+\(\S\))?", " ", text)


def train_tokenizer() -> BertTokenizer:
    """Train a WordPiece tokenizer in lower case.

    Hangul is split into its letters, as BERT's normaliser does when it strips accents. These few letters and the Latin
    ones spell every word, so none is unknown.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(map(without_slots, corpus()), trainer)
    return BertTokenizer(tokenizer_object=tokenizer, do_lower_case=True, strip_accents=True, model_max_length=POSITIONS)
