import json

import pytest

from tinycap.training.scenes import (
    BACKGROUNDS,
    COLORS,
    PLURALS,
    Group,
    Scene,
    describe_scene,
    draw_scene,
    make_scene,
    read_caption,
    scene_splits,
    score_scene_captions,
)


SCENES = [make_scene(seed) for seed in range(300)]
TWO = Scene(
    (Group("ball", "red", "large", 2, "left"), Group("star", "blue", "small", 1, "right")), "to the left of", "sand", 5
)


def test_a_seed_is_a_scene_for_ever():
    assert make_scene(12345) == make_scene(12345)
    assert make_scene(7).to_json() == json.dumps(
        {
            "groups": [
                {"kind": g.kind, "color": g.color, "size": g.size, "count": g.count, "place": g.place}
                for g in make_scene(7).groups
            ],
            "relation": make_scene(7).relation,
            "background": make_scene(7).background,
            "seed": 7,
        }
    )
    assert draw_scene(TWO, 64).tobytes() == draw_scene(TWO, 64).tobytes()


def test_scenes_survive_their_json():
    assert all(Scene.from_json(scene.to_json()) == scene for scene in SCENES)


def test_every_kind_colour_count_and_background_occurs():
    groups = [group for scene in SCENES for group in scene.groups]
    assert {group.kind for group in groups} == set(PLURALS)
    assert {group.color for group in groups} == set(COLORS)
    assert {group.count for group in groups} == {1, 2, 3}
    assert {scene.background for scene in SCENES} == set(BACKGROUNDS)


def test_each_scene_has_five_different_captions_and_all_are_true():
    for scene in SCENES:
        captions = describe_scene(scene)
        assert len(set(captions)) == 5
        scores = score_scene_captions(captions, [scene] * 5)
        assert all(value == 1.0 for name, value in scores.items() if name.endswith("_accuracy")), (captions, scores)


def test_captions_of_other_scenes_score_low():
    captions = [describe_scene(scene)[0] for scene in SCENES]
    scores = score_scene_captions(captions[1:] + captions[:1], SCENES)
    assert scores["object_accuracy"] < 0.3 and scores["color_accuracy"] < 0.1 and scores["exact_accuracy"] < 0.05


@pytest.mark.parametrize("size", [64, pytest.param(224, marks=pytest.mark.slow)])
def test_the_colour_that_is_told_is_the_one_that_is_drawn(size):
    for scene in SCENES[:60]:
        pixels = set(draw_scene(scene, size).getdata())
        for group in scene.groups:
            near = [p for p in pixels if all(abs(a - b) < 40 for a, b in zip(p, COLORS[group.color]))]
            assert near, (scene, group)


def test_more_things_cover_more_of_the_picture():
    def covered(count):
        scene = Scene((Group("box", "red", "large", count, "left"),), None, "sky", 3)
        return sum(1 for red, green, blue in draw_scene(scene, 64).getdata() if red > 180 and green < 80)

    assert 1.7 < covered(2) / covered(1) < 2.3 and 2.5 < covered(3) / covered(1) < 3.4


def score(caption: str) -> dict:
    return score_scene_captions([caption], [TWO])


@pytest.mark.parametrize(
    "caption, objects, colors, counts",
    [
        ("Two red balls to the left of a blue star.", 1, 1, 1),
        ("A blue star and two red balls", 1, 1, 1),
        ("Two red balls.", 1 / 2, 1 / 2, 1 / 2),
        ("Two blue balls and a red star.", 1, 0, 1),
        ("Three red balls and a blue star.", 1, 1, 1 / 2),
        ("Two red boxes and a blue star.", 1 / 2, 1 / 2, 1 / 2),
        ("", 0, 0, 0),
        ("xyz red the of", 0, 0, 0),
        ("a red ball a red ball a red ball a red ball", 1 / 4, 1 / 4, 0),
    ],
)
def test_objects_colours_and_counts_are_right_or_wrong(caption, objects, colors, counts):
    found = score(caption)
    assert (found["object_accuracy"], found["color_accuracy"], found["count_accuracy"]) == pytest.approx(
        (objects, colors, counts)
    )


def test_naming_everything_does_not_pay():
    everything = " and ".join(f"a {color} {kind}" for kind in PLURALS for color in COLORS)
    assert score(everything)["object_accuracy"] < 0.1


def test_relations_hold_in_both_directions():
    assert score("Two red balls to the left of a blue star.")["relation_accuracy"] == 1
    assert score("A blue star to the right of two red balls.")["relation_accuracy"] == 1
    assert score("A blue star to the left of two red balls.")["relation_accuracy"] == 0
    assert "relation_accuracy" not in score("A blue star and two red balls.")


def test_one_false_word_makes_a_caption_inexact():
    assert score("Two large red balls to the left of a small blue star on the sand.")["exact_accuracy"] == 1
    for wrong in ("Two small red balls and a blue star.", "Two red balls and a blue star in the snow."):
        assert score(wrong)["exact_accuracy"] == 0


def test_a_picture_of_something_is_no_place():
    mentions, relation, background = read_caption("A picture of two red balls on the sand.")
    assert [(m.kind, m.color, m.count) for m in mentions] == [("ball", "red", 2)]
    assert relation is None and background == "sand"


def test_no_validation_scene_is_a_training_scene():
    splits = scene_splits(80, 30, seed=1, image_size=32)
    train, validation = ([Scene.from_json(text) for text in splits[name]["scene"]] for name in ("train", "validation"))
    assert (len(train), len(validation)) == (80, 30)
    assert not {scene.truth() for scene in train} & {scene.truth() for scene in validation}
    assert splits["train"][0]["image"].size == (32, 32)
    assert splits["train"]["captions"][0] == describe_scene(train[0])


def test_other_seeds_are_other_scenes():
    first, second = (scene_splits(20, 5, seed=seed, image_size=16)["train"]["scene"] for seed in (1, 2))
    assert not set(first) & set(second)


def test_as_many_captions_as_scenes():
    with pytest.raises(ValueError, match="each of 1 scenes, got 2"):
        score_scene_captions(["a", "b"], [TWO])
