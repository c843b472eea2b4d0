"""Scenes: pictures drawn from a known truth, with true captions, for training without files and scoring without doubt.

A scene is one or two groups of like things (a kind, a colour, a size, one to three of them), in a place or in a
relation to each other, on a background. Things stand in the cells of a three by three grid: with patches of a third of
the side, a Vision Transformer sees each thing in one token, and minutes of a CPU are enough to learn it.

Reading order: a scene, its picture, its captions, data sets of scenes, and how a caption is held against the truth.
"""

import io
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import datasets
from PIL import Image, ImageDraw


PLURALS = {
    "ball": "balls",
    "box": "boxes",
    "triangle": "triangles",
    "star": "stars",
    "ring": "rings",
    "cross": "crosses",
}
# Few colours and many kinds: telling a batch's scenes apart by colour and count alone must not do, or a contrastive
# teacher never looks at shapes.
COLORS = {
    "red": (214, 40, 40),
    "blue": (40, 80, 220),
    "yellow": (250, 220, 30),
    "black": (20, 20, 20),
}
# What a caption says, what is drawn, and the colours that would not stand out.
BACKGROUNDS = {
    "grass": ("on the grass", (150, 205, 120), ()),
    "sky": ("in the sky", (165, 210, 245), ()),
    "sand": ("on the sand", (228, 200, 150), ()),
    "snow": ("in the snow", (236, 240, 244), ()),
    "night": ("at night", (45, 50, 80), ("black", "blue")),
}
# Radii, in sides of the picture.
SIZES = {"small": 0.105, "large": 0.148}
COUNTS = {1: "a", 2: "two", 3: "three"}
# What a caption says of a place, and the cells (column, row) that belong to it.
PLACES = {
    "middle": ("in the middle", ((1, 1), (0, 1), (2, 1))),
    "left": ("on the left", ((0, 0), (0, 1), (0, 2))),
    "right": ("on the right", ((2, 0), (2, 1), (2, 2))),
    "top": ("at the top", ((0, 0), (1, 0), (2, 0))),
    "bottom": ("at the bottom", ((0, 2), (1, 2), (2, 2))),
}
# How the first of two groups stands to the second, and how the second stands to the first.
INVERSES = {"to the left of": "to the right of", "to the right of": "to the left of"}
# Groups are told in reading order, which leaves one; with their places. Groups above each other were tried: in the same
# ten minutes a model learns which group comes first, but not yet along which of two axes.
RELATIONS = {"to the left of": ("left", "right")}


# --- a scene ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """`count` things of one `kind`, `color` and `size`, at a `place` of the picture (see `PLACES`)."""

    kind: str
    color: str
    size: str
    count: int
    place: str


@dataclass(frozen=True)
class Scene:
    """The truth of a picture.

    Args:
        groups: one or two, of different kinds, from left to right.
        relation: how the first group stands to the second (see `RELATIONS`); `None` with one group.
        background: see `BACKGROUNDS`.
        seed: fixes where exactly everything is drawn.
    """

    groups: tuple[Group, ...]
    relation: str | None
    background: str
    seed: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        values = json.loads(text)
        return cls(**{**values, "groups": tuple(Group(**group) for group in values["groups"])})

    def truth(self) -> tuple:
        """Everything a caption could say of the scene: two scenes of the same truth are the same scene."""
        return self.groups, self.relation, self.background


def make_scene(seed: int) -> Scene:
    """The scene of a seed: the same one on every machine."""
    rng = random.Random(f"scene/{seed}")
    background = rng.choice(sorted(BACKGROUNDS))
    relation = rng.choice(sorted(RELATIONS)) if rng.random() < 0.6 else None
    places = RELATIONS[relation] if relation else (rng.choice(sorted(PLACES)),)
    kinds = rng.sample(sorted(PLURALS), len(places))
    colors = [color for color in COLORS if color not in BACKGROUNDS[background][2]]
    groups = tuple(
        Group(kind, rng.choice(colors), rng.choice(sorted(SIZES)), rng.choice(sorted(COUNTS)), place)
        for kind, place in zip(kinds, places)
    )
    return Scene(groups, relation, background, seed)


