import pytest
import torch
from torch import nn
from transformers import EfficientNetForImageClassification

from tinycap.training.efficientnet_lite import convert


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Weights with EfficientNet-Lite0's names and shapes, without gates."""
    generator = torch.Generator().manual_seed(0)
    gated = EfficientNetForImageClassification.config_class(hidden_dim=1280, num_labels=1000, width_coefficient=1.0)
    gated.depth_coefficient = 1.0
    shapes = EfficientNetForImageClassification(gated).state_dict()
    kept = [value for name, value in shapes.items() if "squeeze_excite" not in name]
    for value in kept:
        if value.dim() > 1:
            # Keeps activations near one in all layers.
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
    return {f"layer {index}": value for index, value in enumerate(kept)}


def test_the_gates_of_a_converted_model_let_everything_through(weights):
    model = convert(weights)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        gated = model(pixels).logits
        for block in model.efficientnet.encoder.blocks:
            block.squeeze_excite = nn.Identity()
        plain = model(pixels).logits
    assert plain.std() > 0
    torch.testing.assert_close(gated, plain)


def test_weights_of_another_model_are_an_error(weights):
    others = {**weights, "layer 0": torch.zeros(16, 3, 3, 3)}
    with pytest.raises(ValueError, match="expected the 296 weights of EfficientNet-Lite0"):
        convert(others)
