"""What Dure asks a vision model about an advert, and the only shape in which it may answer.

The answer models are compiled to a grammar that constrains decoding, so every answer parses. `analysis` comes first:
a model that describes before it judges judges better, and the verdict can then lean on what was just written.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Sentence = Annotated[str, Field(max_length=160)]
Sentences = Annotated[list[Sentence], Field(max_length=4)]


class Font(BaseModel):
    """The lettering that would read best on the image."""

    model_config = ConfigDict(extra="forbid")

    style: Literal["bold", "serif", "sans-serif"]
    size: Literal["large", "medium", "small"]
    color: Literal["light", "dark"]


class Validation(BaseModel):
    """Stage 1: does the image fit the ad copy?"""

    model_config = ConfigDict(extra="forbid")

    analysis: str = Field(max_length=400)
    is_valid: bool
    image_quality_ok: bool
    relevance_score: float = Field(ge=0, le=1, multiple_of=0.01, description="0 unrelated, 1 a perfect fit")
    issues: Sentences
    recommendations: Sentences
    font_recommendation: Font


class Judgement(BaseModel):
    """Stage 2: is the finished advert good?"""

    model_config = ConfigDict(extra="forbid")

    analysis: str = Field(max_length=400)
    on_brief: bool
    occlusion: bool = Field(description="true where text covers something that should be seen")
    contrast_ok: bool
    cta_present: bool = Field(description="true where the advert calls to an action")
    issues: Sentences


VALIDATE = """Check whether this image suits the advert copy below. Describe the image in a sentence or two, then \
judge: is_valid (the image shows what the copy offers), image_quality_ok (sharp and well lit), relevance_score from \
0 to 1, issues, recommendations, and the font that would read best on it. Answer in JSON.
Copy: {copy}"""

JUDGE = """Judge this finished advert. Describe it in a sentence or two, then judge: on_brief (it reads as one clear \
advert), occlusion (text covers the product), contrast_ok (the text stands out from what is behind it), cta_present \
(there is a call to action), and list the issues. Answer in JSON."""


def validation_prompt(ad_copy: str, extra: str | None = None) -> str:
    """The stage 1 question about an image and its ad copy; `extra` is the caller's own request, added at the end."""
    prompt = VALIDATE.format(copy=ad_copy.strip())
    return f"{prompt}\n{extra.strip()}" if extra and extra.strip() else prompt
