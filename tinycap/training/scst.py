"""Self-critical sequence training: the captions' own CIDEr as a reward (Rennie et al., 2017,
https://arxiv.org/abs/1612.00563).

Several captions are sampled for each image. The baseline of each one's reward is the mean of the image's other samples
(Luo, 2020, https://arxiv.org/abs/2003.09971), which needs no extra decoding, unlike the original's greedy caption.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast


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


def self_critical_loss(logits: torch.Tensor, labels: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of advantage x negative log-likelihood (REINFORCE; Williams, 1992).

    Args:
        logits: (N, T, vocab_size); labels: (N, T), -100 is ignored; advantage: (N,).
    """
    # Half of the positions are padding, and each has a row of `vocab_size` logits.
    rows = labels != -100
    losses = F.cross_entropy(logits[rows].float(), labels[rows], reduction="none")
    return (losses * advantage.repeat_interleave(rows.sum(dim=1))).mean()


@dataclass
class SelfCriticalObjective:
    """The losses of one step of self-critical training.

    Args:
        reward: scores N captions, given the references of each and whether each has its end token.
        num_samples: captions sampled for an image, at least 2.
    """

    tokenizer: PreTrainedTokenizerFast
    reward: Callable[..., torch.Tensor]
    num_samples: int
    max_new_tokens: int

    @torch.no_grad()
    def sample(self, model, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B * num_samples, 1 + T) sequences, sampled from `model` without dropout."""
        was_training = model.training
        model.eval()
        options = {"num_return_sequences": self.num_samples, "max_new_tokens": self.max_new_tokens}
        sequences = model.generate(pixel_values, do_sample=True, num_beams=1, top_k=0, **options)
        model.train(was_training)
        return sequences

    def __call__(self, model, unwrapped, batch: dict, teacher_embeds: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Samples captions of the batch's images and rewards those above average.

        Args:
            model: as accelerate wraps it; `unwrapped`: without the wrapper.
            teacher_embeds: (B, projection_dim) for the distillation loss.

        Returns:
            `loss`, `scst_loss`, `distill_loss` where there is a teacher, and `reward`, the mean CIDEr of the samples.
        """
        sequences = self.sample(unwrapped, batch["pixel_values"])
        labels = labels_of(sequences, self.tokenizer.eos_token_id)
        captions = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        references = [human for human in batch["references"] for _ in range(self.num_samples)]
        ended = (labels == self.tokenizer.eos_token_id).any(dim=1).tolist()
        rewards = self.reward(captions, references, ended).to(labels.device)
        advantage = self_critical_advantage(rewards.view(-1, self.num_samples)).flatten()
        # Not as labels, for which the model would compute an unused loss.
        output = model(
            pixel_values=batch["pixel_values"],
            decoder_input_ids=sequences[:, :-1],
            teacher_embeds=teacher_embeds,
            use_cache=False,
        )
        losses = {"scst_loss": self_critical_loss(output.logits, labels, advantage)}
        loss = losses["scst_loss"]
        if output.distill_loss is not None:
            losses["distill_loss"] = output.distill_loss
            loss = loss + unwrapped.config.distill_weight * output.distill_loss
        return {"loss": loss, **losses, "reward": rewards.mean()}
