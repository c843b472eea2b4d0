"""What the tests share: a tiny model, a tokenizer, pictures, and a repository made of them."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path


# Before any Hugging Face library is imported: they stay offline, and whoever reaches for the network all the same fails
# at once, here and in every process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTHONPATH"] = f"{Path(__file__).with_name('no_network')}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Remote code is copied here under its folder's name, which two test runs at a time share.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="tinycap-modules-")

import no_network.sitecustomize  # noqa: F401
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS, draw_picture, tiny_model, tiny_repository_model

from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training.repository import create_generation_config, create_image_processor, save_repository
from tinycap.training.tokenizer import train_tokenizer


atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


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
    """A folder as a finished run leaves it: weights, configs, code, tokenizer, processor."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-repository"
    model = tiny_repository_model(tokenizer)
    model.generation_config = create_generation_config(tokenizer, max_new_tokens=9)
    save_repository(folder, model, tokenizer, create_image_processor(24))
    return folder
