"""The right answers about a drawn picture or advert, derived from its description."""

from typing import Literal

from demo.adverts.draw import Advert, Picture
from serve.services.adverts.verdicts import Font, Judgement, Validation

Style = Literal["bold", "serif", "sans-serif"]
STYLES: dict[str, Style] = {
    "mug": "serif",
    "cake": "serif",
    "umbrella": "serif",
    "shoe": "bold",
    "bottle": "bold",
    "chair": "bold",
}
RELEVANT, OTHER_PRODUCT, OTHER_THING = 0.95, 0.1, 0.05
SEEN = {"good": "A sharp, well lit picture", "blurred": "A blurred picture", "dark": "A dark picture"}
FAULTS = {
    "blurred": ("The picture is blurred.", "Take a sharper picture."),
    "dark": ("The picture is too dark.", "Take the picture in better light."),
}


def an(thing: str) -> str:
    """`thing` with its article."""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def validation(picture: Picture, offered: str | None) -> Validation:
    """Stage 1: does `picture` suit copy that offers the product `offered`? None stands for one that is never drawn."""
    product, offer = picture.product, an(offered) if offered else "something else"
    fits, sharp = offered == product, picture.quality == "good"
    shown = f"{SEEN[picture.quality]} of {an(picture.colour)} {product} on a {picture.background} background."
    issues, recommendations = [], []
    if not fits:
        issues.append(f"The image shows {an(product)}, not {offer}.")
        recommendations.append(f"Use a picture of {an(offered) if offered else 'what the copy offers'}.")
    if not sharp:
        issue, recommendation = FAULTS[picture.quality]
        issues.append(issue)
        recommendations.append(recommendation)
    if not issues:
        recommendations.append(f"Put the headline above the {product}.")
    return Validation(
        analysis=f"{shown} The copy offers {offer}.",
        is_valid=fits,
        image_quality_ok=sharp,
        relevance_score=RELEVANT if fits else OTHER_PRODUCT if offered else OTHER_THING,
        issues=issues,
        recommendations=recommendations,
        font_recommendation=Font(
            style=STYLES.get(product, "sans-serif"),
            size="large" if sharp else "medium",
            color="dark" if picture.pale and picture.quality != "dark" else "light",
        ),
    )


def judgement(advert: Advert) -> Judgement:
    """Stage 2: is `advert` good?"""
    product = advert.picture.product
    reads = "is easy to read" if advert.contrast_ok else "is hard to read"
    lies = f"covers the {product}" if advert.occlusion else f"leaves the {product} free"
    button = "a button calls to action" if advert.cta_present else "nothing calls to action"
    issues = []
    if advert.occlusion:
        issues.append(f"The headline covers the {product}.")
    if not advert.contrast_ok:
        issues.append("The headline hardly stands out from what is behind it.")
    if not advert.cta_present:
        issues.append("There is no call to action.")
    return Judgement(
        analysis=f"An advert for {an(advert.picture.colour)} {product} on a {advert.picture.background} background. "
        f"The headline {reads} and {lies}; {button}.",
        on_brief=advert.on_brief,
        occlusion=advert.occlusion,
        contrast_ok=advert.contrast_ok,
        cta_present=advert.cta_present,
        issues=issues,
    )
