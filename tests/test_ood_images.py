from tinycap.evaluation.failures import CATEGORIES, EXCLUSIVE_KINDS, KIND_OF, WORDS
from tinycap.evaluation.ood_images import KINDS, draw_ood_images


def test_ood_images_follow_from_the_seed_and_differ_within_a_kind():
    drawn, again, other = (draw_ood_images(seed, per_kind=3) for seed in (0, 0, 1))
    assert list(drawn) == list(KINDS)
    for kind, pictures in drawn.items():
        assert all(picture.size == (224, 224) and picture.mode == "RGB" for picture in pictures)
        contents = [picture.tobytes() for picture in pictures]
        assert len(set(contents)) == 3, kind
        assert contents == [picture.tobytes() for picture in again[kind]]
        assert contents != [picture.tobytes() for picture in other[kind]]


def test_the_word_lists_agree_with_one_another():
    assert len(KIND_OF) == sum(map(len, WORDS["things"].values())), "a thing is of one kind"
    assert {thing for pair in WORDS["related"] for thing in pair} <= set(KIND_OF)
    assert {thing for things in CATEGORIES.values() for thing in things or ()} <= set(KIND_OF)
    assert set(EXCLUSIVE_KINDS) | set(WORDS["general"]) <= set(WORDS["things"])
