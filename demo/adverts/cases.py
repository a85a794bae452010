"""Questions about drawn pictures and adverts with the right answers, for training and for checking."""

import random
from dataclasses import dataclass

from PIL import Image

from demo.adverts.answers import judgement, validation
from demo.adverts.copy import ad_copy, request
from demo.adverts.draw import Advert, Picture, draw_advert, draw_picture, random_advert, random_picture
from demo.adverts.shapes import PRODUCTS
from serve.services.adverts.verdicts import JUDGE, Judgement, Validation, validation_prompt


@dataclass(frozen=True)
class Case:
    """A picture (stage 1) or an advert (stage 2), the question about it, and the right answer."""

    truth: Picture | Advert
    prompt: str
    answer: Validation | Judgement

    @property
    def picture(self) -> Picture:
        """The product and its background, without the lettering."""
        return self.truth.picture if isinstance(self.truth, Advert) else self.truth

    def image(self) -> Image.Image:
        """The image that the question is about, in RGB."""
        return draw_advert(self.truth) if isinstance(self.truth, Advert) else draw_picture(self.truth)


def stage1(rng: random.Random) -> Case:
    """A picture and copy. In half of the cases the copy is for another product, or for something never drawn."""
    picture = random_picture(rng)
    offered: str | None = picture.product
    if rng.random() < 0.5:
        offered = rng.choice([product for product in PRODUCTS if product != picture.product] + [None])
    colour = picture.colour if offered == picture.product else None
    prompt = validation_prompt(ad_copy(rng, offered, colour), request(rng))
    return Case(picture, prompt, validation(picture, offered))


def stage2(rng: random.Random) -> Case:
    """A finished advert."""
    advert = random_advert(rng)
    return Case(advert, JUDGE, judgement(advert))
