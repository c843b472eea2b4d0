import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    MobileNetV2ForImageClassification,
    ViTConfig,
    ViTModel,
)

from tinycap.training import towers
from tinycap.training.teacher import Teacher, VisionTower
from tinycap.training.towers import TEXT_HEAD_FILE, PretrainedImageTower


VISION = {
    "image_size": 24,
    "patch_size": 8,
    "hidden_size": 18,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "projection_dim": 13,
}


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval()


@pytest.fixture
def pixels():
    return torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("feature, width", [("pooled", 18), ("projected", 13)])
def test_the_embedding_is_clips_own_at_unit_norm(clip, pixels, feature, width):
    teacher = Teacher(clip, feature)
    output = clip.vision_model(pixels).pooler_output if feature == "pooled" else clip(pixels).image_embeds
    assert teacher.embed_dim == width
    torch.testing.assert_close(teacher(pixels), F.normalize(output, dim=-1))


def test_the_teacher_never_learns_and_never_leaves_eval_mode(clip, pixels):
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    teacher = Teacher(clip)
    around = torch.nn.ModuleDict({"teacher": teacher, "student": torch.nn.Linear(18, 18)}).train()
    assert not any(module.training for module in teacher.modules())
    embeds = teacher(pixels)
    assert not embeds.requires_grad and not any(p.requires_grad for p in teacher.parameters())
    optimizer = torch.optim.AdamW([p for p in around.parameters() if p.requires_grad], lr=1.0)
    (around["student"](embeds) - 1).pow(2).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())


