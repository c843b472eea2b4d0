"""Metrics: baselines of caption scores, retrieval, and how well the student reproduces its teacher's embeddings."""

import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from tinycap.evaluation.caption_metrics.caption_metrics import cider_of_each, score_captions
from tinycap.evaluation.caption_metrics.ptb_tokenizer import ptb_tokenize


# Of the search for the constant caption, see `most_typical_caption`.
NUM_CANDIDATES, NUM_SCORED_IMAGES = 50, 300
# Rows of similarities held in memory at once.
CHUNK = 1024


@torch.no_grad()
def distillation_fidelity(student_embeds: torch.Tensor, teacher_embeds: torch.Tensor) -> dict[str, float]:
    """Compares the embeddings of the same N images, two (N, D) tensors of any norm.

    CLIP's embeddings lie in a narrow cone, where even a constant vector has a small cosine distance to all of them:
    read the distance beside that constant's, the cosine after centring, and retrieval.

    Returns:
        `cosine_distance`, the mean of 1 - cos; `constant_cosine_distance`, that of the best constant vector (the
        direction of the teacher's mean); `centered_cosine`, the mean cosine after subtracting each side's mean;
        `recall_at_1` and `recall_at_5`, how often (%) the image's own teacher embedding is the student's nearest, or
        among the five nearest, of all N.

    Raises:
        ValueError: the shapes differ, or there is no image.
    """
    if student_embeds.shape != teacher_embeds.shape or student_embeds.dim() != 2 or not len(student_embeds):
        raise ValueError(
            f"expected two (N, D) tensors of embeddings, got {tuple(student_embeds.shape)} of the student and "
            f"{tuple(teacher_embeds.shape)} of the teacher"
        )
    student, teacher = F.normalize(student_embeds.double(), dim=-1), F.normalize(teacher_embeds.double(), dim=-1)
    own = (student * teacher).sum(dim=-1, keepdim=True)
    # Ties count against the student, so that a constant one doesn't retrieve everything; rounding makes no tie.
    chunks = zip(student.split(CHUNK), own.split(CHUNK))
    ranks = torch.cat([(rows @ teacher.t() >= cosines - 1e-12).sum(dim=1) for rows, cosines in chunks])
    centered = F.cosine_similarity(student - student.mean(dim=0), teacher - teacher.mean(dim=0), dim=-1)
    return {
        "cosine_distance": (1 - own).mean().item(),
        "constant_cosine_distance": (1 - teacher @ F.normalize(teacher.mean(dim=0), dim=-1)).mean().item(),
        "centered_cosine": centered.mean().item(),
        "recall_at_1": 100 * (ranks <= 1).double().mean().item(),
        "recall_at_5": 100 * (ranks <= 5).double().mean().item(),
    }


def retrieval_recall(image_embeds: torch.Tensor, text_embeds: torch.Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict:
    """Recall at k in %, in both directions, of (N, D) images and (N * K, D) captions, an image's next to each other;
    unit norm."""
    num_images, num_texts = len(image_embeds), len(text_embeds)
    similarity = image_embeds @ text_embeds.t()
    is_own = torch.arange(num_images)[:, None] == torch.arange(num_texts) // (num_texts // num_images)
    metrics = {}
    for name, scores, is_right in (
        ("image_to_text", similarity, is_own),
        ("text_to_image", similarity.t(), is_own.t()),
    ):
        for k in ks:
            nearest = scores.topk(min(k, scores.shape[1]), dim=1).indices
            metrics[f"{name}_recall_at_{k}"] = 100 * is_right.gather(1, nearest).any(1).double().mean().item()
    return metrics


def most_typical_caption(references: Sequence[Sequence[str]], seed: int) -> str:
    """The human caption that scores best as the caption of every image.

    Of the `NUM_CANDIDATES` that are the most similar to all others (mean cosine of the TF-IDF vectors of one to four
    words), the one with the best CIDEr as the caption of `NUM_SCORED_IMAGES` images, drawn by `seed`.
    """
    # Imported here: training needs this file, but not scikit-learn.
    from sklearn.feature_extraction.text import TfidfVectorizer

    captions = [caption for group in references for caption in group]
    # A caption without any word is a word itself.
    words = {caption: ptb_tokenize(caption).split() or [caption] for caption in captions}
    options = {"ngram_range": (1, 4), "token_pattern": None, "lowercase": False}
    vectors = TfidfVectorizer(tokenizer=words.__getitem__, **options).fit_transform(captions)
    order = np.argsort(-np.asarray(vectors @ vectors.mean(axis=0).T).ravel(), kind="stable")
    candidates = list(dict.fromkeys(captions[index] for index in order))[:NUM_CANDIDATES]
    scored = random.Random(seed).sample(list(references), min(NUM_SCORED_IMAGES, len(references)))
    return max(candidates, key=lambda caption: sum(cider_of_each([caption] * len(scored), scored)))


def captions_of_other_images(captions: list, seed: int) -> list:
    """The captions, shifted by a number drawn by `seed`, so that each stands at another image."""
    shift = random.Random(seed).randrange(1, len(captions)) if len(captions) > 1 else 0
    return captions[shift:] + captions[:shift]


def leave_one_out(captions: Sequence[str] | None, references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The mean of the scores against all but one of an image's human captions, over which one is left out.

    `captions` of `None` are the ones left out. References beyond the shortest list are always kept.
    """
    rounds = []
    for left_out in range(min(map(len, references))):
        predictions = [group[left_out] for group in references] if captions is None else list(captions)
        rounds.append(
            score_captions(predictions, [[*group[:left_out], *group[left_out + 1 :]] for group in references])
        )
    return {name: sum(scores[name] for scores in rounds) / len(rounds) for name in rounds[0]}


def baseline_scores(
    captions: list[str], references: list[list[str]], training_references: Sequence[Sequence[str]] | None, seed: int
) -> dict[str, dict]:
    """Scores to compare those of a model's N captions with.

    Args:
        references: the human captions of each image.
        training_references: the human captions that the constant one is chosen from; `references` if `None`.

    Returns:
        `constant`: one caption for all images (`caption`, chosen from `chosen_from`); `shuffled`: the model's captions,
        each at another image. Where images have several human captions, also `human`: one person's caption against
        the other persons', and `model_leave_one_out`: the model's against the same.
    """
    constant = most_typical_caption(training_references or references, seed)
    chosen_from = "training captions" if training_references else "evaluated captions"
    scores = {
        "constant": score_captions([constant] * len(references), references),
        "shuffled": score_captions(captions_of_other_images(captions, seed), references),
    }
    scores["constant"] |= {"caption": constant, "chosen_from": chosen_from}
    several = [index for index, group in enumerate(references) if len(group) > 1]
    if several:
        humans = [references[index] for index in several]
        scores["human"] = leave_one_out(None, humans)
        scores["model_leave_one_out"] = leave_one_out([captions[index] for index in several], humans)
    return scores
