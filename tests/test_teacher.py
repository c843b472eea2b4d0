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
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    MobileNetV2ForImageClassification,
    ViTConfig,
    ViTModel,
)

from tinycap.training.frozen_towers import FrozenTowers
from tinycap.training.teacher import Teacher, VisionTower
from tinycap.training.towers import TEXT_HEAD_FILE, PretrainedImageTower, load_towers


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
    assert tower(pixels).image_embeds.shape == (4, 13) and tower.statistics == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    torch.testing.assert_close(
        tower.classifier.mobilenet_v2(pixels).pooler_output, given.mobilenet_v2(pixels).pooler_output
    )


def test_two_towers_see_pixels_in_their_own_size_and_by_their_own_statistics(classifier, resnet, pixels):
    towers = load_towers([classifier, resnet], 13).eval()
    towers.towers[1].set_image_size(40)
    towers = type(towers)(list(towers.towers))
    assert towers.config.image_size == 40
    # 0..1, then by the second one's statistics: CLIP's, since it has no processor.
    given = pixels * torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1) + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in towers.towers[1].statistics)
    other = F.interpolate((given - mean) / std, (40, 40), mode="bicubic", antialias=True)
    expected = towers.towers[0](pixels).image_embeds + towers.towers[1](other).image_embeds
    torch.testing.assert_close(towers(pixels).image_embeds, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_pair", [False, True])
def test_a_head_trained_on_features_is_saved_as_a_teacher_of_pixels(is_pair, classifier, resnet, pixels, tmp_path):
    """The head's parts are the towers' own heads."""
    images = load_towers([resnet, classifier] if is_pair else [resnet], 13)
    images.set_image_size(24)
    frozen = FrozenTowers(images, dropout=0.5)
    with torch.no_grad():
        by_own = [pixels] if not is_pair else [pixels, pixels * images.scale[1] + images.shift[1]]
        features = [tower(values).image_embeds for tower, values in zip(images.towers, by_own)]
    assert [part.shape[1] for part in features] == [tower.num_features for tower in images.towers]
    assert features[0].std(dim=0).max() > 0
    features = torch.cat(features, dim=1)
    frozen.save_pretrained(tmp_path, frozen.train().state_dict())
    (tmp_path / TEXT_HEAD_FILE).touch()
    teacher = Teacher.from_pretrained(str(tmp_path), "projected")
    assert teacher.embed_dim == 13 and teacher.image_size == 24
    expected = F.normalize(frozen.eval()(features).image_embeds, dim=-1)
    torch.testing.assert_close(teacher(pixels), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="expected projected"):
        Teacher.from_pretrained(str(tmp_path), "pooled")


def test_of_frozen_towers_only_the_head_learns(classifier):
    frozen = FrozenTowers(load_towers([classifier], 13), dropout=0.0)
    assert [name for name, value in frozen.named_parameters() if value.requires_grad] == ["head.weight", "head.bias"]
    assert frozen.head.out_features == 13


def test_a_classifier_without_one_linear_layer_at_the_end_is_an_error(tmp_path):
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 14}
    model = DeiTForImageClassificationWithTeacher(DeiTConfig(image_size=24, patch_size=8, num_labels=5, **sizes))
    model.save_pretrained(tmp_path / "deit")
    with pytest.raises(ValueError, match="deit: expected an image classifier with a linear layer.*WithTeacher"):
        PretrainedImageTower.from_pretrained(str(tmp_path / "deit"), 13)


def test_timms_towers_are_teachers_too(pixels, tmp_path):
    timm = pytest.importorskip("timm", exc_type=ImportError)
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    settings = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "input_size": [3, 32, 32]}
    config = TimmWrapperConfig(architecture="mobilenetv3_small_050", num_labels=9, pretrained_cfg=settings)
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path / "timm")
    frozen = FrozenTowers(load_towers([str(tmp_path / "timm")], 13), dropout=0.0).eval()
    assert frozen.config.image_size == 32 and frozen.image_model.statistics == (settings["mean"], settings["std"])
    given = timm.create_model("mobilenetv3_small_050", num_classes=0).eval()
    weights = load_file(tmp_path / "timm" / "model.safetensors").items()
    weights = {name.removeprefix("timm_model."): value for name, value in weights}
    given.load_state_dict({name: value for name, value in weights.items() if not name.startswith("classifier.")})
    pixels = F.interpolate(pixels, (32, 32))
    with torch.no_grad():
        features = frozen.image_model(pixels).image_embeds
        torch.testing.assert_close(features, given(pixels))
    frozen.save_pretrained(tmp_path / "out", frozen.state_dict())
    (tmp_path / "out" / TEXT_HEAD_FILE).touch()
    teacher = Teacher.from_pretrained(str(tmp_path / "out"), "projected")
    assert teacher.scale.flatten().tolist() == [1, 1, 1], "the statistics of timm's configuration"
    expected = F.normalize(frozen(features).image_embeds, dim=-1)
    torch.testing.assert_close(teacher(pixels), expected, atol=1e-5, rtol=1e-4)


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
