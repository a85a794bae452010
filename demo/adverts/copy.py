"""Ad copy for the demo pictures. It offers a product by any of its names, or something that is never drawn."""

import random

NAMES: dict[str, list[str]] = {
    "mug": ["mug", "mug", "mugs", "cup", "coffee mug"],
    "bottle": ["bottle", "bottle", "bottles", "flask", "water bottle"],
    "shoe": ["shoe", "shoes", "shoes", "sneaker", "sneakers", "running shoe", "running shoes"],
    "lamp": ["lamp", "lamp", "lamps", "desk lamp", "table lamp"],
    "phone": ["phone", "phone", "phones", "smartphone", "mobile phone"],
    "chair": ["chair", "chair", "chairs", "armchair", "office chair"],
    "cake": ["cake", "cake", "cakes", "birthday cake", "wedding cake"],
    "umbrella": ["umbrella", "umbrella", "umbrellas", "parasol"],
}
OTHERS = [
    "bicycle", "sofa", "guitar", "camera", "carpet", "toothbrush", "hotel", "insurance", "bank account", "burger",
    "pizza", "flight", "ticket", "watch", "ring", "necklace", "laptop", "keyboard", "garden", "pillow", "blanket",
    "mattress", "backpack", "tent", "jacket", "dress", "perfume", "soap", "shampoo", "toy", "puzzle", "book",
    "magazine", "course", "gym", "knife", "oven", "fridge", "vacuum", "heater", "candle", "painting", "cinema",
    "museum", "cruise", "train", "dentist", "lawyer", "skincare", "cream", "loan", "tyre", "helmet", "skateboard",
    "kettle", "teapot", "spoon", "plate", "socks", "hat", "scarf", "gloves", "dog food", "coffee beans",
]  # fmt: skip
ADJECTIVES = [
    "new", "light", "strong", "simple", "beautiful", "handmade", "classic", "modern", "comfortable", "affordable",
    "famous", "fresh", "quiet", "warm", "premium", "everyday", "perfect", "smart", "lovely", "colourful",
]  # fmt: skip
TIMES = ["slow mornings", "rainy days", "every day", "your home", "the office", "summer", "winter", "the whole family",
         "people who care", "long evenings", "students", "parties", "travel", "a gift", "work and play"]  # fmt: skip
TEMPLATES = [
    "{} for {time}",
    "A {adjective} {} for {time}.",
    "Meet the {adjective} {}. Made for {time}.",
    "{}: {adjective} and {adjective2}",
    "Our {adjective} {} is back! Order now.",
    "The {} you will love. {adjective2} design, fair price.",
    "Get 20% off every {} this week.",
    "{adjective} {} on sale today",
    "Looking for a {}? Ours is {adjective}, {adjective2} and made for {time}.",
    "Wake up to a {adjective} {}",
    "Treat yourself to a {}. Perfect for {time}.",
    "Free delivery on our {adjective} {} until Sunday",
    "{}",
    "{}. Buy two, get one free!",
    "For {time}: the {adjective} {}.",
    "You deserve a {adjective} {}. Shop now.",
]
REQUESTS = ["Be strict.", "The advert is for young people.", "Keep it short.", "We sell online only.",
            "The headline goes above the picture.", "Mind the light."]  # fmt: skip


def ad_copy(rng: random.Random, product: str | None, colour: str | None = None) -> str:
    """Ad copy that offers `product`, or for None something never drawn. It sometimes names the `colour`."""
    thing = rng.choice(NAMES[product] if product else OTHERS)
    if colour and rng.random() < 0.3:
        thing = f"{colour} {thing}"
    adjective, adjective2 = rng.sample(ADJECTIVES, 2)
    text = rng.choice(TEMPLATES).format(thing, adjective=adjective, adjective2=adjective2, time=rng.choice(TIMES))
    style = rng.random()
    if style < 0.06:
        return text.upper()
    return text[0].upper() + text[1:] if style < 0.8 else text


def request(rng: random.Random) -> str | None:
    """A request of the caller's own, or mostly None."""
    return rng.choice(REQUESTS) if rng.random() < 0.15 else None
