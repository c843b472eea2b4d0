"""What to hold a model's scores against: one constant caption, captions of other images, and people."""

import math
import random
from collections import Counter
from collections.abc import Sequence

from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test

from tinycap.evaluation.caption_metrics.ptb_tokenizer import ptb_tokenize
from tinycap.evaluation.metrics import score_captions


# How the constant caption is searched for, see `most_typical_caption`.
NUM_CANDIDATES, NUM_JUDGES = 50, 300


def most_typical_caption(references: Sequence[Sequence[str]], seed: int) -> str:
    """The human caption that scores best as the caption of every image.

    All captions are ranked by their mean similarity to all others: the cosine of TF-IDF vectors of one to four words,
    as CIDEr's but for its clipping and its penalty of other lengths. The `NUM_CANDIDATES` first of the ranking are then
    scored by CIDEr itself as the caption of `NUM_JUDGES` images, drawn by `seed`, and the best one wins.

    Args:
        references: the human captions of each image; a training set's, for a caption that has not seen the test.
    """
    cooked = [cook_refs([ptb_tokenize(caption) for caption in group]) for group in references]
    document_frequency = Counter(ngram for group in cooked for ngram in set().union(*group))
    log_num_images = math.log(max(2, len(cooked)))

    def unit_vectors(counts: dict) -> list[dict]:
        vectors: list[dict] = [{} for _ in range(4)]
        for ngram, count in counts.items():
            vectors[len(ngram) - 1][ngram] = count * (log_num_images - math.log(document_frequency[ngram]))
        norms = [math.sqrt(sum(value**2 for value in vector.values())) or 1.0 for vector in vectors]
        return [{ngram: value / norm for ngram, value in vector.items()} for vector, norm in zip(vectors, norms)]

    mean: Counter = Counter()
    candidates = {}
    for group, captions in zip(cooked, references):
        for counts, caption in zip(group, captions):
            vectors = unit_vectors(counts)
            candidates.setdefault(caption, vectors)
            for vector in vectors:
                mean.update(vector)
    typical = {
        caption: sum(value * mean[ngram] for vector in vectors for ngram, value in vector.items())
        for caption, vectors in candidates.items()
    }
    first = sorted(typical, key=typical.get, reverse=True)[:NUM_CANDIDATES]
    judges = random.Random(seed).sample(cooked, min(NUM_JUDGES, len(cooked)))
    scorer = CiderScorer()
    scorer.crefs = judges
    scorer.compute_doc_freq()

    def cider(caption: str) -> float:
        scorer.ctest = [cook_test(ptb_tokenize(caption))] * len(judges)
        return sum(scorer.compute_cider())

    return max(first, key=cider)


def mean_scores(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over several scorings."""
    return {name: sum(scores[name] for scores in rounds) / len(rounds) for name in rounds[0]}


def leave_one_out(captions: Sequence[str] | None, references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores against all but one of a photo's human captions, the mean over which one is left out.

    Args:
        captions: one for each image; `None`: the human caption that is left out.
        references: at least two human captions of each image; those beyond the shortest list are always kept.
    """
    rounds = []
    for left_out in range(min(map(len, references))):
        predictions = [group[left_out] for group in references] if captions is None else list(captions)
        rest = [[*group[:left_out], *group[left_out + 1 :]] for group in references]
        rounds.append(score_captions(predictions, rest))
    return mean_scores(rounds)


def baseline_scores(
    captions: list[str], references: list[list[str]], training_references: Sequence[Sequence[str]] | None, seed: int
) -> dict[str, dict]:
    """What to hold the scores of N captions against.

    Args:
        captions: the model's; references: the human ones.
        training_references: the human captions that the constant one is chosen from; those of `references`, which then
            choose and judge, where there are none.

    Returns:
        `constant`: one caption for all images (`caption`, chosen from `chosen_from`); `shuffled`: the model's
        captions, each at another image. Where images have several human captions, also `human`: one person's
        caption against the other persons', and `model_leave_one_out`: the model's against the same.
    """
    constant = most_typical_caption(training_references or references, seed)
    shift = random.Random(seed).randrange(1, len(captions)) if len(captions) > 1 else 0
    metrics = {
        "constant": {
            **score_captions([constant] * len(references), references),
            "caption": constant,
            "chosen_from": "training captions" if training_references else "evaluated captions",
        },
        "shuffled": score_captions(captions[shift:] + captions[:shift], references),
    }
    several = [index for index, group in enumerate(references) if len(group) > 1]
    if several:
        humans = [references[index] for index in several]
        metrics["human"] = leave_one_out(None, humans)
        metrics["model_leave_one_out"] = leave_one_out([captions[index] for index in several], humans)
    return metrics
