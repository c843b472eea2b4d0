"""Scores of captions: the caption metrics, and how varied the captions are."""

from tinycap.evaluation.caption_metrics.caption_metrics import compute_caption_metrics
from tinycap.evaluation.caption_metrics.ptb_tokenizer import ptb_tokenize


def score_captions(
    predictions: list[str], references: list[list[str]], extra: tuple[str, ...] = ()
) -> dict[str, float]:
    """Scores N captions.

    Args:
        predictions: one caption for each picture; may be empty strings.
        references: all human captions of each picture.
        extra: metrics that need Java: "meteor", "spice".

    Returns:
        `bleu_1` to `bleu_4`, `rouge_l`, `cider` (times 100), the extra ones, `distinct_captions` (how many differ) and
        `mean_length` (words).

    Raises:
        ValueError: the lists don't match, or a picture has no reference; names it.
        ImportError: `pycocoevalcap` isn't installed.
    """
    scores = compute_caption_metrics(predictions, references, extra)
    scores["distinct_captions"] = len(set(predictions))
    scores["mean_length"] = sum(len(caption.split()) for caption in predictions) / len(predictions)
    return scores


def caption_ciders(predictions: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr (times 100) of each of N captions against all references of its picture; their mean is the corpus's CIDEr.

    Raises:
        ValueError: the lists don't match, or are empty.
        ImportError: `pycocoevalcap` isn't installed.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise ImportError("caption metrics need pycocoevalcap: pip install 'tinycap[evaluation]'") from error
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"expected references for each of at least one caption, got {len(predictions)} captions")
    candidates = {index: [ptb_tokenize(caption) or "<empty>"] for index, caption in enumerate(predictions)}
    truths = {index: [ptb_tokenize(caption) for caption in captions] for index, captions in enumerate(references)}
    return [100 * float(score) for score in Cider().compute_score(truths, candidates)[1]]
