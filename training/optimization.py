"""The optimizer: AdamW, with weight decay where it makes sense; and the moving average of what it finds."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for AdamW: matrices of linear layers and convolutions decay; everything else doesn't.

    Norms and biases set scales and offsets, embeddings, positions and `[CLS]` are looked up rather than multiplied:
    decay would only shrink the rare ones. A head tied to the embedding counts as embedding.
    """
    decayed, others, seen = [], [], set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_matrix = isinstance(module, (nn.Linear, nn.Conv2d)) and name == "weight"
            (decayed if is_matrix else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def create_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101), betas (0.9, 0.98) as CLIP was trained.

    Args:
        model: whose parameters to train.
        learning_rate: the peak; a scheduler varies it.
        weight_decay: of the matrices, see `parameter_groups`.
    """
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-8, fused=True)


def create_ema(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights (Polyak & Juditsky, 1992), to be updated after every step.

    It begins as the model and grows slow with the steps, as TensorFlow's did: the share of what it was before is
    `(1 + steps) / (10 + steps)`, at most `decay`. So it leaves the first, bad weights behind however short the run is.

    Args:
        model: the whole model; its averaged copy is the result's `module`.
        decay: such as 0.999: the last thousand steps.
    """

    @torch.no_grad()
    def average(averaged: list[torch.Tensor], current: list[torch.Tensor], num_averaged: torch.Tensor | int) -> None:
        steps = int(num_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + steps) / (10 + steps)))

    return AveragedModel(model, multi_avg_fn=average)
