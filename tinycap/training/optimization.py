"""The optimizer, AdamW or Muon, its parameter groups and its schedule."""

import argparse
import logging
import math

import torch
from torch import nn
from transformers import get_scheduler


logger = logging.getLogger(__name__)

OPTIMIZERS = ("adamw", "muon")
# Largest share of a run's steps for a warm-up whose length isn't given.
MAX_WARMUP_SHARE = 0.1
# With fewer steps a captioner with fresh weights writes "A man in a a."; the shortest recipe that works takes 1,500.
FEW_STEPS = 500


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for AdamW: weights of linear layers and convolutions decay; everything else doesn't.

    Norms and biases set scales and offsets; decay would only shrink rarely used rows of embeddings. A tied head counts
    as embedding.
    """
    is_matrix = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_matrix.setdefault(parameter, isinstance(module, (nn.Linear, nn.Conv2d)) and name == "weight")
    decayed, others = ([parameter for parameter in is_matrix if is_matrix[parameter] == kind] for kind in (True, False))
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class OptimizerPair(torch.optim.Optimizer):
    """Two optimizers of different parameters with one schedule and one checkpoint."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        # Without the base constructor: the groups and their state are those of the two.
        self.optimizers, self.defaults = optimizers, {}

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)


def create_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, name: str = "adamw", kernel_scale: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101), betas (0.9, 0.98) as CLIP was trained.

    With "muon", the matrices that decay get orthogonalised updates (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon;
    https://arxiv.org/abs/2502.16982), scaled so that AdamW's learning rate and decay fit them; AdamW trains the rest.

    Args:
        weight_decay: of the matrices, see `parameter_groups`.
        name: one of `OPTIMIZERS`; muon needs torch 2.9.
        kernel_scale: learning rate of convolutions over that of the rest. A step of Adam changes the output of a ViT's
            patch embedding in proportion to a patch's values: 3,072 for 32 x 32, where other layers have 128 inputs.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {name!r}")
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer muon: expected torch 2.9 or newer, got {torch.__version__}")
    adamw = {"lr": learning_rate, "betas": (0.9, 0.98), "eps": 1e-8, "fused": True}
    decayed, others = parameter_groups(model, weight_decay)
    if name == "adamw" and kernel_scale == 1.0:
        return torch.optim.AdamW([decayed, others], **adamw)
    # Muon takes no convolution weights, and their learning rate may differ.
    matrices = {**decayed, "params": [parameter for parameter in decayed["params"] if parameter.dim() == 2]}
    kernels = [parameter for parameter in decayed["params"] if parameter.dim() != 2]
    scaled = {**decayed, "params": kernels, "lr": kernel_scale * learning_rate}
    rest = [group for group in (scaled, others) if group["params"]]
    if name == "adamw":
        return torch.optim.AdamW([matrices, *rest], **adamw)
    muon = torch.optim.Muon([matrices], learning_rate, adjust_lr_fn="match_rms_adamw")
    return OptimizerPair(muon, torch.optim.AdamW(rest, **adamw))


def plan_steps(args: argparse.Namespace, steps_per_epoch: int | None, checkpoint_args: dict | None) -> None:
    """Computes `max_train_steps` from the epochs, and limits a warm-up of default length in a short run.

    A stream has no `steps_per_epoch`; a resumed run keeps the warm-up of its `checkpoint_args`.
    """
    if args.max_train_steps is None:
        args.max_train_steps = max(1, math.ceil(args.num_train_epochs * steps_per_epoch))
    if "num_warmup_steps" not in args.given:
        limit = min(args.num_warmup_steps, int(MAX_WARMUP_SHARE * args.max_train_steps))
        args.num_warmup_steps = checkpoint_args["num_warmup_steps"] if checkpoint_args else limit


def warn_of_few_steps(args: argparse.Namespace) -> None:
    """Warns of a run too short for a captioner with fresh weights to learn to write."""
    if args.model_name_or_path is None and args.max_train_steps < FEW_STEPS:
        logger.warning(
            f"{args.max_train_steps} optimizer steps are too few for a captioner with fresh weights: expected at least "
            f"{FEW_STEPS}, by more --num_train_epochs. With few images, adapt a trained one: --model_name_or_path "
            "CHECKPOINT --distill_weight 0 --learning_rate 1e-4"
        )


def create_training(model: nn.Module, args: argparse.Namespace, num_processes: int) -> tuple:
    """The optimizer and the learning rate schedule of a run of either script."""
    name = getattr(args, "optimizer", "adamw")
    optimizer = create_optimizer(model, args.learning_rate, args.weight_decay, name, args.patch_learning_rate_scale)
    # accelerate steps the schedule once for each process.
    steps = (args.num_warmup_steps * num_processes, args.max_train_steps * num_processes)
    return optimizer, get_scheduler(args.lr_scheduler_type, optimizer, *steps)