def test_pixels_of_other_statistics_are_renormalised_to_the_teachers(clip, pixels):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    theirs, stds = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]

    def normalise(values, mean, std):
        return (values - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    plain = Teacher(clip, teacher_mean=theirs, teacher_std=stds)
    other = Teacher(clip, teacher_mean=theirs, teacher_std=stds, image_mean=mean, image_std=std)
    torch.testing.assert_close(other(normalise(pixels, mean, std)), plain(normalise(pixels, theirs, stds)))


def test_pictures_of_another_size_are_resized_to_the_teachers(clip):
    flat = torch.full((2, 3, 40, 40), 0.7)
    torch.testing.assert_close(Teacher(clip)(flat), Teacher(clip)(torch.full((2, 3, 24, 24), 0.7)))


def test_a_whole_clip_model_and_its_vision_half_are_the_same_teacher(pixels, tmp_path):
    text = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    config = CLIPConfig(
        vision_config=VISION,
        text_config={**text, "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3},
        projection_dim=13,
    )
    whole = CLIPModel(config)
    whole.save_pretrained(tmp_path / "whole")
    half, report = VisionTower.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not report["unexpected_keys"], "nothing to warn of"
    half.save_pretrained(tmp_path / "half")
    statistics = CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    statistics.save_pretrained(tmp_path / "whole")
    statistics.save_pretrained(tmp_path / "half")
    for feature in ("pooled", "projected"):
        embeds = [Teacher.from_pretrained(str(tmp_path / n), feature)(pixels) for n in ("whole", "half")]
        torch.testing.assert_close(embeds[0], embeds[1])
    loaded = Teacher.from_pretrained(str(tmp_path / "whole"), image_mean=[0, 0, 0], image_std=[1, 1, 1])
    torch.testing.assert_close(loaded.shift.flatten(), -torch.tensor([0.1, 0.2, 0.3]) / torch.tensor([0.4, 0.5, 0.6]))


# --- an image tower of another architecture ---------------------------------------------------------------------------


def test_a_pretrained_classifier_becomes_a_tower_with_a_new_head(classifier, pixels):
    tower = PretrainedImageTower.from_pretrained(classifier, projection_dim=13).eval()
    given = MobileNetV2ForImageClassification.from_pretrained(classifier).eval()
    assert tower(pixels).image_embeds.shape == (4, 13)
    torch.testing.assert_close(tower.base(pixels).pooler_output, given.mobilenet_v2(pixels).pooler_output)


def test_of_a_frozen_tower_only_the_head_learns_and_no_batch_is_remembered(classifier, pixels):
    tower = PretrainedImageTower.from_pretrained(classifier, projection_dim=13, is_frozen=True).train()
    before = {name: value.clone() for name, value in tower.base.state_dict().items()}
    optimizer = torch.optim.SGD(tower.parameters(), lr=1.0)
    tower(pixels).image_embeds.square().sum().backward()
    optimizer.step()
    assert tower.classifier.classifier.bias.grad.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in tower.base.state_dict().items())
    thawed = PretrainedImageTower.from_pretrained(classifier, projection_dim=13).train()
    thawed(pixels)
    assert any(not torch.equal(value, before[name]) for name, value in thawed.base.state_dict().items())


def test_a_frozen_tower_looks_at_a_large_batch_in_parts(classifier, monkeypatch):
    tower = PretrainedImageTower.from_pretrained(classifier, 14, is_frozen=True).train()
    pixels, sizes = torch.randn(7, 3, 32, 32), []
    whole = tower(pixel_values=pixels).image_embeds
    monkeypatch.setattr(towers, "FROZEN_BATCH_SIZE", 3)
    tower.classifier.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    torch.testing.assert_close(tower(pixel_values=pixels).image_embeds, whole)
    assert sizes == [3, 3, 1]


def test_a_tower_with_a_text_head_is_a_teacher_another_classifier_is_not(classifier, pixels, tmp_path):
    tower = PretrainedImageTower.from_pretrained(classifier, projection_dim=13)
    folder = tmp_path / "tower"
    tower.save_pretrained(folder, tower.state_dict())
    with pytest.raises(ValueError, match=f"{TEXT_HEAD_FILE}.*got model_type 'mobilenet_v2'"):
        Teacher.from_pretrained(str(folder), "projected")
    (folder / TEXT_HEAD_FILE).touch()
    teacher = Teacher.from_pretrained(str(folder), "projected")
    assert teacher.embed_dim == 13 and teacher.image_size == 24
    torch.testing.assert_close(teacher(pixels), F.normalize(tower.eval()(pixels).image_embeds, dim=-1))
    with pytest.raises(ValueError, match="expected projected.*MobileNetV2ForImageClassification.*got 'pooled'"):
        Teacher.from_pretrained(str(folder), "pooled")


def test_a_text_encoder_and_an_empty_folder_are_no_image_towers(tmp_path):
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    BertModel(BertConfig(vocab_size=17, **sizes)).save_pretrained(tmp_path / "bert")
    for name in ("bert", "none"):
        with pytest.raises(ValueError, match=f"{name}: expected an image model"):
            PretrainedImageTower.from_pretrained(str(tmp_path / name), 13)


def test_an_image_tower_without_all_weights_is_an_error_that_names_them(classifier, tmp_path):
    shutil.copytree(classifier, tmp_path / "cut")
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    lost = next(name for name in weights if "conv_1x1" in name)
    del weights[lost]
    save_file(weights, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"cut: expected all weights of an image model.*, 1 are missing.*{lost}"):
        PretrainedImageTower.from_pretrained(str(tmp_path / "cut"), 13)


def test_learned_positions_fix_a_towers_size_convolutions_take_any(classifier, tmp_path):
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 14}
    ViTModel(ViTConfig(image_size=24, patch_size=8, **sizes)).save_pretrained(tmp_path)
    tower = PretrainedImageTower.from_pretrained(str(tmp_path), 13)
    tower.set_image_size(24)
    with pytest.raises(ValueError, match="image_size: expected 24.*got 32"):
        tower.set_image_size(32)
    convolutional = PretrainedImageTower.from_pretrained(classifier, 13).eval()
    convolutional.set_image_size(40)
    assert convolutional.config.image_size == 40
    assert convolutional(torch.rand(2, 3, 40, 40)).image_embeds.shape == (2, 13)


# --- invalid teachers -------------------------------------------------------------------------------------------------


def test_a_model_that_is_no_clip_is_an_error_that_says_what_it_is(tmp_path):
    ViTModel(
        ViTConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=14)
    ).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="expected a CLIP vision model.*got model_type 'vit'"):
        Teacher.from_pretrained(str(tmp_path / "vit"))


def test_missing_weights_are_an_error_that_names_them(clip, tmp_path):
    clip.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "post_layernorm" in name)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="post_layernorm"):
        Teacher.from_pretrained(str(tmp_path))


def test_a_teacher_that_cannot_be_found_is_an_error_that_asks_for_a_folder(tmp_path):
    with pytest.raises(ValueError, match="local folder"):
        Teacher.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="openai/clip-vit-base-patch32"):
        Teacher.from_pretrained("openai/clip-vit-base-patch32")


def test_another_width_is_an_error_that_names_both(clip):
    Teacher(clip).check_width(18)
    with pytest.raises(ValueError, match="expected 18.*pooled.*got 13"):
        Teacher(clip).check_width(13)


def test_an_unknown_feature_is_an_error(clip):
    with pytest.raises(ValueError, match="pooled, projected, got 'cls'"):
        Teacher(clip, "cls")


def test_a_student_distilled_from_it_comes_closer(clip, pixels):
    teacher = Teacher(clip)
    student = tiny_model(vision_config={"projection_dim": 18}).train()
    target = teacher(pixels)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = student(pixels, teacher_embeds=target).distill_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
