"""BLEU-1..4, ROUGE-L and CIDEr of captions against all their references, as `pycocoevalcap`'s own scorers compute them.

    metric = evaluate.load("evaluation/caption_metrics")
    metric.compute(predictions=["a dog runs"], references=[["a dog is running", "a brown dog runs"]])

Tokenisation is Penn Treebank style, in Python (`ptb_tokenizer.py`), so that Java isn't needed. METEOR and SPICE run
Java programs and are computed only where they are asked for and Java is installed.
"""

import shutil
import warnings

import datasets
import evaluate

from .ptb_tokenizer import UNSPACED, ptb_tokenize


DESCRIPTION = "Caption metrics as published: PTB tokenisation and the scorers of pycocoevalcap, all references."

CITATION = """\
@misc{chen2015microsoft,
  title = {Microsoft COCO Captions: Data Collection and Evaluation Server},
  author = {Xinlei Chen and Hao Fang and Tsung-Yi Lin and Ramakrishna Vedantam and Saurabh Gupta and Piotr Dollar
            and C. Lawrence Zitnick},
  year = {2015},
  eprint = {1504.00325},
}
"""

INPUTS_DESCRIPTION = """
Args:
    predictions: N captions.
    references: N lists of at least one caption.
    extra: further metrics that need Java: "meteor", "spice".
Returns:
    dict of bleu_1, bleu_2, bleu_3, bleu_4, rouge_l, cider and the extra ones, all times 100 as they are published.
"""

JAVA_METRICS = ("meteor", "spice")


def metric_caveats(references: list[list[str]]) -> list[str]:
    """What makes the metrics of these references say less than usual: [] or sentences for a person."""
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


def _tokenize(predictions: list[str], references: list[list[str]]) -> tuple[dict, dict]:
    """References and predictions as the scorers take them: dicts of lists, by number.

    Raises:
        ValueError: the lists don't match, or a caption has no reference.
    """
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
    candidates = {index: [ptb_tokenize(caption) or "<empty>"] for index, caption in enumerate(predictions)}
    truths = {index: [ptb_tokenize(caption) for caption in captions] for index, captions in enumerate(references)}
    return truths, candidates


def compute_caption_metrics(
    predictions: list[str], references: list[list[str]], extra: tuple[str, ...] = ()
) -> dict[str, float]:
    """Scores N captions against their references; see the module.

    Raises:
        ValueError: the lists don't match, a caption has no reference, or `extra` asks for what isn't there.
        ImportError: `pycocoevalcap` isn't installed.
    """
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ImportError("caption metrics need pycocoevalcap: pip install 'tinycap[evaluation]'") from error
    truths, candidates = _tokenize(predictions, references)
    scorer = BleuScorer(n=4)
    for index, captions in truths.items():
        scorer += (candidates[index][0], captions)
    bleu, _ = scorer.compute_score(option="closest")
    # The scorer adds 1e-15 to each count; without a match of some length BLEU is 0, not 1e-11 or 3.
    matches = [sum(found["correct"][n] for found in scorer.ctest) for n in range(4)]
    scores = {f"bleu_{n}": 100 * float(bleu[n - 1]) if all(matches[:n]) else 0.0 for n in range(1, 5)}
    scores["rouge_l"] = 100 * float(Rouge().compute_score(truths, candidates)[0])
    scores["cider"] = 100 * float(Cider().compute_score(truths, candidates)[0])
    for name in extra:
        scores[name] = 100 * _java_score(name, truths, candidates)
    return scores


def cider_of_each(predictions: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr (times 100) of each of N captions; their mean is the `cider` of `compute_caption_metrics`.

    Words are weighed by how many of these N pictures' references have them: a caption's score depends on the others'.

    Raises:
        ValueError: the lists don't match, or are empty.
    """
    from pycocoevalcap.cider.cider import Cider

    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"expected references for each of at least one caption, got {len(predictions)} captions and "
            f"{len(references)} lists of references"
        )
    return [100 * float(score) for score in Cider().compute_score(*_tokenize(predictions, references))[1]]


def _java_score(name: str, truths: dict, candidates: dict) -> float:
    if name not in JAVA_METRICS:
        raise ValueError(f"extra: expected metrics among {', '.join(JAVA_METRICS)}, got {name!r}")
    if shutil.which("java") is None:
        raise ValueError(f"extra: {name} needs Java, and there is no java on the PATH")
    if name == "meteor":
        from pycocoevalcap.meteor.meteor import Meteor as Scorer
    else:
        from pycocoevalcap.spice.spice import Spice as Scorer
    return float(Scorer().compute_score(truths, candidates)[0])


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS_DESCRIPTION)
class CaptionMetrics(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
            reference_urls=["https://github.com/salaniz/pycocoevalcap"],
        )

    def _compute(self, predictions, references, extra=()):
        return compute_caption_metrics(list(predictions), [list(captions) for captions in references], tuple(extra))
