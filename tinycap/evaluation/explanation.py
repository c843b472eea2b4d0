"""The probability of each token of a caption, and the contribution of each part of the image to it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence


# Steps of integrated gradients: the released model needs four (docs/experiments.md), a tiny one twice as many.
STEPS = 8
# Images that run through the model together with gradients.
CHUNK = 32


def _labels(tokens: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """(N, longest), -100 where a caption has ended."""
    return pad_sequence([torch.tensor(row) for row in tokens], batch_first=True, padding_value=-100).to(device)


def _log_probabilities(model, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all tokens, (N, T, vocabulary), and of the labels, (N, T), 0 where a caption has ended."""
    logits = model(pixel_values=pixel_values, labels=labels, use_cache=False).logits
    all_tokens = logits.float().log_softmax(dim=-1)
    of_labels = all_tokens.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return all_tokens, of_labels.masked_fill(labels == -100, 0)


@torch.inference_mode()
def token_probabilities(
    model, pixel_values: torch.Tensor, tokens: Sequence[Sequence[int]], num_alternatives: int = 3
) -> list[list[tuple[int, float, list[tuple[int, float]]]]]:
    """The decoder's probability of every token of N captions after the tokens before it, however they were decoded.

    Args:
        model: a TinyCap in eval mode.
        pixel_values: (N, C, H, W).
        tokens: N captions of at least one token, without the start token and padding.
        num_alternatives: likeliest tokens to list at each place.

    Returns:
        For each token its id, its probability, and the (id, probability) of the likeliest ones, likeliest first.
    """
    all_tokens, of_labels = _log_probabilities(model, pixel_values, _labels(tokens, pixel_values.device))
    values, indices = all_tokens.exp().topk(num_alternatives, dim=-1)
    captions = []
    for caption, *columns in zip(tokens, of_labels.exp().tolist(), indices.tolist(), values.tolist()):
        places = zip(caption, *columns)
        captions.append([(token, own, list(zip(ids, best))) for token, own, ids, best in places])
    return captions


def saliency(model, pixel_values: torch.Tensor, tokens: Sequence[Sequence[int]], steps: int = STEPS) -> torch.Tensor:
    """How much each patch raises the log-probability of its image's caption.

    By integrated gradients (Sundararajan, Taly and Yan, 2017, https://arxiv.org/abs/1703.01365) from a plain image of
    the mean colour, summed over the pixels of each patch: a map sums to what the image raises the caption's
    log-probability by over the plain image. Chosen by measurement over attention rollout, which is the same for every
    caption, and over the gradient at the image alone (docs/experiments.md).

    Args:
        model: a TinyCap in eval mode; its parameters get no gradients.
        pixel_values: (N, C, H, W), normalised, so that 0 is the mean colour.
        tokens: N captions of at least one token, without the start token and padding.
        steps: points on the path from the plain image to the image.

    Returns:
        (N, rows, columns) of patches, in nats, float32.
    """
    patch = model.config.vision_config.patch_size
    maps = []
    with torch.enable_grad():
        for start in range(0, len(tokens), CHUNK):
            pixels, labels = pixel_values[start : start + CHUNK], _labels(tokens[start : start + CHUNK], model.device)
            total = torch.zeros_like(pixels)
            for step in range(steps):
                point = (pixels * (step + 0.5) / steps).requires_grad_()
                log_probability = _log_probabilities(model, point, labels)[1].sum()
                total += torch.autograd.grad(log_probability, point)[0]
            per_pixel = (total / steps * pixels).sum(dim=1, keepdim=True)
            maps.append(F.avg_pool2d(per_pixel, patch, divisor_override=1).squeeze(1))
    return torch.cat(maps).float()
