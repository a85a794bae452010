"""Product pictures and finished adverts, drawn from descriptions that also give the right answers about them."""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from demo.adverts.shapes import PRODUCTS, Rgb, draw_product, shaded

SIDE = 384
EXAMPLES = Path(__file__).parent / "examples"

COLOURS: dict[str, Rgb] = {
    "red": (205, 40, 40),
    "orange": (240, 130, 30),
    "yellow": (235, 200, 30),
    "green": (50, 155, 70),
    "blue": (50, 95, 210),
    "purple": (130, 60, 175),
}
PALE: dict[str, Rgb] = {
    "white": (246, 246, 246),
    "cream": (248, 236, 205),
    "pale blue": (200, 222, 246),
    "pink": (250, 208, 220),
    "light grey": (200, 200, 202),
}
DARK: dict[str, Rgb] = {"navy": (20, 28, 74), "black": (26, 26, 28), "dark green": (16, 60, 38)}
BACKGROUNDS = PALE | DARK

HEADLINES = ["New {}, new day", "The {} you want", "Our best {} yet", "A {} for life", "Say hello to your {}"]
BUTTONS = ["Shop now", "Buy today", "Order now", "Try it free", "Learn more", "Sign up"]
TAGLINES = ["Since 1987", "Made with care", "Family business", "Seoul and Busan"]

Quality = Literal["good", "blurred", "dark"]


@dataclass(frozen=True)
class Picture:
    """A product on a background, without lettering."""

    seed: int
    product: str
    colour: str
    background: str
    quality: Quality = "good"

    @property
    def pale(self) -> bool:
        """Whether the background is light."""
        return self.background in PALE


@dataclass(frozen=True)
class Advert:
    """A picture with a headline and perhaps a button."""

    picture: Picture
    contrast_ok: bool
    occlusion: bool
    cta_present: bool

    @property
    def on_brief(self) -> bool:
        """Whether it reads as one clear advert, without any fault."""
        return self.contrast_ok and self.cta_present and not self.occlusion


def random_picture(rng: random.Random, good: float = 0.55) -> Picture:
    """A random product in a random colour; sharp and well lit with probability `good`."""
    quality: Quality = "good" if rng.random() < good else rng.choice(["blurred", "dark"])
    background = rng.choice(list(PALE if rng.random() < 0.55 else DARK))
    return Picture(rng.getrandbits(32), rng.choice(list(PRODUCTS)), rng.choice(list(COLOURS)), background, quality)


def random_advert(rng: random.Random, good: float = 0.36) -> Advert:
    """A faultless advert with probability `good`, else one with one to three faults."""
    faults = [False] * 3
    if rng.random() >= good:
        while not any(faults):
            faults = [rng.random() < 0.6 for _ in faults]
    return Advert(random_picture(rng, good=1.0), not faults[0], faults[1], not faults[2])


def draw_picture(picture: Picture) -> Image.Image:
    """The picture in RGB, `SIDE` pixels square."""
    rng = random.Random(picture.seed)
    half = rng.randint(100, 130)
    centre = SIDE // 2 + rng.randint(-24, 24), SIDE // 2 + rng.randint(-20, 20)
    image = backdrop(picture, rng, centre[1] + half)
    draw_product(ImageDraw.Draw(image), picture.product, COLOURS[picture.colour], centre, half)
    match picture.quality:
        case "blurred":
            return image.filter(ImageFilter.GaussianBlur(rng.uniform(11, 16)))
        case "dark":
            return ImageEnhance.Brightness(image).enhance(rng.uniform(0.24, 0.32))
        case _:
            return image


