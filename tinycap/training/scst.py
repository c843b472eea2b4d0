"""Self-critical sequence training: the captions' own CIDEr as a reward (Rennie et al., 2017,
https://arxiv.org/abs/1612.00563).

Several captions are sampled for each image. The baseline of each one's reward is the mean of the image's other samples
(Luo, 2020, https://arxiv.org/abs/2003.09971), which needs no extra decoding, unlike the original's greedy caption.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tinycap.evaluation.caption_metrics.ptb_tokenizer import ptb_tokenize
from tinycap.training.batches import image_inputs


# Scored like a word: otherwise a truncated caption would cost nothing.
END_WORD = "<end>"


def with_end(caption: str) -> str:
    return f"{ptb_tokenize(caption)} {END_WORD}"


class CiderReward(CiderScorer):
    """CIDEr of single captions with the document frequencies of a training set: the captions of each of its images."""

    # `compute_cider` sets it to the logarithm of the number of scored images.
    ref_len = property(lambda self: self.log_num_images, lambda self, value: None)

    def __init__(self, references: Iterable[Sequence[str]]):
        super().__init__()
        for captions in references:
            self.cook_append(None, list(map(with_end, captions)))
        self.compute_doc_freq()
        # Unlike the scorer's dictionary, it doesn't grow when it is read.
        self.document_frequency = Counter(self.document_frequency)
        self.log_num_images = math.log(len(self.crefs))

    def __call__(
        self, captions: Sequence[str], references: Sequence[Sequence[str]], ended: Sequence[bool]
    ) -> torch.Tensor:
        """CIDEr, (N,) float32 from 0 to 10, of N captions; `ended`: whether each has its end token."""
        # The samples of an image share its references, whose words are counted once.
        counted = {tuple(human): cook_refs(list(map(with_end, human))) for human in set(map(tuple, references))}
        self.crefs = [counted[tuple(human)] for human in references]
        self.ctest = [
            cook_test(with_end(text) if whole else ptb_tokenize(text)) for text, whole in zip(captions, ended)
        ]
        return torch.tensor(self.compute_cider(), dtype=torch.float32)


def labels_of(sequences: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Generated `sequences` (N, 1 + T), start token in front, to labels (N, T): -100 behind the first end token."""
    labels = sequences[:, 1:].clone()
    is_end = labels == eos_token_id
    labels[is_end.cumsum(dim=1) - is_end.long() > 0] = -100
    return labels


def self_critical_advantage(rewards: torch.Tensor) -> torch.Tensor:
    """(B, S) rewards of S samples an image, minus the mean of the image's other samples."""
    num_samples = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * num_samples / (num_samples - 1)


