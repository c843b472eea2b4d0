"""BLEU-1..4, ROUGE-L and CIDEr of captions against all their references, computed by the scorers of `pycocoevalcap`.

    metric = evaluate.load("tinycap/evaluation/caption_metrics")
    metric.compute(predictions=["a dog runs"], references=[["a dog is running", "a brown dog runs"]])

Tokenisation is Penn Treebank style, in Python (`ptb_tokenizer.py`), so that Java isn't needed.
"""

import warnings
from collections.abc import Callable

import datasets
import evaluate
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from .ptb_tokenizer import UNSPACED, ptb_tokenize


def metric_caveats(references: list[list[str]]) -> list[str]:
    """Sentences on what limits the meaning of the metrics with these references."""
    caveats = []
    if len(references) == 1:
        caveats.append(
            "CIDEr of one image is 0 whatever its caption: it weighs words by how few images' references have them; "
            "score several images together, or use BLEU or ROUGE-L"
        )
    if any(UNSPACED.search(caption) for captions in references for caption in captions):
        caveats.append(
            "captions of a script without spaces between words are scored by characters, not words: compare them only "
            "with metrics computed so"
        )
    return caveats


def _tokenize(predictions: list[str], references: list[list[str]], tokenize: Callable) -> tuple[dict, dict]:
    """Tokenised references and predictions as the scorers take them: dicts of lists, by number."""
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"expected references for each of at least one prediction, got {len(predictions)} predictions and "
            f"{len(references)} lists of references"
        )
    for index, captions in enumerate(references):
        if isinstance(captions, str) or not captions:
            raise ValueError(f"references[{index}]: expected a list of at least one caption, got {captions!r}")
    for caveat in metric_caveats(references):
        warnings.warn(caveat, stacklevel=1)
    # A caption without any word is a word that no reference has.
    candidates = {index: [tokenize(caption) or "<empty>"] for index, caption in enumerate(predictions)}
    return {index: list(map(tokenize, captions)) for index, captions in enumerate(references)}, candidates


def score_captions(
    predictions: list[str], references: list[list[str]], tokenize: Callable[[str], str] = ptb_tokenize
) -> dict[str, float]:
    """Scores N captions.

    Args:
        predictions: one caption of each image; may be empty strings.
        references: all human captions of each image.
        tokenize: from a caption to its tokens, joined by spaces.

    Returns:
        `bleu_1` to `bleu_4`, `rouge_l` and `cider`, all times 100 as they are published, `distinct_captions` (how many
        differ) and `mean_length` (words).

    Raises:
        ValueError: the lists don't match, or an image has no reference.
    """
    truths, candidates = _tokenize(predictions, references, tokenize)
    scorer = BleuScorer(n=4)
    for index, captions in truths.items():
        scorer += (candidates[index][0], captions)
    bleu, _ = scorer.compute_score(option="closest")
    # The scorer adds 1e-15 to each count; without a match of some length BLEU is 0, not 1e-11 or 3.
    matches = [sum(counts["correct"][n] for counts in scorer.ctest) for n in range(4)]
    scores = {f"bleu_{n}": 100 * float(bleu[n - 1]) if all(matches[:n]) else 0.0 for n in range(1, 5)}
    scores["rouge_l"] = 100 * float(Rouge().compute_score(truths, candidates)[0])
    scores["cider"] = 100 * float(Cider().compute_score(truths, candidates)[0])
    scores["distinct_captions"] = len(set(predictions))
    scores["mean_length"] = sum(len(caption.split()) for caption in predictions) / len(predictions)
    return scores


def cider_of_each(predictions: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr (times 100) of each of N captions; their mean is the `cider` of `score_captions`.

    Words are weighed by how many of these N images' references have them: a caption's score depends on the others'.
    """
    return [100 * float(score) for score in Cider().compute_score(*_tokenize(predictions, references, ptb_tokenize))[1]]


class CaptionMetrics(evaluate.Metric):
    def _info(self):
        references = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Chen et al. (2015), Microsoft COCO Captions, https://arxiv.org/abs/1504.00325",
            inputs_description=score_captions.__doc__,
            features=datasets.Features({"predictions": datasets.Value("string"), "references": references}),
            reference_urls=["https://github.com/salaniz/pycocoevalcap"],
        )

    def _compute(self, predictions, references):
        return score_captions(list(predictions), [list(captions) for captions in references])
