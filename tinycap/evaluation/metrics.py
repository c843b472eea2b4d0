"""Scores of captions: the caption metrics, and how varied the captions are."""

from tinycap.evaluation.caption_metrics.caption_metrics import compute_caption_metrics


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