# --- its picture ------------------------------------------------------------------------------------------------------


def draw_scene(scene: Scene, image_size: int) -> Image.Image:
    """Draws a scene as an RGB picture of `image_size` x `image_size` pixels; the same layout at every size."""
    rng = random.Random(f"picture/{scene.seed}")
    # Drawn four times as large and shrunk: edges come out smooth.
    side = 4 * image_size
    red, green, blue = BACKGROUNDS[scene.background][1]
    shade = rng.uniform(0.94, 1.04)
    picture = Image.new("RGB", (side, side), tuple(min(255, round(value * shade)) for value in (red, green, blue)))
    draw = ImageDraw.Draw(picture)
    for group in scene.groups:
        cells = PLACES[group.place][1]
        # The middle is filled from the centre, an edge anywhere along it.
        cells = cells[: group.count] if group.place == "middle" else rng.sample(cells, group.count)
        for column, row in cells:
            x, y = ((cell + 0.5) / 3 + rng.uniform(-0.012, 0.012) for cell in (column, row))
            radius = SIZES[group.size] * rng.uniform(0.95, 1.02)
            color = tuple(min(255, max(0, value + rng.randint(-10, 10))) for value in COLORS[group.color])
            _draw_thing(draw, group.kind, color, x * side, y * side, radius * side)
    return picture.resize((image_size, image_size), Image.Resampling.BOX)


def _draw_thing(draw: ImageDraw.ImageDraw, kind: str, color: tuple, x: float, y: float, radius: float) -> None:
    outline = tuple(value // 3 for value in color) if sum(color) > 120 else (110, 110, 110)
    line = max(1, round(radius * 0.1))

    def polygon(points: list[tuple[float, float]]) -> None:
        corners = [(x + radius * dx, y + radius * dy) for dx, dy in points]
        draw.polygon(corners, fill=color)
        draw.line([*corners, corners[0]], fill=outline, width=line, joint="curve")

    box = (x - radius, y - radius, x + radius, y + radius)
    if kind == "ball":
        draw.ellipse(box, fill=color, outline=outline, width=line)
    elif kind == "ring":
        draw.ellipse(box, outline=outline, width=round(radius * 0.5))
        inset = line
        inner = (box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset)
        draw.ellipse(inner, outline=color, width=round(radius * 0.5) - 2 * line)
    elif kind == "box":
        polygon([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])
    elif kind == "triangle":
        polygon([(0, -1), (0.95, 0.8), (-0.95, 0.8)])
    elif kind == "star":
        turns = [(-math.pi / 2 + index * math.pi / 5, 1.05 if index % 2 == 0 else 0.42) for index in range(10)]
        polygon([(length * math.cos(angle), length * math.sin(angle)) for angle, length in turns])
    else:
        arm = 0.3
        quarter = [(-arm, -1), (arm, -1), (arm, -arm)]
        polygon([point for turn in range(4) for point in (_turn(dx, dy, turn) for dx, dy in quarter)])


def _turn(dx: float, dy: float, quarters: int) -> tuple[float, float]:
    for _ in range(quarters):
        dx, dy = -dy, dx
    return dx, dy


# --- its captions -----------------------------------------------------------------------------------------------------


def _name(group: Group, with_size: bool = False) -> str:
    kind = group.kind if group.count == 1 else PLURALS[group.kind]
    return " ".join([COUNTS[group.count], *([group.size] if with_size else []), group.color, kind])


def describe_scene(scene: Scene, seed: int = 0) -> list[str]:
    """Five captions, differently worded; each is true and names every group's kind, colour and count."""
    first = scene.groups[0]
    where = BACKGROUNDS[scene.background][0]
    if scene.relation is None:
        place = PLACES[first.place][0]
        verb = "is" if first.count == 1 else "are"
        options = [
            f"{_name(first)} {place}.",
            f"{_name(first)} {where}.",
            f"there {verb} {_name(first, True)} {place}.",
            f"a picture of {_name(first, True)} {where}.",
            f"{where} there {verb} {_name(first)}.",
            f"{_name(first, True)} {place}, {where}.",
            f"a picture of {_name(first)}.",
        ]
    else:
        second, inverse = scene.groups[1], INVERSES[scene.relation].removesuffix(" of")
        verb = "is" if first.count == 1 else "are"
        options = [
            f"{_name(first)} {scene.relation} {_name(second)}.",
            f"{_name(first)} with {_name(second)} {inverse}.",
            f"{_name(first)} and {_name(second)} {where}.",
            f"there {verb} {_name(first, True)} {scene.relation} {_name(second, True)}.",
            f"a picture of {_name(first, True)} and {_name(second, True)}.",
            f"{where}, {_name(first)} {scene.relation} {_name(second)}.",
            f"{where} there {verb} {_name(first)} with {_name(second)} {inverse}.",
        ]
    chosen = random.Random(f"captions/{scene.seed}/{seed}").sample(options, 5)
    return [caption[0].upper() + caption[1:] for caption in chosen]


# --- data sets --------------------------------------------------------------------------------------------------------

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("string"),
        "scene": datasets.Value("string"),
    }
)


