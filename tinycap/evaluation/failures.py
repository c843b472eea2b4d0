"""Finds errors in captions by comparing them with the human captions of their images.

Words that aren't in `word_lists.json` aren't judged; it was written by hand for English captions from the 1,300
commonest words of Flickr8k's training captions. What a caption names is *supported* when one human caption of the image
names the same thing, a related one, or a general word for its kind.

- **wrong object**: an unsupported being, vehicle, sport or object, where at least two human captions agree on another
  one of that kind, which the caption doesn't name.
- **wrong count**: the number of persons or dogs is outside of what each human caption says that names any; at least
  two do.
- **wrong colour**: a thing's colour is none of those that at least two human captions give to it.
- **invented detail**: anything else that is unsupported. Human captions don't mention everything, so that some of it is
  true: compare a model's rates with those of human captions against the others of their images.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tinycap.evaluation.caption_metrics.ptb_tokenizer import ptb_tokenize
from tinycap.evaluation.metrics import captions_of_other_images


# What each list means is said in the file.
WORDS = json.loads(Path(__file__).with_name("word_lists.json").read_text(encoding="utf-8"))

FAILURES = ("wrong object", "wrong count", "wrong colour", "invented detail")
# Kinds whose things exclude each other: "dog" where everybody says "horse" is a wrong object.
EXCLUSIVE_KINDS = ("being", "vehicle or board", "sport", "object")
# How many human captions have to agree before a caption that differs is wrong.
AGREEMENT = 2


def _forms(words: str) -> list[str]:
    """Each word of a list with its regular plural; words of two parts are written with `_`."""
    forms = []
    for word in words.split():
        plural = word + ("es" if word.endswith(("s", "sh", "ch", "x")) else "s")
        if word.endswith("y") and word[-2:-1] not in "aeou":
            plural = word[:-1] + "ies"
        forms += [word.replace("_", " "), plural.replace("_", " ")]
    return forms


def _names_of_words(words_of: dict[str, str], split: Callable[[str], list[str]] = _forms) -> dict[str, list[str]]:
    index: dict[str, list[str]] = {}
    for name, words in words_of.items():
        for word in dict.fromkeys(split(words)):
            index.setdefault(word, []).append(name)
    return index


THINGS_OF_WORD = _names_of_words({thing: words for kind in WORDS["things"].values() for thing, words in kind.items()})
GENERAL_OF_WORD = _names_of_words(WORDS["general"])
COLORS_OF_WORD = _names_of_words(WORDS["colors"], str.split)
GENDERS_OF_WORD = _names_of_words(WORDS["genders"])
CHILD_WORDS, PHRASE_BREAKS = set(_forms(WORDS["children"])), set(WORDS["phrase_breaks"].split())
COLLECTIVE, NUMBERS, CATEGORIES = WORDS["collective"], WORDS["numbers"], WORDS["categories"]
GROUPS = {word: (low, high or math.inf) for word, (low, high) in WORDS["groups"].items()}
KIND_OF = {thing: kind for kind, things in WORDS["things"].items() for thing in things}
SUPPORTED_BY = {thing: {thing} for thing in KIND_OF}
for _one, _other in WORDS["related"]:
    SUPPORTED_BY[_one].add(_other)
    SUPPORTED_BY[_other].add(_one)


@dataclass
class CaptionFacts:
    """What a caption says."""

    counts: dict[str, tuple[float, float]]  # being -> (at least, at most) so many
    things: list[tuple[str, list[str], str]] = field(default_factory=list)  # (word, things it may mean, their kind)
    general: set[str] = field(default_factory=set)  # kinds of which it names an unspecified thing
    colors: dict[str, set[str]] = field(default_factory=dict)  # thing -> the colours it gives to it
    genders: set[str] = field(default_factory=set)
    names_child: bool = False

    @property
    def named(self) -> set[str]:
        """All things that it may mean."""
        return set().union(*(things for _, things, _ in self.things))

    def is_about(self, category: str) -> bool:
        things = CATEGORIES[category]
        return self.names_child if things is None else not self.named.isdisjoint(things)


def parse_caption(caption: str) -> CaptionFacts:
    """Takes a caption apart by the word lists."""
    words: list[str] = []
    for word in ptb_tokenize(caption).split():
        if words and f"{words[-1]} {word}" in THINGS_OF_WORD:
            words[-1] += f" {word}"
        else:
            words.append(word)
    facts = CaptionFacts(_counts(words))
    for place, word in enumerate(words):
        by_kind: dict[str, list[str]] = {}
        colors = _colors_before(words, place)
        for thing in THINGS_OF_WORD.get(word, ()):
            by_kind.setdefault(KIND_OF[thing], []).append(thing)
            if colors:
                facts.colors.setdefault(thing, set()).update(colors)
        facts.things += [(word, things, kind) for kind, things in by_kind.items()]
        facts.general.update(GENERAL_OF_WORD.get(word, ()))
        facts.genders.update(GENDERS_OF_WORD.get(word, ()))
        facts.names_child |= word in CHILD_WORDS
    return facts


def _colors_before(words: list[str], place: int) -> set[str]:
    """The colours of a noun: "black and white" of "black and white dog", with at most one word in between."""
    colors, others = set(), 0
    for word in reversed(words[max(0, place - 5) : place]):
        if word in COLORS_OF_WORD:
            colors.update(COLORS_OF_WORD[word])
        elif word not in ("and", ","):
            others += 1
            if colors or others > 1 or word in THINGS_OF_WORD:
                break
    return colors


def _counts(words: list[str]) -> dict[str, tuple[float, float]]:
    """How many persons and dogs the words name, from the numbers and plurals before each."""
    counts = {}
    for being in WORDS["counted"]:
        places = [place for place, word in enumerate(words) if being in THINGS_OF_WORD.get(word, ())]
        # "a baby boy", "a german shepherd dog", "a crowd of people": one phrase, counted at its last word.
        places = [place for place in places if place + 1 not in places]
        places = [place for place in places if words[place + 1 : place + 2] != ["of"] or words[place] not in GROUPS]
        low = high = 0
        for number, place in enumerate(places):
            at_least, at_most = _number_of(words, place)
            # "the dog", once there is one, may be the same again.
            low += 0 if number > 0 and "the" in words[max(0, place - 2) : place] else at_least
            high += at_most
        if places:
            counts[being] = (max(low, 1), high)
    return counts


def _number_of(words: list[str], place: int) -> tuple[float, float]:
    """(at least, at most) so many of the noun at `place`."""
    noun = words[place]
    is_plural = noun.endswith("s") or noun in ("men", "women", "children", "people")
    for before in range(place - 1, max(-1, place - 6), -1):
        word = words[before]
        is_group = word in GROUPS and before + 1 < place and words[before + 1] == "of"
        if is_group or word in ("several", "many", "few", "some"):
            return GROUPS[word]
        # "a dogs" is a slip, and "a couple" counts by its noun.
        if word in NUMBERS and (NUMBERS[word] > 1 or not is_plural and noun not in COLLECTIVE):
            return NUMBERS[word], NUMBERS[word]
        in_colors = word == "and" and before > 0 and words[before - 1] in COLORS_OF_WORD
        if (word in PHRASE_BREAKS and not in_colors) or (word in THINGS_OF_WORD and word.endswith("s")):
            break
    if noun in ("couple", "couples"):
        return 2, 2
    if noun in COLLECTIVE:
        return COLLECTIVE[noun], math.inf
    return (2, math.inf) if is_plural else (1, 1)


def find_errors(caption: CaptionFacts, references: Sequence[CaptionFacts]) -> dict[str, str]:
    """The errors of one caption, by the human captions of its image: which of `FAILURES`, each with its reasons."""
    errors: dict[str, list[str]] = {name: [] for name in FAILURES}
    naming = Counter(thing for facts in references for thing in sorted(facts.named))
    agreed = [thing for thing, number in naming.most_common() if number >= AGREEMENT]
    for word, things, kind in caption.things:
        supporting = set().union(*(SUPPORTED_BY[thing] for thing in things))
        if any(supporting & facts.named or kind in facts.general for facts in references):
            continue
        rivals = [thing for thing in agreed if KIND_OF[thing] == kind and thing not in caption.named]
        if kind in EXCLUSIVE_KINDS and rivals:
            errors["wrong object"].append(f"{word} (humans: {rivals[0]})")
        else:
            errors["invented detail"].append(word)
    for being, (low, high) in caption.counts.items():
        theirs = [facts.counts[being] for facts in references if being in facts.counts]
        if len(theirs) >= AGREEMENT and all(high < at_least or at_most < low for at_least, at_most in theirs):
            expected = " or ".join(sorted({_range(*other) for other in theirs}))
            errors["wrong count"].append(f"{being}: {_range(low, high)} (humans: {expected})")
    for thing, colors in caption.colors.items():
        theirs = [facts.colors[thing] for facts in references if thing in facts.colors]
        expected = set().union(*theirs)
        if len(theirs) >= AGREEMENT and colors.isdisjoint(expected):
            reason = f"{'/'.join(sorted(colors))} {thing} (humans: {', '.join(sorted(expected))})"
            errors["wrong colour"].append(reason)
    return {name: "; ".join(dict.fromkeys(reasons)) for name, reasons in errors.items() if reasons}


def _range(low: float, high: float) -> str:
    return f"{low} or more" if high == math.inf else str(low) if low == high else f"{low} to {high}"


def categories_of(references: Sequence[CaptionFacts]) -> list[str]:
    """The categories of an image: what more than half of its human captions name."""
    return [name for name in CATEGORIES if 2 * sum(facts.is_about(name) for facts in references) > len(references)]


def gender_verdicts(caption: CaptionFacts, references: Sequence[CaptionFacts]) -> dict[str, str]:
    """For each gender that a caption names: "confirmed" by a human caption, "contradicted" where they name only the
    other one, "open" where they name none."""
    named = set().union(*(facts.genders for facts in references))
    otherwise = "contradicted" if named else "open"
    return {gender: "confirmed" if gender in named else otherwise for gender in caption.genders}


def _percent(conditions: Iterable[bool]) -> float:
    conditions = [*conditions]
    return 100 * sum(conditions) / len(conditions)


def _failure_rates(errors_of_captions: Sequence[dict[str, str]]) -> dict[str, float]:
    return {name: _percent(name in errors for errors in errors_of_captions) for name in FAILURES}


def _metrics(captions: Sequence[CaptionFacts], references: Sequence[Sequence[CaptionFacts]]) -> tuple[dict, dict]:
    """The failures and genders of some captions, see `analyse`."""
    all_errors = [find_errors(*pair) for pair in zip(captions, references)]
    failures = {**_failure_rates(all_errors), "none of these": _percent(not errors for errors in all_errors)}
    verdicts = [gender_verdicts(*pair) for pair in zip(captions, references)]
    genders = {"named": _percent(map(bool, verdicts))}
    for gender in ("male", "female"):
        counts = Counter(verdict[gender] for verdict in verdicts if gender in verdict)
        genders[f"{gender}_named"] = counts.total()
        for verdict in ("confirmed", "contradicted", "open"):
            genders[f"{gender}_{verdict}"] = 100 * counts[verdict] / max(1, counts.total())
    return failures, genders


def analyse(captions: Sequence[str], references: Sequence[Sequence[str]], ciders: Sequence[float], seed: int) -> dict:
    """Failures, genders and categories of a model's captions of N images; all rates are %.

    Args:
        references: the human captions of each image.
        ciders: CIDEr of each caption.
        seed: of the captions put at other images.

    Returns:
        `failures` and `gender`: rates of the `model`, of a `human` caption against the others of its image and, of the
        failures, of the model's captions at `other_photos`; `categories`: a row for each, with `named`, the share of
        its images whose caption names it, and `right`, the share of the captions naming it that a human one supports;
        `photos`: the `failures` and `categories` of each image.
    """
    model = [parse_caption(caption) for caption in captions]
    humans = [[parse_caption(caption) for caption in group] for group in references]
    images = [{"failures": find_errors(*pair), "categories": categories_of(pair[1])} for pair in zip(model, humans)]
    failures, gender = {}, {}
    failures["model"], gender["model"] = _metrics(model, humans)
    failures["other_photos"], _ = _metrics(captions_of_other_images(model, seed), humans)
    several = [group for group in humans if len(group) > 1]
    left_out = [(group[i], group[:i] + group[i + 1 :]) for group in several for i in range(len(group))]
    if left_out:
        failures["human"], gender["human"] = _metrics(*zip(*left_out))
    categories = []
    for name in CATEGORIES:
        members = [index for index, image in enumerate(images) if name in image["categories"]]
        if members:
            row = {"category": name, "photos": len(members), "cider": sum(ciders[i] for i in members) / len(members)}
            row["named"] = _percent(model[index].is_about(name) for index in members)
            naming = [human for facts, human in zip(model, humans) if facts.is_about(name)]
            right = [any(facts.is_about(name) for facts in human) for human in naming]
            row |= {"named_in": len(naming), "right": _percent(right) if right else None}
            categories.append(row | _failure_rates([images[index]["failures"] for index in members]))
    return {"failures": failures, "gender": gender, "categories": categories, "photos": images}
