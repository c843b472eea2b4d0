"""The probability of each token of a caption, and which parts of the image the caption rests on.

The map is integrated gradients (Sundararajan, Taly and Yan, 2017, https://arxiv.org/abs/1703.01365) of the caption's
log-probability, from a plain image of the mean colour to the image, summed over the pixels of each patch. A patch's
value says by how many nats it raises the caption's log-probability; all values sum to what the image raises it by over
the plain image. Attention rollout would show where `[CLS]` looks, the same for every caption, and the gradient at the
image alone tells less of what happens when a patch is really taken away: measured in `docs/experiments.md`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


# Points on the way from the plain image to the image. The released model needs four, see there; one whose
# probabilities jump on the way, as in the tests, needs twice as many.
STEPS = 8
# Rows of images that run through the model together: each takes a gradient.
CHUNK = 32


@dataclass
class TokenProbability:
    """A token of a caption.

    Args:
        token_id: which it is.
        probability: that the decoder gave it, after the tokens before it.
        alternatives: (token id, probability) of the likeliest tokens at its place, likeliest first.
    """

    token_id: int
    probability: float
    alternatives: list[tuple[int, float]]


def mean_token_probability(tokens: Sequence[TokenProbability]) -> float:
    """Geometric mean of the probabilities: how sure the decoder is of what it says."""
    # A probability may be too small for float32.
    return math.exp(sum(math.log(max(token.probability, 1e-30)) for token in tokens) / len(tokens))


def _labels(tokens: Sequence[Sequence[int]], device) -> torch.Tensor:
    """(N, longest), -100 where a caption has ended."""
    length = max(map(len, tokens))
    return torch.tensor([[*row, *[-100] * (length - len(row))] for row in tokens], device=device)


def _log_probabilities(model, labels: torch.Tensor, **inputs) -> torch.Tensor:
    """(N, T, vocabulary)"""
    return model(labels=labels, use_cache=False, **inputs).logits.float().log_softmax(dim=-1)


def _of_labels(log_probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(N, T), 0 where a caption has ended."""
    found = log_probabilities.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return found.masked_fill(labels == -100, 0)


@torch.inference_mode()
def token_probabilities(
    model, pixel_values: torch.Tensor, tokens: Sequence[Sequence[int]], num_alternatives: int = 3
) -> list[list[TokenProbability]]:
    """The decoder's probability of every token of N captions, however they were decoded.

    Args:
        model: a TinyCap in eval mode.
        pixel_values: (N, C, H, W).
        tokens: N captions of at least one token, without the start token and padding.
        num_alternatives: likeliest tokens to list at each place.
    """
    labels = _labels(tokens, pixel_values.device)
    log_probabilities = _log_probabilities(model, labels, pixel_values=pixel_values)
    probabilities = _of_labels(log_probabilities, labels).exp().tolist()
    values, indices = log_probabilities.exp().topk(num_alternatives, dim=-1)
    return [
        [
            TokenProbability(token, row[place], list(zip(tops[place], bests[place])))
            for place, token in enumerate(caption)
        ]
        for caption, row, tops, bests in zip(tokens, probabilities, indices.tolist(), values.tolist())
    ]


def saliency(model, pixel_values: torch.Tensor, tokens: Sequence[Sequence[int]], steps: int = STEPS) -> torch.Tensor:
    """How much each patch raises the log-probability of its photo's caption; see the module.

    Args:
        model: a TinyCap in eval mode; its parameters get no gradients.
        pixel_values: (N, C, H, W), normalised, so that 0 is the mean colour.
        tokens: N captions of at least one token, without the start token and padding.
        steps: points on the way from the plain image to the image.

    Returns:
        (N, rows, columns) of patches, in nats, float32.
    """
    patch = model.config.vision_config.patch_size
    maps = []
    with torch.enable_grad():
        for rows, captions in zip(pixel_values.split(CHUNK), _chunks(tokens, CHUNK)):
            labels, total = _labels(captions, rows.device), torch.zeros_like(rows)
            for step in range(steps):
                point = (rows * (step + 0.5) / steps).requires_grad_()
                log_probability = _of_labels(_log_probabilities(model, labels, pixel_values=point), labels).sum()
                total += torch.autograd.grad(log_probability, point)[0]
            per_pixel = (total / steps * rows).sum(dim=1, keepdim=True)
            maps.append(F.avg_pool2d(per_pixel, patch, divisor_override=1).squeeze(1))
    return torch.cat(maps).float()


def _chunks(items: Sequence, size: int):
    return (items[start : start + size] for start in range(0, len(items), size))
