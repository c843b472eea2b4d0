"""Scenes: synthetic images with known content and true captions, for training without data and for exact scoring.

A scene is one or two groups of like objects (a kind, a colour, a size, one to three of them), in a place or in a
relation to each other, on a background. Objects lie in the cells of a three by three grid: with patches of a third of
the side, a Vision Transformer has one token for each object, and learns the task in minutes on a CPU.
"""

import io
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import datasets
from PIL import Image, ImageDraw


PLURALS = {kind: f"{kind}s" for kind in ("ball", "triangle", "star", "ring")} | {"box": "boxes", "cross": "crosses"}
# Few colours and many kinds: if colour and count alone told a batch's scenes apart, a contrastive teacher would not
# learn shapes.
COLORS = {"red": (214, 40, 40), "blue": (40, 80, 220), "yellow": (250, 220, 30), "black": (20, 20, 20)}
# Words of a caption, the colour drawn, and the colours without contrast to it.
BACKGROUNDS = {
    "grass": ("on the grass", (150, 205, 120), ()),
    "sky": ("in the sky", (165, 210, 245), ()),
    "sand": ("on the sand", (228, 200, 150), ()),
    "snow": ("in the snow", (236, 240, 244), ()),
    "night": ("at night", (45, 50, 80), ("black", "blue")),
}
# Radii, relative to the image's side.
SIZES = {"small": 0.105, "large": 0.148}
COUNTS = {1: "a", 2: "two", 3: "three"}
# Words of a caption, and the cells (column, row) of the place.
PLACES = {
    "middle": ("in the middle", ((1, 1), (0, 1), (2, 1))),
    "left": ("on the left", ((0, 0), (0, 1), (0, 2))),
    "right": ("on the right", ((2, 0), (2, 1), (2, 2))),
    "top": ("at the top", ((0, 0), (1, 0), (2, 0))),
    "bottom": ("at the bottom", ((0, 2), (1, 2), (2, 2))),
}
# The relation of the second group to the first, by that of the first to the second.
INVERSES = {"to the left of": "to the right of", "to the right of": "to the left of"}
# With the groups' places. Captions name groups in reading order, which leaves one relation; with vertical ones too, a
# model doesn't learn within ten minutes along which axis the groups lie.
RELATIONS = {"to the left of": ("left", "right")}


@dataclass(frozen=True)
class Group:
    """`count` like objects at a `place` of the image; `None` for what a caption doesn't state."""

    kind: str
    color: str | None
    size: str | None
    count: int | None
    place: str | None


@dataclass(frozen=True)
class Scene:
    """The content of an image: one or two groups of different kinds from left to right, the relation of the first to
    the second (`None` with one group), and the background; `seed` fixes the exact positions."""

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
        """Everything that a caption can state about the scene."""
        return self.groups, self.relation, self.background


def make_scene(seed: int) -> Scene:
    """The scene of a seed, equal on every machine."""
    rng = random.Random(f"scene/{seed}")
    background = rng.choice(sorted(BACKGROUNDS))
    relation = rng.choice(sorted(RELATIONS)) if rng.random() < 0.6 else None
    places = RELATIONS[relation] if relation else (rng.choice(sorted(PLACES)),)
    kinds = rng.sample(sorted(PLURALS), len(places))
    choices = [color for color in COLORS if color not in BACKGROUNDS[background][2]], sorted(SIZES), sorted(COUNTS)
    groups = tuple(Group(kind, *map(rng.choice, choices), place) for kind, place in zip(kinds, places))
    return Scene(groups, relation, background, seed)


POLYGONS = {
    "box": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
    "star": [
        (length * math.cos(angle), length * math.sin(angle))
        for angle, length in ((-math.pi / 2 + i * math.pi / 5, 0.42 if i % 2 else 1.05) for i in range(10))
    ],
    "cross": [
        (x * cos - y * sin, x * sin + y * cos)
        for cos, sin in ((1, 0), (0, 1), (-1, 0), (0, -1))
        for x, y in ((-0.3, -1), (0.3, -1), (0.3, -0.3))
    ],
}


