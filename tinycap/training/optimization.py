"""The optimizer, AdamW or Muon, with weight decay where it makes sense, and its schedule."""

import argparse
import logging
import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler


logger = logging.getLogger(__name__)

# Below it a captioner with fresh weights writes "A man in a a."; the shortest recipe that scores anything takes 1,500.
FEW_STEPS = 500

OPTIMIZERS = ("adamw", "muon")
# Largest share of a run's steps for a warm-up whose length isn't given.
MAX_WARMUP_SHARE = 0.1


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


class OptimizerPair(torch.optim.Optimizer):
    """Two optimizers of different parameters that act as one: one schedule, one checkpoint.

    Not a `torch.optim.Optimizer` by its construction: groups and state are those of the two.
    """

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer):
        self.optimizers = (first, second)
        self.defaults = {}

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict:
        return {key: value for optimizer in self.optimizers for key, value in optimizer.state.items()}

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

    With "muon", the matrices that decay are turned as a whole (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon;
    https://arxiv.org/abs/2502.16982), scaled so that AdamW's learning rate and decay fit them, and AdamW has the rest.

    Args:
        model: whose parameters to train.
        learning_rate: the peak; a scheduler varies it.
        weight_decay: of the matrices, see `parameter_groups`.
        name: one of `OPTIMIZERS`.
        kernel_scale: learning rate of convolutions over that of the rest. A ViT has one, whose output each step of
            Adam moves in proportion to a patch's pixels: 3,072 for 32 x 32, where other layers have 128 inputs.

    Raises:
        ValueError: there is no such optimizer, or this PyTorch doesn't have it.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {name!r}")
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer muon: expected torch 2.9 or newer, which brings it, got {torch.__version__}")
    adamw = {"lr": learning_rate, "betas": (0.9, 0.98), "eps": 1e-8, "fused": True}
    decayed, others = parameter_groups(model, weight_decay)
    if name == "adamw" and kernel_scale == 1.0:
        return torch.optim.AdamW([decayed, others], **adamw)
    # A convolution's weight is no matrix to Muon, and its learning rate may differ.
    matrices = [parameter for parameter in decayed["params"] if parameter.dim() == 2]
    kernels = [parameter for parameter in decayed["params"] if parameter.dim() != 2]
    scaled = {"params": kernels, "weight_decay": weight_decay, "lr": kernel_scale * learning_rate}
    groups = [group for group in (scaled, others) if group["params"]]
    if name == "adamw":
        return torch.optim.AdamW([{**decayed, "params": matrices}, *groups], **adamw)
    muon = torch.optim.Muon(matrices, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
    return OptimizerPair(muon, torch.optim.AdamW(groups, **adamw))


def plan_steps(args: argparse.Namespace, steps_per_epoch: int | None, checkpoint_args: dict | None) -> None:
    """Sets the `max_train_steps` that the epochs make, and caps a warm-up that wasn't asked for by the run's length.

    Args:
        steps_per_epoch: optimizer steps; `None` for a stream, which has `max_train_steps`.
        checkpoint_args: arguments of the run that is resumed, whose warm-up holds.
    """
    if args.max_train_steps is None:
        args.max_train_steps = max(1, math.ceil(args.num_train_epochs * steps_per_epoch))
    if "num_warmup_steps" in args.given:
        return
    if checkpoint_args is not None:
        args.num_warmup_steps = checkpoint_args["num_warmup_steps"]
    else:
        args.num_warmup_steps = min(args.num_warmup_steps, int(MAX_WARMUP_SHARE * args.max_train_steps))


def warn_of_few_steps(args: argparse.Namespace) -> None:
    """Warns of a run that ends before a captioner with fresh weights has learnt to write."""
    if args.model_name_or_path is None and args.max_train_steps < FEW_STEPS:
        logger.warning(
            "%d optimizer steps are too few for a captioner with fresh weights: expected at least %d, by more "
            "--num_train_epochs. With few images, adapt a trained one: --model_name_or_path CHECKPOINT "
            "--distill_weight 0 --learning_rate 1e-4",
            args.max_train_steps,
            FEW_STEPS,
        )


def create_scheduler(optimizer: torch.optim.Optimizer, args: argparse.Namespace, num_processes: int) -> LRScheduler:
    """The schedule of the learning rate; accelerate steps it once for each process."""
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.num_warmup_steps * num_processes,
        num_training_steps=args.max_train_steps * num_processes,
    )
