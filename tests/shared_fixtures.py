"""Shared fixtures: a tiny model, a tokenizer, images, and a repository of them."""

import json
import os
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS, ENCODER, TEXT, VISION, draw_picture, png_bytes, tiny_model, tiny_repository_model
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    dynamic_module_utils,
)

from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.deploy import cli
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training.repository import create_generation_config, create_image_processor, save_repository
from tinycap.training.tokenizer import train_tokenizer


def skip_meta(kind: type[torch.nn.Module]) -> None:
    """Initialises no weights on the meta device, which have no values: a fifth of the time of loading a tiny model."""
    reset = kind.reset_parameters
    kind.reset_parameters = lambda self: None if getattr(self.weight, "is_meta", False) else reset(self)


def read_imports_once() -> None:
    """Parses each version of a remote code's file once, where transformers does for every model that it loads."""
    get_imports, found = dynamic_module_utils.get_imports, {}

    def cached(path) -> list[str]:
        content = Path(path).read_bytes()
        if content not in found:
            found[content] = get_imports(path)
        return found[content]

    dynamic_module_utils.get_imports = cached


read_imports_once()
# A checkpoint would wait for the disk to confirm each of its files, and no test cuts the power.
os.fsync = lambda descriptor: None
for kind in (torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm, torch.nn.Conv2d):
    skip_meta(kind)


@pytest.fixture
def model() -> TinyCapForConditionalGeneration:
    return tiny_model()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    """(5, 3, 24, 24)"""
    return torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def labels() -> torch.Tensor:
    """(5, 7), the third one shorter than the rest."""
    labels = torch.randint(3, 37, (5, 7), generator=torch.Generator().manual_seed(8))
    labels[2, 4:] = -100
    return labels


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(CAPTIONS * 3, vocab_size=300, model_max_length=19)


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    return [draw_picture(seed) for seed in range(4)]


