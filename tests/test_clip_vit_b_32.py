"""Distilling from a folder like openai/clip-vit-base-patch32: same files, sizes and preprocessing, random weights."""

import json
import shutil

import datasets
import pytest
import torch
import torch.nn.functional as F
from tiny import CAPTIONS, TEXT, draw_picture, png_bytes
from transformers import AutoModel, CLIPConfig, CLIPModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tinycap import train_distill
from tinycap.training.repository import create_image_processor
from tinycap.training.teacher import Teacher


pytestmark = pytest.mark.slow


# The published config.json, except for three of twelve layers, and a tiny text tower, which is loaded but not used.
CONFIG = {
    "projection_dim": 512,
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 3,
        "num_attention_heads": 12,
        "patch_size": 32,
        "image_size": 224,
        "hidden_act": "quick_gelu",
    },
    "text_config": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "vocab_size": 300,
        "bos_token_id": 298,
        "eos_token_id": 299,
    },
}
# The published preprocessor_config.json.
PREPROCESSING = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
NUM_PHOTOS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder (100 MB), removed after this module."""
    path = tmp_path_factory.mktemp("clip-vit-base-patch32")
    torch.manual_seed(5)
    CLIPModel(CLIPConfig(**CONFIG)).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    yield str(path)
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def pictures():
    return [draw_picture(seed, size=(224, 224)) for seed in range(NUM_PHOTOS)]


@pytest.fixture(scope="module")
def photos(pictures, tmp_path_factory) -> str:
    """The same photos for training and validation."""
    path = tmp_path_factory.mktemp("photos")
    rows = {
        "image": [{"bytes": png_bytes(picture), "path": None} for picture in pictures],
        "captions": [CAPTIONS for _ in pictures],
    }
    features = {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    for split in ("train", "validation"):
        table.to_parquet(path / f"{split}.parquet")
    return str(path)


@pytest.fixture(scope="module")
def clips_own(folder, pictures) -> dict[str, torch.Tensor]:
    """CLIP's own features of the photos with its own preprocessing: both kinds, unit norm."""
    pixels = AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    clip = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        pooled = clip.vision_model(pixels).pooler_output
        return {"pooled": F.normalize(pooled, dim=-1), "projected": F.normalize(clip.visual_projection(pooled), dim=-1)}


@pytest.mark.parametrize("feature, width", [("pooled", 768), ("projected", 512)])
def test_the_teacher_sees_a_students_pixels_as_clip_sees_the_photo(folder, pictures, clips_own, feature, width):
    mean, std = [0.5, 0.4, 0.6], [0.2, 0.3, 0.25]
    pixels = create_image_processor(224, mean, std)(pictures, return_tensors="pt").pixel_values
    teacher = Teacher.from_pretrained(folder, feature, mean, std)
    assert teacher.embed_dim == width and clips_own[feature].shape == (NUM_PHOTOS, width)
    torch.testing.assert_close(teacher(pixels), clips_own[feature], rtol=1e-4, atol=1e-6)
    if feature == "pooled":
        unaware = Teacher(teacher.vision_model)(pixels)
        assert (unaware - clips_own[feature]).abs().max() > 1e-3, "unless it takes them for pixels of its own"


def test_a_student_is_distilled_from_it_by_one_command(folder, photos, pictures, clips_own, tmp_path, undrawn_figures):
    vision = {"image_size": 224, "patch_size": 56, "hidden_size": 12, "num_hidden_layers": 1}
    text = {name: TEXT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    (tmp_path / "tiny.json").write_text(
        json.dumps(
            {
                "vision_config": {**vision, "num_attention_heads": 3, "intermediate_size": 20},
                "text_config": {**text, "max_position_embeddings": 19},
            }
        )
    )
    metrics = train_distill.main(
        [
            *("--dataset_name", photos, "--teacher_name_or_path", folder, "--output_dir", str(tmp_path / "out")),
            *("--config_name", str(tmp_path / "tiny.json"), "--vocab_size", "300", "--max_caption_length", "12"),
            *("--max_train_steps", "1", "--per_device_train_batch_size", "2", "--dataloader_num_workers", "0"),
            *("--num_beams", "1", "--learning_rate", "0.01", "--num_warmup_steps", "0"),
        ]
    )
    student = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert student.config.vision_config.projection_dim == 768, "the teacher's width"
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "out")(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        cosines = (student.get_image_features(pixels).pooler_output * clips_own["pooled"]).sum(dim=-1)
    assert metrics["cosine_distance"] == pytest.approx(1 - cosines.mean().item(), abs=1e-5), "by CLIP's own embeddings"
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(first["caption_loss"] + first["distill_loss"], rel=1e-5)
    assert metrics["cosine_distance"] < first["distill_loss"], "one step came closer"
