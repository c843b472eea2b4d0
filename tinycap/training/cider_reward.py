"""CIDEr of single captions, as a reward."""

import math
from collections.abc import Iterable, Sequence

import torch
from pycocoevalcap.cider.cider_scorer import CiderScorer

from tinycap.evaluation.caption_metrics.ptb_tokenizer import ptb_tokenize


# Scored like a word: otherwise a truncated caption would cost nothing.
END_WORD = "<end>"


class CiderReward:
    """CIDEr of single captions, by `pycocoevalcap`'s scorer with the document frequencies of a training set.

    Args:
        references: the human captions of each training image.
    """

    def __init__(self, references: Iterable[Sequence[str]]):
        corpus = CiderScorer()
        for captions in references:
            corpus += (None, [self._words(caption) for caption in captions])
        corpus.compute_doc_freq()
        document_frequency, log_num_images = corpus.document_frequency, math.log(len(corpus.crefs))

        class TrainingSetScorer(CiderScorer):
            # The scorer would count the scored images; the document frequencies are the training set's.
            ref_len = property(lambda self: log_num_images, lambda self, value: None)

            def compute_doc_freq(self):
                self.document_frequency = document_frequency

        self._scorer_class = TrainingSetScorer

    @staticmethod
    def _words(caption: str) -> str:
        return f"{ptb_tokenize(caption)} {END_WORD}"

    def __call__(
        self, captions: Sequence[str], references: Sequence[Sequence[str]], ended: Sequence[bool]
    ) -> torch.Tensor:
        """CIDEr, (N,) float32 from 0 to 10, of N captions; `ended`: whether each has its end token."""
        scorer = self._scorer_class()
        for caption, human, whole in zip(captions, references, ended):
            words = self._words(caption)
            scorer += (words if whole else words.removesuffix(END_WORD), [self._words(text) for text in human])
        scorer.compute_doc_freq()
        return torch.tensor(scorer.compute_cider(), dtype=torch.float32)
