"""What a captioner says to pictures that aren't photos: drawings, text, blank pictures, noise, all drawn here."""

import math
import random
from collections import Counter
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFont

from tinycap.evaluation.captioning import caption_dataset
from tinycap.evaluation.explanation import mean_token_probability, token_probabilities
from tinycap.evaluation.failures import parse_caption
from tinycap.processing_tinycap import preprocess_images
from tinycap.training.scenes import draw_scene, make_scene


SIZE = 224
PER_KIND = 20
WORDS = (
    "invoice total amount due payment within thirty days account number signature date page section table figure "
    "chapter contract party shall agree terms conditions notice address telephone order delivery quantity price"
).split()


def _color(rng: random.Random) -> tuple[int, int, int]:
    return tuple(rng.randrange(256) for _ in range(3))


def blank(rng: random.Random) -> Image.Image:
    """One colour all over."""
    return Image.new("RGB", (SIZE, SIZE), _color(rng))


def noise(rng: random.Random) -> Image.Image:
    """Every pixel a random colour."""
    return Image.frombytes("RGB", (SIZE, SIZE), rng.randbytes(3 * SIZE * SIZE))


def gradient(rng: random.Random) -> Image.Image:
    """One colour fading into another."""
    ramp = Image.linear_gradient("L").resize((SIZE, SIZE)).rotate(90 * rng.randrange(4))
    return Image.composite(Image.new("RGB", ramp.size, _color(rng)), Image.new("RGB", ramp.size, _color(rng)), ramp)


def text_page(rng: random.Random) -> Image.Image:
    """Black lines of words on white, as a scanned letter."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=rng.choice((9, 11, 14)))
    top = 10
    while top < SIZE - 20:
        draw.text((10, top), " ".join(rng.choices(WORDS, k=7))[: rng.randrange(15, 42)], fill="black", font=font)
        top += int(font.size * 1.5)
    return image


def bar_chart(rng: random.Random) -> Image.Image:
    """Coloured bars on two axes."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    draw, bars = ImageDraw.Draw(image), rng.randrange(4, 9)
    width = 180 // bars
    for bar in range(bars):
        left = 28 + bar * width
        draw.rectangle((left, rng.randrange(30, 180), left + width - 6, 200), fill=_color(rng))
    draw.line((24, 20, 24, 200, 214, 200), fill="black", width=2)
    return image


def line_drawing(rng: random.Random) -> Image.Image:
    """A house, a sun, a tree and a figure in black outlines, as a child draws them."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    draw, left, pen = ImageDraw.Draw(image), rng.randrange(10, 60), rng.randrange(2, 4)
    draw.rectangle((left, 110, left + 70, 190), outline="black", width=pen)
    draw.line((left, 110, left + 35, 70, left + 70, 110), fill="black", width=pen)
    draw.rectangle((left + 26, 150, left + 44, 190), outline="black", width=pen)
    x, y = rng.randrange(160, 200), rng.randrange(25, 45)
    draw.ellipse((x - 15, y - 15, x + 15, y + 15), outline="black", width=pen)
    for ray in range(8):
        dx, dy = math.cos(ray * math.pi / 4), math.sin(ray * math.pi / 4)
        draw.line((x + 19 * dx, y + 19 * dy, x + 27 * dx, y + 27 * dy), fill="black", width=pen)
    x = rng.randrange(150, 200)
    draw.line((x, 190, x, 140), fill="black", width=pen)
    draw.ellipse((x - 22, 100, x + 22, 145), outline="black", width=pen)
    x = left + rng.randrange(80, 100)
    draw.ellipse((x - 7, 138, x + 7, 152), outline="black", width=pen)
    for limb in ((x, 152, x, 172), (x - 11, 160, x + 11, 160), (x, 172, x - 9, 190), (x, 172, x + 9, 190)):
        draw.line(limb, fill="black", width=pen)
    draw.line((0, 190, SIZE, 190), fill="black", width=pen)
    return image


def drawn_scene(rng: random.Random) -> Image.Image:
    """A scene of `training/scenes.py`: flat coloured shapes."""
    return draw_scene(make_scene(rng.getrandbits(48)), SIZE)


KINDS: dict[str, Callable[[random.Random], Image.Image]] = {
    "blank": blank,
    "noise": noise,
    "colour gradient": gradient,
    "page of text": text_page,
    "bar chart": bar_chart,
    "line drawing": line_drawing,
    "drawn scene": drawn_scene,
}


def draw_ood_images(seed: int, per_kind: int = PER_KIND) -> dict[str, list[Image.Image]]:
    """`per_kind` pictures of each of `KINDS`, the same for the same seed."""
    return {
        kind: [draw(random.Random(f"{seed}-{kind}-{number}")) for number in range(per_kind)]
        for kind, draw in KINDS.items()
    }


def mean_caption_probability(model, pixel_values, tokens) -> float:
    """The `mean_token_probability` of all tokens of N captions together."""
    return mean_token_probability(
        [token for caption in token_probabilities(model, pixel_values, tokens) for token in caption]
    )


def caption_ood_images(model, processor, seed: int, **generate_kwargs) -> list[dict]:
    """Captions all of them.

    Returns:
        for each kind a row: `kind`, `pictures`, their `captions` and `tokens`, how many are `distinct`, the
        `commonest` one and its `share` (%), the share that `names_person_or_dog`, and the `token_probability`
        (geometric mean).
    """
    rows = []
    for kind, pictures in draw_ood_images(seed).items():
        found = caption_dataset(model, processor, [{"image": picture} for picture in pictures], **generate_kwargs)
        pixel_values = preprocess_images(processor.image_processor, pictures).to(model.device)
        counts = Counter(found.captions)
        commonest, number = counts.most_common(1)[0]
        named = [parse_caption(caption).named & {"person", "dog"} for caption in found.captions]
        rows.append(
            {
                "kind": kind,
                "pictures": len(pictures),
                "distinct": len(counts),
                "commonest": commonest,
                "share": 100 * number / len(pictures),
                "names_person_or_dog": 100 * sum(map(bool, named)) / len(pictures),
                "token_probability": mean_caption_probability(model, pixel_values, found.tokens),
                "captions": found.captions,
                "tokens": found.tokens,
            }
        )
    return rows
