"""Out-of-distribution images for a captioner of photos: drawings, text, blank images and noise, all drawn here."""

import random
from collections import Counter

from PIL import Image, ImageDraw, ImageFont

from tinycap.evaluation.captioning import caption_dataset
from tinycap.evaluation.failures import parse_caption
from tinycap.training.scenes import draw_scene, make_scene


SIZE = 224
PER_KIND = 20
WORDS = (
    "invoice total amount due payment within thirty days account number signature date page section table figure "
    "chapter contract party shall agree terms conditions notice address telephone order delivery quantity price"
).split()


def _color(rng: random.Random) -> tuple[int, int, int]:
    return tuple(rng.randrange(256) for _ in range(3))


def _blank(color: str | tuple[int, int, int] = "white") -> Image.Image:
    return Image.new("RGB", (SIZE, SIZE), color)


def text_page(rng: random.Random) -> Image.Image:
    """Black lines of words on white, as a scanned letter."""
    image = _blank()
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=rng.choice((9, 11, 14)))
    for top in range(10, SIZE - 20, int(font.size * 1.5)):
        draw.text((10, top), " ".join(rng.choices(WORDS, k=7))[: rng.randrange(15, 42)], fill="black", font=font)
    return image


def bar_chart(rng: random.Random) -> Image.Image:
    """Coloured bars on two axes."""
    image = _blank()
    draw, bars = ImageDraw.Draw(image), rng.randrange(4, 9)
    width = 180 // bars
    for left in range(28, 28 + bars * width, width):
        draw.rectangle((left, rng.randrange(30, 180), left + width - 6, 200), fill=_color(rng))
    draw.line((24, 20, 24, 200, 214, 200), fill="black", width=2)
    return image


KINDS = {
    "blank": lambda rng: _blank(_color(rng)),
    "noise": lambda rng: Image.frombytes("RGB", (SIZE, SIZE), rng.randbytes(3 * SIZE * SIZE)),
    "page of text": text_page,
    "bar chart": bar_chart,
    "drawn scene": lambda rng: draw_scene(make_scene(rng.getrandbits(48)), SIZE),
}


def draw_ood_images(seed: int, per_kind: int = PER_KIND) -> dict[str, list[Image.Image]]:
    """`per_kind` images of each of `KINDS`, the same for the same seed."""
    return {
        kind: [draw(random.Random(f"{seed}-{kind}-{number}")) for number in range(per_kind)]
        for kind, draw in KINDS.items()
    }


def caption_ood_images(model, processor, seed: int, **generate_kwargs) -> list[dict]:
    """Draws images and captions them.

    Returns:
        for each kind a row: `kind`, number of `pictures`, `distinct` captions, the `commonest` one, the share
        (%) that `names_person_or_dog`, the `token_probability` (geometric mean), and the `captions`, `tokens` and
        `images` themselves.
    """
    rows = []
    for kind, images in draw_ood_images(seed).items():
        captioned = caption_dataset(model, processor, [{"image": image} for image in images], **generate_kwargs)
        row = {"kind": kind, "pictures": len(images), "distinct": len(set(captioned.captions))}
        [(row["commonest"], _)] = Counter(captioned.captions).most_common(1)
        named = [parse_caption(caption).named for caption in captioned.captions]
        row["names_person_or_dog"] = 100 * sum(not names.isdisjoint(("person", "dog")) for names in named) / len(images)
        row["token_probability"] = captioned.mean_token_probability()
        rows.append({**row, "captions": captioned.captions, "tokens": captioned.tokens, "images": images})
    return rows