def draw_scene(scene: Scene, image_size: int) -> Image.Image:
    """Draws a scene as an RGB image of `image_size` x `image_size` pixels; the same layout at every size."""
    rng = random.Random(f"picture/{scene.seed}")
    # Drawn at four times the size and reduced, for smooth edges.
    side = 4 * image_size
    shade = rng.uniform(0.94, 1.04)
    color = tuple(min(255, round(value * shade)) for value in BACKGROUNDS[scene.background][1])
    image = Image.new("RGB", (side, side), color)
    draw = ImageDraw.Draw(image)
    for group in scene.groups:
        cells = PLACES[group.place][1]
        # The middle is filled from the centre, an edge in any order.
        cells = cells[: group.count] if group.place == "middle" else rng.sample(cells, group.count)
        for column, row in cells:
            x, y = ((cell + 0.5) / 3 + rng.uniform(-0.012, 0.012) for cell in (column, row))
            radius = SIZES[group.size] * rng.uniform(0.95, 1.02)
            color = tuple(min(255, max(0, value + rng.randint(-10, 10))) for value in COLORS[group.color])
            _draw_object(draw, group.kind, color, x * side, y * side, radius * side)
    return image.resize((image_size, image_size), Image.Resampling.BOX)


def _draw_object(draw: ImageDraw.ImageDraw, kind: str, color: tuple, x: float, y: float, radius: float) -> None:
    outline = tuple(value // 3 for value in color) if sum(color) > 120 else (110, 110, 110)
    line = max(1, round(radius * 0.1))
    box = (x - radius, y - radius, x + radius, y + radius)
    if kind == "ball":
        draw.ellipse(box, fill=color, outline=outline, width=line)
    elif kind == "ring":
        draw.ellipse(box, outline=outline, width=round(radius * 0.5))
        inner = (box[0] + line, box[1] + line, box[2] - line, box[3] - line)
        draw.ellipse(inner, outline=color, width=round(radius * 0.5) - 2 * line)
    else:
        corners = [(x + radius * dx, y + radius * dy) for dx, dy in POLYGONS[kind]]
        draw.polygon(corners, fill=color)
        draw.line([*corners, corners[0]], fill=outline, width=line, joint="curve")


# Words in captions of one group, and of two; capitals stand for groups with their sizes.
ONE_GROUP = (
    *("{a} {place}.", "{a} {where}.", "there {verb} {A} {place}.", "a picture of {A} {where}."),
    *("{where} there {verb} {a}.", "{A} {place}, {where}.", "a picture of {a}."),
)
TWO_GROUPS = (
    *("{a} {relation} {b}.", "{a} with {b} {inverse}.", "{a} and {b} {where}.", "there {verb} {A} {relation} {B}."),
    *("a picture of {A} and {B}.", "{where}, {a} {relation} {b}.", "{where} there {verb} {a} with {b} {inverse}."),
)


def describe_scene(scene: Scene) -> list[str]:
    """Five captions, differently worded; each is true and names every group's kind, colour and count."""
    first = scene.groups[0]
    words = {"where": BACKGROUNDS[scene.background][0], "place": PLACES[first.place][0]}
    words["verb"] = "is" if first.count == 1 else "are"
    for letter, group in zip("ab", scene.groups):
        count, kind = COUNTS[group.count], group.kind if group.count == 1 else PLURALS[group.kind]
        words[letter] = f"{count} {group.color} {kind}"
        words[letter.upper()] = f"{count} {group.size} {group.color} {kind}"
    if scene.relation is not None:
        words.update(relation=scene.relation, inverse=INVERSES[scene.relation].removesuffix(" of"))
    options = [wording.format(**words) for wording in (TWO_GROUPS if scene.relation else ONE_GROUP)]
    chosen = random.Random(f"captions/{scene.seed}/0").sample(options, 5)
    return [caption[0].upper() + caption[1:] for caption in chosen]


def _draw_rows(scenes: Sequence[Scene], image_size: int) -> datasets.Dataset:
    rows = []
    for scene in scenes:
        buffer = io.BytesIO()
        draw_scene(scene, image_size).save(buffer, "PNG", compress_level=1)
        row = {"image": {"bytes": buffer.getvalue(), "path": None}, "captions": describe_scene(scene)}
        rows.append({**row, "image_id": f"scene-{scene.seed}", "scene": scene.to_json()})
    text = datasets.Value("string")
    features = {"image": datasets.Image(), "captions": datasets.List(text), "image_id": text, "scene": text}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def scene_splits(num_train: int, num_validation: int, seed: int, image_size: int) -> datasets.DatasetDict:
    """Draws rows of `image`, `captions` (five), `image_id` and `scene` (JSON) for training and validation.

    A validation scene has the content of no other scene.
    """
    seeds = random.Random(f"splits/{seed}")
    train = [make_scene(seeds.getrandbits(48)) for _ in range(num_train)]
    seen = {scene.truth() for scene in train}
    validation = []
    while len(validation) < num_validation:
        scene = make_scene(seeds.getrandbits(48))
        if scene.truth() not in seen:
            seen.add(scene.truth())
            validation.append(scene)
    splits = {"train": train, "validation": validation}
    return datasets.DatasetDict({name: _draw_rows(scenes, image_size) for name, scenes in splits.items()})


SINGULARS = {word: kind for kind, plural in PLURALS.items() for word in (kind, plural)}
MENTION = re.compile(
    rf"(?:\b(?P<count>{'|'.join(COUNTS.values())})\s+)?(?:\b(?P<size>{'|'.join(SIZES)})\s+)?"
    rf"(?:\b(?P<color>{'|'.join(COLORS)})\s+)?\b(?P<kind>{'|'.join(sorted(SINGULARS, key=len, reverse=True))})\b"
)
NUMBERS = {word: count for count, word in COUNTS.items()}


def read_caption(caption: str) -> tuple[list[Group], str | None, str | None]:
    """What a caption states: the groups it mentions, the relation between the first two, the background."""
    text = caption.lower()
    found = list(MENTION.finditer(text))
    # A place follows its group; "to the right of" is a relation.
    place = next((name for name, (words, _) in PLACES.items() if re.search(rf"\b{words}\b(?! of)", text)), None)
    if len(found) != 1:
        place = None
    groups = [
        Group(SINGULARS[match["kind"]], match["color"], match["size"], NUMBERS.get(match["count"]), place)
        for match in found
    ]
    relation = None
    if len(found) >= 2:
        between, behind = text[found[0].end() : found[1].start()], text[found[1].end() :]
        relation = next((name for name in INVERSES if re.search(rf"\b{name}\b", between)), None)
        if relation is None and "with" in between.split():
            # "A with B to the right": the inverse relation.
            told = (name for name in INVERSES if re.match(rf"\W*{name.removesuffix(' of')}\b(?! of)", behind))
            relation = INVERSES.get(next(told, None))
    background = next((name for name, (words, *_) in BACKGROUNDS.items() if re.search(rf"\b{words}\b", text)), None)
    return groups, relation, background


def _judge(caption: str, scene: Scene) -> dict[str, list[bool]]:
    """What a caption states about its scene, by subject: whether each statement is true."""
    mentions, relation, background = read_caption(caption)
    truth = {group.kind: group for group in scene.groups}
    num_objects = max(len(truth), len(mentions))
    judged = {name: [] for name in ("object", "color", "count", "relation", "size", "place", "background")}
    for mention in mentions:
        # Once for each kind: a second mention of it is wrong.
        if (group := truth.pop(mention.kind, None)) is not None:
            judged["object"].append(True)
            for name in ("color", "count", "size", "place"):
                if (stated := getattr(mention, name)) is not None:
                    judged[name].append(stated == getattr(group, name))
    for name in ("object", "color", "count"):
        judged[name] += [False] * (num_objects - len(judged[name]))
    if relation is not None:
        kinds = tuple(mention.kind for mention in mentions[:2])
        stated = ((kinds, relation), (kinds[::-1], INVERSES[relation]))
        judged["relation"] = [(tuple(group.kind for group in scene.groups), scene.relation) in stated]
    if background is not None:
        judged["background"] = [background == scene.background]
    return {**judged, "exact": [all(map(all, judged.values()))]}


def score_scene_captions(captions: Sequence[str], scenes: Sequence[str | Scene]) -> dict[str, float]:
    """Compares captions with the content of their scenes (or its JSON); shares from 0 to 1.

    An object is a group of a scene; `num_objects` counts for each caption those it should name or those it names,
    whichever is more, so that naming everything doesn't pay. Of these, `object_accuracy` have the right kind,
    `color_accuracy` the right kind and colour, `count_accuracy` the right kind and count.

    `relation_accuracy`, `size_accuracy`, `place_accuracy` and `background_accuracy` are shares of the captions that
    state it (absent when none does); `relation_share` of the scenes with two groups have their relation stated.
    `exact_accuracy` is the share of captions that name every object with colour and count and state nothing wrong.
    """
    if len(captions) != len(scenes):
        raise ValueError(f"expected one caption for each of {len(scenes)} scenes, got {len(captions)}")
    scenes = [Scene.from_json(scene) if isinstance(scene, str) else scene for scene in scenes]
    judged = defaultdict(list)
    for caption, scene in zip(captions, scenes):
        for name, values in _judge(caption, scene).items():
            judged[name] += values
    pairs = sum(scene.relation is not None for scene in scenes)
    return {
        **{f"{name}_accuracy": sum(values) / len(values) for name, values in judged.items() if values},
        "relation_share": len(judged["relation"]) / pairs if pairs else 0.0,
        "num_objects": len(judged["object"]),
    }
