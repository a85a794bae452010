"""Inputs that nobody has sent before, although many sentences begin alike, as people's do."""

from __future__ import annotations

import random
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from urllib3 import encode_multipart_formdata

from demo.adverts.copy import ad_copy
from demo.next_word import corpus
from demo.rerank import pairs
from demo.rerank.language import LANGUAGES

EXAMPLES = Path(__file__).resolve().parent.parent / "demo/adverts/examples"

DRAW = random.Random()
SENTENCES = corpus.Writer(corpus.read_grammar(), DRAW.getrandbits(32))
CASES = [pairs.Writer(language, DRAW) for language in LANGUAGES]


def sentence() -> str:
    """A Korean sentence."""
    return SENTENCES.sentence(DRAW.choice(SENTENCES.grammar.templates))


def case(documents: int) -> pairs.Case:
    """A question and `documents` documents, in Korean or English."""
    return DRAW.choice(CASES).case("training", documents)


def copy() -> str:
    """Advertising copy for the example's product, or for something else."""
    return ad_copy(DRAW, DRAW.choice(["mug", None]))


def picture(example: str) -> bytes:
    """A PNG of the example with one pixel changed."""
    image = Image.open(EXAMPLES / f"{example}.png").convert("RGB")
    image.putpixel((0, 0), tuple(DRAW.randbytes(3)))
    out = BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def form(example: str | None = None, **fields: str) -> dict[str, Any]:
    """The body and header of a multipart request; with a picture if an example is named."""
    files = {"image": ("image.png", picture(example))} if example else {}
    body, content_type = encode_multipart_formdata(fields | files)
    return {"data": body, "headers": {"Content-Type": content_type}}
