"""The products of the demo adverts, as lists of flat shapes.

Coordinates run from -1 (left, top) to 1 (right, bottom) of the product's square. The last number of a shape is its
shade: 1 is the product's own colour, smaller is darker, larger is lighter.
"""

from PIL import ImageDraw

Rgb = tuple[int, int, int]
Shape = tuple[str, tuple[float, ...], float]

PRODUCTS: dict[str, list[Shape]] = {
    "mug": [
        ("ring", (0.2, -0.45, 0.95, 0.4), 0.8),
        ("box", (-0.75, -0.75, 0.5, 0.8), 1.0),
        ("oval", (-0.75, -0.9, 0.5, -0.6), 0.6),
    ],
    "bottle": [
        ("box", (-0.14, -1.0, 0.14, -0.8), 0.5),
        ("box", (-0.13, -0.8, 0.13, -0.2), 1.0),
        ("polygon", (-0.13, -0.45, 0.13, -0.45, 0.4, -0.1, -0.4, -0.1), 1.0),
        ("box", (-0.4, -0.1, 0.4, 1.0), 1.0),
        ("box", (-0.4, 0.2, 0.4, 0.6), 1.6),
    ],
    "shoe": [
        ("polygon", (-0.95, -0.4, -0.3, -0.45, 0.2, 0.0, 0.8, 0.1, 1.0, 0.4, -0.95, 0.4), 1.0),
        ("box", (-0.95, 0.4, 1.0, 0.58), 0.45),
        ("line", (-0.3, -0.2, -0.05, -0.3), 1.7),
        ("line", (-0.1, -0.05, 0.12, -0.18), 1.7),
    ],
    "lamp": [
        ("polygon", (-0.4, -0.95, 0.4, -0.95, 0.8, -0.05, -0.8, -0.05), 1.0),
        ("box", (-0.07, -0.05, 0.07, 0.8), 0.6),
        ("oval", (-0.45, 0.72, 0.45, 0.98), 0.6),
    ],
    "phone": [
        ("box", (-0.5, -1.0, 0.5, 1.0), 1.0),
        ("box", (-0.4, -0.8, 0.4, 0.75), 0.25),
        ("oval", (-0.08, 0.79, 0.08, 0.95), 1.7),
    ],
    "chair": [
        ("box", (-0.6, -1.0, -0.42, 1.0), 0.8),
        ("box", (-0.6, -1.0, 0.5, -0.75), 1.0),
        ("box", (-0.6, -0.55, 0.5, -0.35), 1.0),
        ("box", (0.34, -1.0, 0.5, 0.1), 0.8),
        ("box", (-0.65, 0.0, 0.75, 0.22), 1.0),
        ("box", (0.57, 0.2, 0.73, 1.0), 0.8),
    ],
    "cake": [
        ("box", (-0.85, 0.15, 0.85, 0.85), 1.0),
        ("box", (-0.55, -0.4, 0.55, 0.15), 1.0),
        ("box", (-0.85, 0.15, 0.85, 0.28), 1.8),
        ("box", (-0.55, -0.4, 0.55, -0.27), 1.8),
        ("line", (0.0, -0.85, 0.0, -0.4), 0.6),
        ("oval", (-0.09, -1.0, 0.09, -0.75), 1.7),
    ],
    "umbrella": [
        ("dome", (-1.0, -0.9, 1.0, 0.7), 1.0),
        ("polygon", (0.0, -0.9, 0.3, -0.1, -0.3, -0.1), 0.7),
        ("line", (0.0, -0.1, 0.0, 0.85), 0.5),
        ("line", (0.0, 0.85, 0.22, 0.85), 0.5),
    ],
}


def shaded(colour: Rgb, shade: float) -> Rgb:
    """`colour` darker (`shade` below 1) or mixed with white (above 1; 2 is white)."""
    if shade <= 1:
        red, green, blue = (round(part * shade) for part in colour)
    else:
        red, green, blue = (round(part + (255 - part) * (shade - 1)) for part in colour)
    return red, green, blue


def draw_product(canvas: ImageDraw.ImageDraw, product: str, colour: Rgb, centre: tuple[int, int], half: int) -> None:
    """Draw `product` in a square of `2 * half` pixels around `centre`."""
    width = half // 8
    for kind, points, shade in PRODUCTS[product]:
        fill = shaded(colour, shade)
        place = [centre[i % 2] + point * half for i, point in enumerate(points)]
        match kind:
            case "box":
                canvas.rectangle(place, fill=fill)
            case "oval":
                canvas.ellipse(place, fill=fill)
            case "ring":
                canvas.ellipse(place, outline=fill, width=width)
            case "dome":
                canvas.pieslice(place, 180, 360, fill=fill)
            case "polygon":
                canvas.polygon(place, fill=fill)
            case "line":
                canvas.line(place, fill=fill, width=width)