def scene_dataset(scenes: Sequence[Scene], image_size: int) -> datasets.Dataset:
    """Draws scenes into a data set of `image`, `captions` (five), `image_id` and `scene` (JSON)."""
    rows = {"image": [], "captions": [], "image_id": [], "scene": []}
    for scene in scenes:
        buffer = io.BytesIO()
        draw_scene(scene, image_size).save(buffer, "PNG", compress_level=1)
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["captions"].append(describe_scene(scene))
        rows["image_id"].append(f"scene-{scene.seed}")
        rows["scene"].append(scene.to_json())
    return datasets.Dataset.from_dict(rows, features=FEATURES)


def scene_splits(num_train: int, num_validation: int, seed: int, image_size: int) -> datasets.DatasetDict:
    """Training and validation scenes; no validation scene has the truth of a training scene."""
    seeds = random.Random(f"splits/{seed}")
    train = [make_scene(seeds.getrandbits(48)) for _ in range(num_train)]
    seen = {scene.truth() for scene in train}
    validation = []
    while len(validation) < num_validation:
        scene = make_scene(seeds.getrandbits(48))
        if scene.truth() not in seen:
            seen.add(scene.truth())
            validation.append(scene)
    return datasets.DatasetDict(
        train=scene_dataset(train, image_size), validation=scene_dataset(validation, image_size)
    )


# --- a caption against the truth --------------------------------------------------------------------------------------

SINGULARS = {word: kind for kind, plural in PLURALS.items() for word in (kind, plural)}
MENTION = re.compile(
    rf"(?:\b(?P<count>{'|'.join(COUNTS.values())})\s+)?(?:\b(?P<size>{'|'.join(SIZES)})\s+)?"
    rf"(?:\b(?P<color>{'|'.join(COLORS)})\s+)?\b(?P<kind>{'|'.join(sorted(SINGULARS, key=len, reverse=True))})\b"
)
NUMBERS = {word: count for count, word in COUNTS.items()}


@dataclass(frozen=True)
class Mention:
    """What a caption says of one group; `None` where it says nothing."""

    kind: str
    color: str | None
    size: str | None
    count: int | None
    place: str | None