def draw_advert(advert: Advert) -> Image.Image:
    """The finished advert in RGB, `SIDE` pixels square."""
    picture = advert.picture
    rng = random.Random(picture.seed)
    half = rng.randint(74, 86)
    top = not advert.occlusion and rng.random() < 0.65
    centre = SIDE // 2 + rng.randint(-28, 28), (200 if top else 130) + rng.randint(-10, 10)
    headline_y = 52 + rng.randint(-14, 14) if top else 262 + rng.randint(-6, 10)
    if advert.occlusion:
        centre = centre[0], rng.randint(130, 215)
        headline_y = centre[1] + rng.randint(-25, 25)
    image = backdrop(picture, rng, centre[1] + half)
    canvas = ImageDraw.Draw(image)
    draw_product(canvas, picture.product, COLOURS[picture.colour], centre, half)

    behind, middle = BACKGROUNDS[picture.background], SIDE // 2
    # Faint letters could be read over a bright product, so such a headline always lies on a band.
    if rng.random() < 0.35 or (advert.occlusion and not advert.contrast_ok):
        behind = rng.choice(list(BACKGROUNDS.values()))
        canvas.rectangle((0, headline_y - 34, SIDE, headline_y + 34), fill=behind)
    ink = readable(rng, behind) if advert.contrast_ok else faint(rng, behind)
    headline = rng.choice(HEADLINES).format(picture.product)
    letters = fitting(canvas, headline, rng.randint(38, 46))
    canvas.text((middle, headline_y), headline, fill=ink, font=letters, anchor="mm")

    foot = 338 + rng.randint(-6, 8)
    if advert.cta_present:
        draw_button(canvas, rng, (middle + rng.randint(-80, 80), foot), BACKGROUNDS[picture.background])
    elif rng.random() < 0.5:
        plain = readable if advert.contrast_ok else faint
        ink = plain(rng, BACKGROUNDS[picture.background])
        canvas.text((middle, foot), rng.choice(TAGLINES), fill=ink, font=font(24), anchor="mm")
    return image


def backdrop(picture: Picture, rng: random.Random, floor: int) -> Image.Image:
    """A plain wall, one that darkens towards the bottom, or one with a table at the height `floor`."""
    colour = BACKGROUNDS[picture.background]
    image = Image.new("RGB", (SIDE, SIDE), colour)
    canvas = ImageDraw.Draw(image)
    match rng.choice(["plain", "gradient", "table"]):
        case "gradient":
            for y in range(0, SIDE, 8):
                canvas.rectangle((0, y, SIDE, y + 8), fill=shaded(colour, 1 - 0.12 * y / SIDE))
        case "table":
            canvas.rectangle((0, floor - 20, SIDE, SIDE), fill=shaded(colour, 0.9))
    return image


def draw_button(canvas: ImageDraw.ImageDraw, rng: random.Random, centre: tuple[int, int], behind: Rgb) -> None:
    """Draw a rounded button with a call to action, which stands out from the colour `behind`."""
    label = rng.choice(BUTTONS)
    half = canvas.textlength(label, font=font(26)) / 2 + 18
    fill = rng.choice([colour for colour in COLOURS.values() if abs(light(colour) - light(behind)) > 45])
    box = (centre[0] - half, centre[1] - 23, centre[0] + half, centre[1] + 23)
    canvas.rounded_rectangle(box, radius=rng.choice([8, 23]), fill=fill)
    canvas.text(centre, label, fill=(255, 255, 255) if light(fill) < 150 else (20, 20, 20), font=font(26), anchor="mm")


def light(colour: Rgb) -> float:
    """Brightness from 0 to 255 (ITU-R BT.601 weights)."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def readable(rng: random.Random, behind: Rgb) -> Rgb:
    """An ink that stands out from `behind`."""
    if light(behind) < 128:
        return rng.choice([(255, 255, 255), (255, 240, 200), (225, 240, 255)])
    return rng.choice([(15, 15, 15), (30, 30, 90), (90, 15, 25)])


def faint(rng: random.Random, behind: Rgb) -> Rgb:
    """An ink that hardly differs from `behind`."""
    step = rng.randint(12, 26) * (1 if light(behind) < 128 else -1)
    red, green, blue = (max(0, min(255, part + step)) for part in behind)
    return red, green, blue


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font."""
    return ImageFont.load_default(size)  # type: ignore[return-value]


def fitting(canvas: ImageDraw.ImageDraw, text: str, size: int) -> ImageFont.FreeTypeFont:
    """The font at `size`, or smaller if `text` would be wider than the advert."""
    while canvas.textlength(text, font=font(size)) > SIDE - 24:
        size -= 1
    return font(size)


def main() -> None:
    """Write the examples that the README sends."""
    EXAMPLES.mkdir(exist_ok=True)
    mug = Picture(5, "mug", "red", "pale blue")
    draw_picture(mug).quantize(64).save(EXAMPLES / "red-mug.png", optimize=True)
    for name, contrast_ok in (("good-advert", True), ("low-contrast-advert", False)):
        advert = Advert(mug, contrast_ok, occlusion=False, cta_present=True)
        draw_advert(advert).quantize(64).save(EXAMPLES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