@pytest.fixture(scope="session")
def repository(tmp_path_factory, tokenizer):
    """A folder like the output of a run: weights, configs, code, tokenizer, processor."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-repository"
    model = tiny_repository_model(tokenizer)
    model.generation_config = create_generation_config(tokenizer, max_new_tokens=9)
    save_repository(folder, model, tokenizer, create_image_processor(24))
    return folder


@pytest.fixture(scope="session")
def exported_repository(tmp_path_factory, tokenizer) -> Path:
    """A repository of few layers, each of which takes seconds to export, with a confidence for one beam."""
    folder = tmp_path_factory.mktemp("hub") / "exported-repository"
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, **ids}
    model = tiny_model(vision_config={"num_hidden_layers": 1}, text_config=text)
    model.generation_config = create_generation_config(tokenizer, max_new_tokens=9)
    save_repository(folder, model, tokenizer, create_image_processor(24))
    calibration = {"num_beams": 1, "intercept": 0.5, "coefficients": {"mean_log_prob": 1.0, "num_tokens": 0.1}}
    (folder / "confidence.json").write_text(json.dumps({"calibrations": [calibration]}))
    return folder


@pytest.fixture(scope="session")
def exported(exported_repository, tmp_path_factory) -> Path:
    """What `tinycap export` writes of it: four graphs and the small files."""
    folder = tmp_path_factory.mktemp("exported")
    assert cli.main(["export", "--model", str(exported_repository), "--output", str(folder)]) == 0
    assert len(list((folder / "onnx").glob("*.onnx"))) == 4
    return folder


@pytest.fixture(scope="session")
def patches_repository(tmp_path_factory, tokenizer) -> Path:
    """A repository of single layers with a text encoder, whose decoder attends to the patches."""
    folder = tmp_path_factory.mktemp("hub") / "patches"
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    parts = {"text_config": {"vocab_size": len(tokenizer), **ids}, "vision_config": {}, "text_encoder_config": ENCODER}
    parts = {name: {**part, "num_hidden_layers": 1} for name, part in parts.items()}
    model = tiny_model(memory="patches", **parts)
    model.generation_config = create_generation_config(tokenizer, max_new_tokens=7, num_beams=2)
    save_repository(folder, model, tokenizer, create_image_processor(24))
    return folder


@pytest.fixture(scope="session")
def exported_patches(patches_repository, tmp_path_factory) -> Path:
    """What `tinycap export` writes of it: six graphs and the small files."""
    folder = tmp_path_factory.mktemp("exported-patches")
    assert cli.main(["export", "--model", str(patches_repository), "--output", str(folder)]) == 0
    assert len(list((folder / "onnx").glob("*.onnx"))) == 6
    return folder


@pytest.fixture(scope="session")
def text_repository(tmp_path_factory, tokenizer):
    """A repository with a text encoder, of random weights."""
    folder = tmp_path_factory.mktemp("hub") / "with-a-text-encoder"
    config = tiny_repository_model(tokenizer).config
    torch.manual_seed(5)
    model = TinyCapForConditionalGeneration(TinyCapConfig(**{**config.to_dict(), "text_encoder_config": ENCODER}))
    model.generation_config = create_generation_config(tokenizer, max_new_tokens=9)
    save_repository(folder, model, tokenizer, create_image_processor(24))
    return folder


# --- a run of train_distill.py ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> str:
    """A folder of parquet files: 24 training and 6 validation images with two captions each; one row is corrupt."""
    folder = tmp_path_factory.mktemp("photos")
    for split, first, num in (("train", 0, 24), ("validation", 24, 6)):
        rows = {"image": [], "captions": [], "image_id": []}
        for index in range(first, first + num):
            content = b"broken" if index == 5 else png_bytes(draw_picture(index))
            rows["image"].append({"bytes": content, "path": None})
            rows["captions"].append([CAPTIONS[index % 4], f"picture number {index % 3} ."])
            rows["image_id"].append(f"photo-{index}")
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "captions": datasets.List(datasets.Value("string")),
                "image_id": datasets.Value("string"),
            }
        )
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        image_size=32, patch_size=8, hidden_size=18, intermediate_size=22, num_hidden_layers=1, num_attention_heads=3
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> str:
    """A folder with a tiny pretrained image classifier of seven classes and its image mean and std."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = MobileNetV2Config(image_size=24, depth_multiplier=0.1, min_depth=2, depth_divisible_by=2, num_labels=7)
    MobileNetV2ForImageClassification(config).save_pretrained(folder)
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def resnet(tmp_path_factory) -> str:
    """A folder with a tiny classifier whose configuration has no image size, and which has no image processor."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(3)
    sizes = {"embedding_size": 6, "hidden_sizes": [10, 14], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes, num_labels=5)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def config_name(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    text = {name: TEXT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    vision = {name: value for name, value in VISION.items() if name != "projection_dim"}
    path.write_text(json.dumps({"vision_config": vision, "text_config": {**text, "max_position_embeddings": 19}}))
    return str(path)


@pytest.fixture
def undrawn_figures(monkeypatch) -> None:
    """Leaves figures of trainings and evaluations as empty files: drawing takes longer than training a tiny model."""

    def contact_sheet(images, captions, path, **options) -> None:
        Path(path).touch()

    for script in ("tinycap.train_distill", "tinycap.evaluation.__main__"):
        monkeypatch.setattr(f"{script}.contact_sheet", contact_sheet)
    monkeypatch.setattr("tinycap.train_distill.plot_curves", lambda metrics, path: Path(path).touch())


@pytest.fixture
def flags(photos, teacher, config_name, tmp_path, undrawn_figures) -> list[str]:
    """A run of six steps, three an epoch, with dropout, augmentation and a checkpoint every second step."""
    return [
        *("--dataset_name", photos, "--teacher_name_or_path", teacher, "--config_name", config_name),
        *("--max_caption_length", "12", "--vocab_size", "300", "--per_device_train_batch_size", "7"),
        *("--captions_per_image", "2", "--max_train_steps", "6", "--checkpointing_steps", "2", "--logging_steps", "1"),
        *("--num_warmup_steps", "2", "--dropout", "0.1", "--patch_dropout", "0.3", "--dataloader_num_workers", "0"),
        *("--num_beams", "2", "--output_dir", str(tmp_path / "out")),
    ]