def read_caption(caption: str) -> tuple[list[Mention], str | None, str | None]:
    """What a caption claims: the groups it mentions, the relation between the first two, the background."""
    text = caption.lower()
    found = list(MENTION.finditer(text))
    # "a picture of" is no place, and every place stands behind its group.
    place = next((name for name, (words, _) in PLACES.items() if re.search(rf"\b{words}\b(?! of)", text)), None)
    mentions = [
        Mention(
            SINGULARS[match["kind"]],
            match["color"],
            match["size"],
            NUMBERS.get(match["count"]),
            place if len(found) == 1 else None,
        )
        for match in found
    ]
    relation = None
    if len(found) >= 2:
        between, behind = text[found[0].end() : found[1].start()], text[found[1].end() :]
        relation = next((name for name in INVERSES if re.search(rf"\b{name}\b", between)), None)
        if relation is None and "with" in between.split():
            # "A with B to the right": the other way round.
            told = next((n for n in INVERSES if re.match(rf"\W*{n.removesuffix(' of')}\b(?! of)", behind)), None)
            relation = None if told is None else INVERSES[told]
    background = next((name for name, (words, *_) in BACKGROUNDS.items() if re.search(rf"\b{words}\b", text)), None)
    return mentions, relation, background


def score_scene_captions(captions: Sequence[str], scenes: Sequence[str | Scene]) -> dict[str, float]:
    """Holds captions against the truth of their scenes; shares from 0 to 1.

    An object is a group of a scene. Each caption is charged for as many objects as it should name or does name,
    whichever is more, so that naming everything doesn't pay. Of these,

    - `object_accuracy`: named by the right kind,
    - `color_accuracy`: by the right kind and colour,
    - `count_accuracy`: by the right kind and count.

    Of the captions that state it, `relation_accuracy`, `size_accuracy`, `place_accuracy` and `background_accuracy` are
    right (absent when none does); `relation_share` of the scenes with two groups have their relation stated.
    `exact_accuracy` is the share of captions that name every object with colour and count and say nothing wrong.

    Raises:
        ValueError: there are more or fewer captions than scenes.
    """
    if len(captions) != len(scenes):
        raise ValueError(f"expected one caption for each of {len(scenes)} scenes, got {len(captions)}")
    right = {name: [] for name in ("relation", "size", "place", "background", "exact")}
    objects = kinds = colors = counts = pairs = 0
    for caption, scene in zip(captions, scenes):
        scene = Scene.from_json(scene) if isinstance(scene, str) else scene
        mentions, relation, background = read_caption(caption)
        truth = {group.kind: group for group in scene.groups}
        wrong = 0
        named = {}
        for mention in mentions:
            group = truth.get(mention.kind)
            if group is None or mention.kind in named:
                wrong += 1
                continue
            named[mention.kind] = mention
            colors += mention.color == group.color
            counts += mention.count == group.count
            wrong += (mention.color != group.color) + (mention.count != group.count)
            for name in ("size", "place"):
                if getattr(mention, name) is not None:
                    right[name].append(getattr(mention, name) == getattr(group, name))
                    wrong += not right[name][-1]
        kinds += len(named)
        objects += max(len(truth), len(mentions))
        wrong += len(truth) - len(named)
        pairs += scene.relation is not None
        if relation is not None:
            ends = tuple(mention.kind for mention in mentions[:2])
            told = {(ends, relation), (ends[::-1], INVERSES[relation])}
            right["relation"].append((tuple(group.kind for group in scene.groups), scene.relation) in told)
            wrong += not right["relation"][-1]
        if background is not None:
            right["background"].append(background == scene.background)
            wrong += not right["background"][-1]
        right["exact"].append(wrong == 0)
    scores = {
        "object_accuracy": kinds / objects if objects else 0.0,
        "color_accuracy": colors / objects if objects else 0.0,
        "count_accuracy": counts / objects if objects else 0.0,
        "relation_share": len(right["relation"]) / pairs if pairs else 0.0,
        "num_objects": objects,
    }
    scores.update({f"{name}_accuracy": sum(values) / len(values) for name, values in right.items() if values})
    return scores
