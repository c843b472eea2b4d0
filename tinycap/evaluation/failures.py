"""Where captions go wrong, as far as their photos' human captions can tell.

The rules are plain and prefer silence to false alarms. Words that aren't in `word_lists.json` aren't judged; it was
written by hand for English captions from the 1,300 commonest words of Flickr8k's training captions. A claim of a
caption is *supported* when one human caption of the image names the same thing, a related one, or a word for any of
its kind.

- **wrong object**: an unsupported being, vehicle, sport or object, where at least two human captions agree on another
  one of that kind, which the caption doesn't name.
- **wrong count**: the number of persons or dogs is outside of what each human caption says that names any; at least
  two do.
- **wrong colour**: a thing's colour is none of those that at least two human captions give to it.
- **invented detail**: an unsupported claim that isn't a wrong object: a thing, place or garment that nobody mentions.

Human captions don't mention everything that is there, so that some "invented" details are true. `failure_rates` of a
human caption against the others of its image is the rate of such false alarms; that of captions put at other images is
what the rules find where nearly everything is wrong. Both stand beside the model's.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tinycap.evaluation.caption_metrics.ptb_tokenizer import ptb_tokenize


# - things: kind -> thing -> its words. Like the synonym lists of CHAIR (Rohrbach et al., 2018,
#   https://arxiv.org/abs/1809.02156), they put words that can be said of the same thing together. A word of several
#   things of one kind means any of them ("bike"), of things of several kinds one of each ("surfer").
# - related: things that are hardly told apart on an image, or that come together: one supports the other.
# - general: words for any thing of a kind: they support every one and are supported by every one.
# - children: judged as a category, not as a thing of its own: a boy is a person.
# - colors: names that people use for the same colour share a family; a word may belong to two.
# - counted, collective: beings that are counted, and words that mean at least so many of them by themselves.
# - groups: (at least, at most) so many: "a pair of", "a group of".
WORDS = json.loads(Path(__file__).with_name("word_lists.json").read_text(encoding="utf-8"))


def plural(word: str) -> str:
    """The regular plural of an English noun."""
    if word.endswith("y") and word[-2:-1] not in "aeou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "sh", "ch", "x")) else "s")


def forms(words: str) -> list[str]:
    """Each word of a list with its plural; words of two parts are written with `_`."""
    return [form.replace("_", " ") for word in words.split() for form in (word, plural(word))]


def _index(lists: dict[str, str], plurals: bool = True) -> dict[str, set[str]]:
    index: dict[str, set[str]] = {}
    for name, words in lists.items():
        for word in forms(words) if plurals else words.split():
            index.setdefault(word, set()).add(name)
    return index


COLLECTIVE, NUMBERS, GROUPS = WORDS["collective"], WORDS["numbers"], WORDS["groups"]
KIND_OF = {thing: kind for kind, things in WORDS["things"].items() for thing in things}
THINGS_OF_WORD = _index({thing: words for things in WORDS["things"].values() for thing, words in things.items()})
GENERAL_OF_WORD = _index(WORDS["general"])
COLORS_OF_WORD = _index(WORDS["colors"], plurals=False)
GENDER_OF_WORD = {word: name for name, words in WORDS["genders"].items() for word in forms(words)}
CHILD_WORDS = set(forms(WORDS["children"]))

FAILURES = ("wrong object", "wrong count", "wrong colour", "invented detail")
# Kinds whose things exclude each other: "dog" where everybody says "horse" is a wrong object.
EXCLUSIVE_KINDS = ("being", "vehicle or board", "sport", "object")
# How many human captions have to agree before a caption that differs is wrong.
AGREEMENT = 2
# Categories of images: the things that more than half of the human captions name one of. `None`: an image of children.
CATEGORIES = {
    "people": ("person",),
    "children": None,
    "dogs": ("dog",),
    "other animals": ("cat", "horse", "bird", "cattle", "sheep", "wild animal", "fish"),
    "water": ("water",),
    "snow": ("snow",),
    "grass": ("grass",),
    "beach": ("beach",),
    "rocks and mountains": ("rock",),
    "street and buildings": ("street", "building"),
    "ball games": ("ball", "football", "soccer", "basketball", "baseball", "tennis", "hockey", "volleyball"),
    "boards, skis and sleds": ("skateboard", "skates", "snowboard", "skis", "surfboard", "sled"),
    "bicycles, motorcycles and cars": ("bicycle", "motorcycle", "car", "bus"),
}


@dataclass
class CaptionFacts:
    """The claims of a caption.

    Args:
        words: its words, two-part ones joined by a space.
        things: (word, things it may mean, kind) of every thing that it names.
        general: kinds of which it names an unspecified one.
        colors: thing -> the colours it gives to it.
        counts: being -> (at least, at most) so many, no upper limit being `None`.
        genders: the genders of persons that it names.
        children: whether it names a child.
    """

    words: list[str]
    things: list[tuple[str, frozenset[str], str]] = field(default_factory=list)
    general: set[str] = field(default_factory=set)
    colors: dict[str, set[str]] = field(default_factory=dict)
    counts: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    genders: set[str] = field(default_factory=set)
    children: bool = False

    @property
    def named(self) -> set[str]:
        """All things that it may mean."""
        return set().union(*(things for _, things, _ in self.things))


def parse_caption(caption: str) -> CaptionFacts:
    """Takes a caption apart by the word lists."""
    words: list[str] = []
    for word in ptb_tokenize(caption).split():
        if words and f"{words[-1]} {word}" in THINGS_OF_WORD:
            words[-1] += f" {word}"
        else:
            words.append(word)
    facts = CaptionFacts(words)
    for place, word in enumerate(words):
        by_kind: dict[str, set[str]] = {}
        for thing in THINGS_OF_WORD.get(word, ()):
            by_kind.setdefault(KIND_OF[thing], set()).add(thing)
        facts.things += [(word, frozenset(things), kind) for kind, things in by_kind.items()]
        facts.general |= GENERAL_OF_WORD.get(word, set())
        if word in GENDER_OF_WORD:
            facts.genders.add(GENDER_OF_WORD[word])
        facts.children |= word in CHILD_WORDS
        for thing in set().union(*by_kind.values()):
            colors = _colors_before(words, place)
            if colors:
                facts.colors.setdefault(thing, set()).update(colors)
    _count(facts)
    return facts


def _colors_before(words: list[str], place: int) -> set[str]:
    """The colours of a noun: "black and white" of "black and white dog", with at most one word in between."""
    colors, others = set(), 0
    for word in reversed(words[max(0, place - 5) : place]):
        if word in COLORS_OF_WORD:
            colors |= COLORS_OF_WORD[word]
        elif word not in ("and", ","):
            others += 1
            if colors or others > 1 or word in THINGS_OF_WORD:
                break
    return colors


# Words that end a noun phrase towards its front.
_BREAKS = {
    *("in", "on", "with", "at", "by", "near", "over", "through", "and", "while", "is", "are", "to", "from", "into"),
    *("wearing", "holding", "watching", "chasing", "as", "next", "behind", "beside", "around", "for", "the", "his"),
    *("her", "their", "its", "who", "that", "has", "being", "carrying", "riding"),
}


def _count(facts: CaptionFacts) -> None:
    """Fills `facts.counts` from the numbers and plurals before each person and dog."""
    words = facts.words
    for being in WORDS["counted"]:
        places = [place for place, word in enumerate(words) if being in THINGS_OF_WORD.get(word, ())]
        # "a baby boy", "a german shepherd dog", "a crowd of people": one phrase, counted at its last word.
        places = [place for place in places if place + 1 not in places]
        places = [place for place in places if words[place + 1 : place + 2] != ["of"] or words[place] not in GROUPS]
        if not places:
            continue
        low, high = 0, 0
        for number, place in enumerate(places):
            fewest, most = _number_of(words, place)
            # "the dog", once there is one, may be the same again.
            again = number > 0 and place > 0 and "the" in words[max(0, place - 2) : place]
            low += 0 if again else fewest
            high = None if high is None or most is None else high + most
        facts.counts[being] = (max(low, 1), high)


def _number_of(words: list[str], place: int) -> tuple[int, int | None]:
    """(at least, at most) so many of the noun at `place`."""
    noun = words[place]
    is_plural = noun.endswith("s") or noun in ("men", "women", "children", "people")
    for before in range(place - 1, max(-1, place - 6), -1):
        word = words[before]
        if word in GROUPS and before + 1 < place and words[before + 1] == "of":
            return tuple(GROUPS[word])
        if word in ("several", "many", "few", "some"):
            return tuple(GROUPS[word])
        if word in NUMBERS:
            number = NUMBERS[word]
            # "a dogs" is a slip, and "a couple" counts by its noun.
            if number > 1 or not is_plural and noun not in COLLECTIVE:
                return number, number
        if word in _BREAKS or (word in THINGS_OF_WORD and word.endswith("s")):
            # "a black and white dog"
            if word == "and" and before > 0 and words[before - 1] in COLORS_OF_WORD:
                continue
            break
    if noun in ("couple", "couples"):
        return 2, 2
    if noun in COLLECTIVE:
        return COLLECTIVE[noun], None
    return (2, None) if is_plural else (1, 1)


def _supported(things: frozenset[str], kind: str, references: Sequence[CaptionFacts]) -> bool:
    wanted = set(things)
    for one, other in WORDS["related"]:
        if one in things:
            wanted.add(other)
        if other in things:
            wanted.add(one)
    return any(wanted & facts.named or kind in facts.general for facts in references)


def find_errors(caption: CaptionFacts, references: Sequence[CaptionFacts]) -> dict[str, str]:
    """The failures of one caption: which of `FAILURES`, each with what speaks for it.

    Args:
        caption: of the image; references: what its human captions say.
    """
    errors: dict[str, list[str]] = {}
    agreed = Counter(thing for facts in references for thing in facts.named)
    agreed = {thing: number for thing, number in agreed.items() if number >= AGREEMENT}
    for word, things, kind in caption.things:
        if _supported(things, kind, references):
            continue
        rivals = [thing for thing in agreed if KIND_OF[thing] == kind and thing not in caption.named]
        if kind in EXCLUSIVE_KINDS and rivals:
            rival = max(rivals, key=agreed.get)
            errors.setdefault("wrong object", []).append(f"{word} (humans: {rival})")
        else:
            errors.setdefault("invented detail", []).append(word)
    for being, (low, high) in caption.counts.items():
        theirs = [facts.counts[being] for facts in references if being in facts.counts]
        if len(theirs) >= AGREEMENT and all(_apart((low, high), other) for other in theirs):
            told = " or ".join(sorted({_range(*other) for other in theirs}))
            errors.setdefault("wrong count", []).append(f"{being}: {_range(low, high)} (humans: {told})")
    for thing, colors in caption.colors.items():
        theirs = [facts.colors[thing] for facts in references if thing in facts.colors]
        if len(theirs) >= AGREEMENT and not colors & set().union(*theirs):
            told = ", ".join(sorted(set().union(*theirs)))
            errors.setdefault("wrong colour", []).append(f"{'/'.join(sorted(colors))} {thing} (humans: {told})")
    return {name: "; ".join(dict.fromkeys(reasons)) for name, reasons in errors.items()}


def _apart(one: tuple[int, int | None], other: tuple[int, int | None]) -> bool:
    def ends_before(first, second):
        return first[1] is not None and first[1] < second[0]

    return ends_before(one, other) or ends_before(other, one)


def _range(low: int, high: int | None) -> str:
    return f"{low} or more" if high is None else str(low) if low == high else f"{low} to {high}"


def categories_of(references: Sequence[CaptionFacts]) -> list[str]:
    """The categories of an image: what more than half of its human captions name."""
    categories = []
    for name, things in CATEGORIES.items():
        naming = sum(_in_category(facts, things) for facts in references)
        if 2 * naming > len(references):
            categories.append(name)
    return categories


def _in_category(facts: CaptionFacts, things: tuple[str, ...] | None) -> bool:
    return facts.children if things is None else bool(facts.named & set(things))


def gender_verdicts(caption: CaptionFacts, references: Sequence[CaptionFacts]) -> dict[str, str]:
    """For each gender that a caption names: "confirmed" by a human caption, "contradicted" where they name only the
    other one, "open" where they name none."""
    told = set().union(*(facts.genders for facts in references))
    return {gender: "confirmed" if gender in told else "contradicted" if told else "open" for gender in caption.genders}


def failure_rates(captions: Sequence[CaptionFacts], references: Sequence[Sequence[CaptionFacts]]) -> dict[str, float]:
    """Share (%) of captions with each failure, with any of them, and with none."""
    errors = [find_errors(caption, group) for caption, group in zip(captions, references)]
    rates = {name: 100 * sum(name in failures for failures in errors) / len(errors) for name in FAILURES}
    rates["none of these"] = 100 * sum(not failures for failures in errors) / len(errors)
    return rates


def gender_metrics(captions: Sequence[CaptionFacts], references: Sequence[Sequence[CaptionFacts]]) -> dict[str, float]:
    """How often captions name a person's gender, and what the human captions say to that.

    Returns:
        `named`, the share (%) of captions that name one; and for "male" and "female" each `<gender>_named` (how many
        captions) and `<gender>_confirmed`, `_contradicted` and `_open` (% of these).
    """
    verdicts = [gender_verdicts(caption, group) for caption, group in zip(captions, references)]
    metrics = {"named": 100 * sum(map(bool, verdicts)) / len(verdicts)}
    for gender in ("male", "female"):
        counts = Counter(verdict[gender] for verdict in verdicts if gender in verdict)
        metrics[f"{gender}_named"] = counts.total()
        for verdict in ("confirmed", "contradicted", "open"):
            metrics[f"{gender}_{verdict}"] = 100 * counts[verdict] / max(1, counts.total())
    return metrics


def analyse(captions: Sequence[str], references: Sequence[Sequence[str]], ciders: Sequence[float], seed: int) -> dict:
    """Failures, genders and categories of the captions of N images.

    Args:
        captions: the model's; references: the human ones of each image.
        ciders: CIDEr of each caption.
        seed: of the captions put at other images.

    Returns:
        `failures` and `gender`, each with metrics of the `model`, of a `human` caption against the others of its image,
        and (failures) of the model's captions at `other_photos`; `categories`, a row for each: `photos`, mean `cider`,
        `named`, the share (%) of its images whose caption names it, `right`, the share of captions naming it that a
        human caption supports, and the failure rates; and `photos`, for each image its `failures` and `categories`.
    """
    model = [parse_caption(caption) for caption in captions]
    humans = [[parse_caption(caption) for caption in group] for group in references]
    shift = random.Random(seed).randrange(1, len(model)) if len(model) > 1 else 0
    # Every human caption against the others of its image.
    single, others = [], []
    for group in humans:
        for place in range(len(group) if len(group) > 1 else 0):
            single.append(group[place])
            others.append(group[:place] + group[place + 1 :])
    images = [
        {"failures": find_errors(caption, group), "categories": categories_of(group)}
        for caption, group in zip(model, humans)
    ]
    analysis = {
        "failures": {
            "model": failure_rates(model, humans),
            "other_photos": failure_rates(model[shift:] + model[:shift], humans),
        },
        "gender": {"model": gender_metrics(model, humans)},
        "categories": _category_rows(model, humans, ciders, images),
        "photos": images,
    }
    if single:
        analysis["failures"]["human"] = failure_rates(single, others)
        analysis["gender"]["human"] = gender_metrics(single, others)
    return analysis


def _category_rows(model, humans, ciders, images) -> list[dict]:
    rows = []
    for name, things in CATEGORIES.items():
        members = [index for index, image in enumerate(images) if name in image["categories"]]
        naming = [index for index, facts in enumerate(model) if _in_category(facts, things)]
        right = sum(any(_in_category(facts, things) for facts in humans[index]) for index in naming)
        if not members:
            continue
        failures = [images[index]["failures"] for index in members]
        rows.append(
            {
                "category": name,
                "photos": len(members),
                "cider": sum(ciders[index] for index in members) / len(members),
                "named": 100 * len(set(members) & set(naming)) / len(members),
                "named_in": len(naming),
                "right": 100 * right / len(naming) if naming else None,
                **{failure: 100 * sum(failure in each for each in failures) / len(members) for failure in FAILURES},
            }
        )
    return rows
