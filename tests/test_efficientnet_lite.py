import pytest
import torch
from torch import nn
from transformers import EfficientNetForImageClassification

from tinycap.training.efficientnet_lite import convert, lite_config


def package_weights(variant: int) -> dict[str, torch.Tensor]:
    """Weights with the shapes of an EfficientNet-Lite, without gates."""
    generator = torch.Generator().manual_seed(0)
    shapes = EfficientNetForImageClassification(lite_config(variant)).state_dict()
    kept = [value for name, value in shapes.items() if "squeeze_excite" not in name]
    for value in kept:
        if value.dim() > 1:
            # Keeps activations near one in all layers.
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
    return {f"layer {index}": value for index, value in enumerate(kept)}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return package_weights(0)


@pytest.mark.slow
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


def test_the_larger_variant_has_the_published_sizes():
    """Parameters as published, by https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite."""
    for variant, millions in ((0, 4.65), (1, 5.42), (2, 6.09)):
        with torch.device("meta"):
            model = EfficientNetForImageClassification(lite_config(variant))
        gates = sum(value.numel() for name, value in model.named_parameters() if "squeeze_excite" in name)
        assert abs((model.num_parameters() - gates) / 1e6 - millions) < 0.01
    assert lite_config(2).out_channels == [16, 24, 48, 88, 120, 208, 352]
    assert lite_config(2).num_block_repeats == [1, 3, 3, 4, 4, 5, 1]
