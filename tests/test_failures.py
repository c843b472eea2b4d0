import math

import pytest

from tinycap.evaluation.failures import (
    analyse,
    categories_of,
    find_errors,
    gender_verdicts,
    parse_caption,
)


def failures(caption: str, *references: str) -> dict[str, str]:
    return find_errors(parse_caption(caption), [parse_caption(text) for text in references])


DOGS = ["A brown dog runs on the grass.", "A tan dog is running.", "The dog runs across a lawn."]


# --- parsing captions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "caption, being, count",
    [
        ("A dog runs.", "dog", (1, 1)),
        ("Dogs run.", "dog", (2, math.inf)),
        ("Two brown and white dogs run.", "dog", (2, 2)),
        ("A pair of small dogs", "dog", (2, 2)),
        ("A german shepherd dog", "dog", (1, 1)),
        ("A dog chases another dog", "dog", (2, 2)),
        ("A dog bites the dog", "dog", (1, 2)),
        ("A man and a woman with a dog", "person", (2, 2)),
        ("A group of young people", "person", (2, math.inf)),
        ("A crowd of people watches", "person", (3, math.inf)),
        ("Three football players in red", "person", (3, 3)),
        ("A little baby boy", "person", (1, 1)),
        ("several children and a dog", "person", (3, math.inf)),
        ("People on a street", "person", (2, math.inf)),
        ("A couple sits on a bench", "person", (2, 2)),
    ],
)
def test_persons_and_dogs_are_counted(caption, being, count):
    assert parse_caption(caption).counts[being] == count


def test_a_noun_has_the_colours_before_it():
    facts = parse_caption("A black and white dog and a man in a light blue T-shirt with a big red ball")
    assert facts.colors["dog"] == {"black", "white"} and facts.colors["shirt"] == {"blue"}
    assert facts.colors["ball"] == {"red"} and "person" not in facts.colors


def test_words_of_two_parts_plurals_and_words_for_several_things_are_known():
    assert parse_caption("girls in bathing suits").named == {"person", "swimwear"}
    assert parse_caption("puppies on beaches").named == {"dog", "beach"}
    assert {"person", "surfboard"} <= parse_caption("a surfer").named
    assert parse_caption("qwerty uiop").named == set()


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_true_caption_has_no_failures():
    assert failures("A brown dog runs through a field.", *DOGS) == {}
    assert failures("An animal runs.", *DOGS) == {}


def test_another_being_than_everybody_names_is_a_wrong_object():
    assert failures("A horse runs on grass.", *DOGS) == {"wrong object": "horse (humans: dog)"}
    assert "wrong object" not in failures("A horse runs.", DOGS[0], "Something runs."), (
        "one person's word is not enough"
    )


def test_what_nobody_mentions_is_an_invented_detail():
    assert failures("A brown dog in a hat runs to a bench.", *DOGS) == {"invented detail": "hat; bench"}


def test_a_word_of_several_meanings_is_wrong_only_if_all_are():
    assert failures("A man on a bike", "A man on a motorcycle", "A motorcyclist") == {}
    assert "wrong object" in failures("A man on a skateboard", "A man on a motorcycle", "A motorcyclist")


def test_a_number_that_every_human_contradicts_is_a_wrong_count():
    assert failures("Two dogs on grass", *DOGS) == {"wrong count": "dog: 2 (humans: 1)"}
    assert failures("A dog on grass", "Two dogs", "Three dogs", "A dog on grass and its friend") == {}
    assert failures("A dog on grass", "Dogs on grass", "Two dogs") == {"wrong count": "dog: 1 (humans: 2 or 2 or more)"}


def test_a_colour_that_nobody_gives_is_a_wrong_colour():
    assert failures("A black dog runs on grass", *DOGS) == {"wrong colour": "black dog (humans: brown)"}
    assert failures("A golden dog runs on grass", *DOGS) == {}, "called brown by others"
    assert failures("A black dog on grass", DOGS[0], DOGS[2]) == {}, "only one human gives a colour"


@pytest.mark.parametrize(
    "caption, verdicts",
    [
        ("A man runs", {"male": "confirmed"}),
        ("A woman runs", {"female": "contradicted"}),
        ("A girl and a boy run", {"female": "contradicted", "male": "confirmed"}),
        ("A person runs with his dog", {}),
    ],
)
def test_a_gender_is_confirmed_or_contradicted_by_the_humans(caption, verdicts):
    assert (
        gender_verdicts(parse_caption(caption), [parse_caption("A boy runs."), parse_caption("A child runs.")])
        == verdicts
    )
    assert set(gender_verdicts(parse_caption(caption), [parse_caption("A child.")]).values()) <= {"open"}


def test_a_category_is_what_most_humans_name():
    facts = [parse_caption(text) for text in ("A dog swims.", "A puppy in a lake.", "A wet animal.")]
    assert categories_of(facts) == ["dogs", "water"]
    assert categories_of([parse_caption("A boy on a sled.")]) == ["people", "children", "boards, skis and sleds"]


def test_the_analysis_sets_the_model_between_humans_and_chance():
    references = [DOGS, ["Two men on a street.", "Two people on a road.", "Two guys in a city."]] * 6
    captions = ["A brown dog runs on grass.", "Two women on a street."] * 6
    # An odd shift assigns every caption to an image of the other kind.
    seed = next(
        seed
        for seed in range(20)
        if analyse(captions, references, [1.0] * 12, seed)["failures"]["other_photos"]["none of these"] == 0
    )
    found = analyse(captions, references, [10.0, 20.0] * 6, seed)
    assert found["failures"]["model"]["none of these"] == 100 == found["failures"]["human"]["none of these"]
    assert found["failures"]["other_photos"]["wrong object"] == 100
    assert found["gender"]["model"] == {
        **{"named": 50, "male_named": 0, "male_confirmed": 0, "male_contradicted": 0, "male_open": 0},
        **{"female_named": 6, "female_confirmed": 0, "female_contradicted": 100, "female_open": 0},
    }
    rows = {row["category"]: row for row in found["categories"]}
    assert rows["dogs"]["photos"] == 6 and rows["dogs"]["cider"] == 10 and rows["dogs"]["named"] == 100
    assert rows["people"]["cider"] == 20 and rows["people"]["right"] == 100 and "snow" not in rows
    assert [photo["categories"] for photo in found["photos"][:2]] == [
        ["dogs", "grass"],
        ["people", "street and buildings"],
    ]