def self_critical_losses(logits: torch.Tensor, labels: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """The losses of each of B images' S samples and K human captions: the samples' mean over the tokens of advantage x
    negative log-likelihood (REINFORCE; Williams, 1992); the human captions' mean cross-entropy.

    Args:
        logits: (B * (S + K), T, vocab_size); labels: (B, S + K, T), -100 is ignored; advantage: (B, S).

    Returns:
        Both, (2,) float32; the second is NaN with K = 0.
    """
    # Half of the positions are padding, and each has a row of `vocab_size` logits.
    wanted = labels != -100
    losses = F.cross_entropy(logits[wanted.flatten(0, 1)].float(), labels[wanted], reduction="none")
    weights = F.pad(advantage, (0, labels.shape[1] - advantage.shape[1]), value=1.0)
    is_human = torch.arange(labels.shape[1], device=labels.device) >= advantage.shape[1]
    weights, is_human = (values[..., None].expand_as(labels)[wanted] for values in (weights, is_human))
    losses = losses * weights
    return torch.stack([losses[~is_human].mean(), losses[is_human].mean()])


def beside(sampled: torch.Tensor, human: torch.Tensor, num_images: int, padding: int) -> torch.Tensor:
    """(B * S, T) samples and (B * K, U) human captions to (B, S + K, the longer of T and U); K may be 0."""
    groups = [rows.reshape(num_images, len(rows) // num_images, rows.shape[1]) for rows in (sampled, human)]
    length = max(sampled.shape[1], human.shape[1])
    return torch.cat([F.pad(rows, (0, length - rows.shape[2]), value=padding) for rows in groups], dim=1)


class TokenDraw(LogitsProcessor):
    """Leaves one token, drawn by the inverse of the distribution function.

    `torch.multinomial` draws a random number for each token of the vocabulary, half of the sampling's time on a CPU.
    """

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulative = scores.float().softmax(dim=-1).cumsum(dim=-1)
        draws = torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:]
        # Rounding may make a draw as large as the sum.
        tokens = torch.searchsorted(cumulative, draws, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter(1, tokens, 0.0)


@dataclass
class SelfCriticalObjective:
    """The losses of one step of self-critical training, with at least 2 samples an image.

    `reward` scores N captions, given the references of each and whether each has its end token. The loss of the batch's
    human captions has `cross_entropy_weight` beside it, as in Paulus et al. (2018, https://arxiv.org/abs/1705.04304):
    the reward alone prefers the same few captions for many images.
    """

    tokenizer: PreTrainedTokenizerFast
    reward: Callable[..., torch.Tensor]
    num_samples: int
    max_new_tokens: int
    cross_entropy_weight: float = 0.0

    def __call__(self, model, unwrapped, batch: dict, teacher_embeds: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Samples captions of the batch's images and rewards those above average.

        Args:
            model: as accelerate wraps it; `unwrapped`: without the wrapper.
            teacher_embeds: (B, projection_dim) for the distillation loss.

        Returns:
            `loss`, `scst_loss`, `reward`, the mean CIDEr of the samples, and where they are part of the loss,
            `cross_entropy` and `distill_loss`.
        """
        sequences = self.sample(unwrapped, image_inputs(batch))
        labels = labels_of(sequences, self.tokenizer.eos_token_id)
        captions = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        references = [human for human in batch["references"] for _ in range(self.num_samples)]
        ended = (labels == self.tokenizer.eos_token_id).any(dim=1).tolist()
        rewards = self.reward(captions, references, ended).to(labels.device)
        advantage = self_critical_advantage(rewards.view(-1, self.num_samples))
        human = batch["labels"] if self.cross_entropy_weight > 0 else labels[:0]
        num_images = len(batch["references"])
        labels = beside(labels, human, num_images, -100)
        # Not as labels, for which the model would compute an unused loss.
        starts = unwrapped.prepare_decoder_input_ids_from_labels(human)
        tokens = beside(sequences[:, :-1], starts, num_images, unwrapped.config.pad_token_id)
        inputs = {**image_inputs(batch), "decoder_input_ids": tokens.flatten(0, 1)}
        output = model(**inputs, teacher_embeds=teacher_embeds, use_cache=False)
        loss, cross_entropy = self_critical_losses(output.logits, labels, advantage)
        losses = {"loss": loss, "scst_loss": loss, "reward": rewards.mean()}
        if self.cross_entropy_weight > 0:
            losses["cross_entropy"] = cross_entropy
            losses["loss"] = loss + self.cross_entropy_weight * cross_entropy
        if output.distill_loss is not None:
            losses["distill_loss"] = output.distill_loss
            losses["loss"] = losses["loss"] + unwrapped.config.distill_weight * output.distill_loss
        return losses

    @torch.no_grad()
    def sample(self, model, inputs: dict) -> torch.Tensor:
        """(B * num_samples, 1 + T) sampled tokens, start token in front, those of an image next to each other; without
        dropout."""
        was_training = model.training
        model.eval()
        encoded = inputs.get("encoder_outputs") or model.get_encoder()(**inputs, return_dict=True)
        # `num_return_sequences` would need `do_sample`.
        encoded = {name: states.repeat_interleave(self.num_samples, dim=0) for name, states in encoded.items()}
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": self.max_new_tokens}
        processors = LogitsProcessorList([TokenDraw()])
        outputs = BaseModelOutputWithPooling(**encoded)
        sequences = model.generate(encoder_outputs=outputs, logits_processor=processors, **options)
        model.train(was_training)
        return sequences
