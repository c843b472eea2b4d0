"""The text encoder: texts embedded where the student embeds images."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ENCODER, tiny_config, tiny_model
from transformers import AutoModel, AutoTokenizer, pipeline

from tinycap.configuration_tinycap import TinyCapConfig, TinyCapTextEncoderConfig
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration, TinyCapVisionModel
from tinycap.zero_shot_tinycap import TinyCapForZeroShotImageClassification


def text_model(**changes) -> TinyCapForConditionalGeneration:
    return tiny_model(text_encoder_config={**ENCODER, **changes})


IDS = torch.tensor([[5, 9, 11, 3], [7, 8, 0, 0], [6, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


def test_the_seed_sizes_make_1_8_million_parameters_and_none_by_default():
    with torch.device("meta"):
        config = TinyCapConfig(text_encoder_config=TinyCapTextEncoderConfig())
        model = TinyCapForConditionalGeneration(config)
    assert model.text_model.num_parameters() == 1_793_792
    assert model.num_parameters() == 18_189_888 + 1_793_792 + 1
    assert TinyCapConfig().text_encoder_config is None


def test_a_text_embedding_has_unit_norm_and_the_images_width():
    model = text_model()
    output = model.get_text_features(IDS, MASK)
    assert output.text_embeds.shape == (3, 14)
    assert torch.allclose(output.text_embeds.norm(dim=1), torch.ones(3))
    assert output.last_hidden_state.shape == (3, 4, 16)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_changes_no_text_embedding(side, implementation):
    model = text_model()
    model.set_attn_implementation(implementation)
    ids, mask = (IDS, MASK) if side == "right" else (IDS.flip(1), MASK.flip(1))
    together = model.get_text_features(ids, mask).text_embeds
    for row in range(3):
        alone = model.get_text_features(ids[row][mask[row].bool()][None]).text_embeds
        assert torch.allclose(together[row], alone[0], atol=1e-6)
    assert model.config.pad_token_id == 0
    torch.testing.assert_close(model.get_text_features(ids).text_embeds, together, msg="padding without a mask")


def test_both_directions_and_the_order_of_words_count():
    model = text_model()
    embeds = [model.get_text_features(torch.tensor([ids])).last_hidden_state[0] for ids in ([5, 9, 3], [5, 9, 4])]
    assert (embeds[0][0] - embeds[1][0]).abs().max() > 1e-3
    swapped = [model.get_text_features(torch.tensor([ids])).text_embeds for ids in ([5, 9, 3], [9, 5, 3])]
    assert (swapped[0] - swapped[1]).abs().max() > 1e-3


def test_captions_and_their_loss_dont_depend_on_the_text_encoder(pixel_values, labels):
    with_encoder, without = text_model(), tiny_model()
    without.load_state_dict(with_encoder.state_dict(), strict=False)
    losses = [model(pixel_values, labels=labels).loss for model in (with_encoder, without)]
    assert torch.equal(*losses)
    captions = [model.generate(pixel_values, max_new_tokens=6) for model in (with_encoder, without)]
    assert torch.equal(*captions)


@pytest.mark.parametrize("length", [0, 18])
def test_a_text_without_tokens_or_with_too_many_is_an_error(length):
    with pytest.raises(ValueError, match=f"1 to 17 tokens.*got {length}"):
        text_model().get_text_features(torch.ones(2, length, dtype=torch.long))


def test_a_captioner_without_a_text_encoder_says_so():
    with pytest.raises(ValueError, match="text_encoder_config"):
        tiny_model().get_text_features(IDS)


def test_the_encoders_tokens_must_have_the_decoders_width():
    with pytest.raises(ValueError, match="text_encoder_config.hidden_size: expected 16.*got 20"):
        tiny_config(text_encoder_config={**ENCODER, "hidden_size": 20})


def test_a_pooled_teachers_images_are_projected_to_its_texts(pixel_values):
    model = text_model(projection_dim=10)
    assert model.get_image_features(pixel_values).pooler_output.shape == (5, 14)
    embeds = model.project_for_texts(model.get_image_features(pixel_values).pooler_output)
    assert embeds.shape == (5, 10)
    assert torch.allclose(embeds.norm(dim=1), torch.ones(5))


def test_half_precision_embeds_texts_as_float32_does():
    model = text_model()
    expected = model.get_text_features(IDS, MASK).text_embeds
    got = model.to(torch.bfloat16).get_text_features(IDS, MASK).text_embeds
    assert got.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(expected, got.float()).min() > 0.99


def test_a_saved_text_encoder_reloads_through_every_door(text_repository, pixel_values):
    model = AutoModel.from_pretrained(text_repository, trust_remote_code=True)
    assert model.config.text_encoder_config.intermediate_size == 22
    again = TinyCapForZeroShotImageClassification.from_pretrained(text_repository)
    embeds = [each.get_text_features(IDS, MASK).pooler_output for each in (model, again)]
    assert torch.equal(*embeds)
    student = TinyCapVisionModel.from_pretrained(text_repository)
    assert torch.equal(student(pixel_values).pooler_output, model.get_image_features(pixel_values).pooler_output)


def test_logits_are_scaled_cosines_of_images_and_texts(text_repository, pixel_values):
    model = TinyCapForZeroShotImageClassification.from_pretrained(text_repository)
    output = model(pixel_values=pixel_values, input_ids=IDS, attention_mask=MASK)
    cosines = output.image_embeds @ output.text_embeds.T
    assert output.logits_per_image.shape == (5, 3)
    assert torch.allclose(output.logits_per_image, cosines / 0.07, atol=1e-4)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)


def test_the_zero_shot_pipeline_scores_every_label(text_repository, pictures):
    classify = pipeline("zero-shot-image-classification", model=str(text_repository), trust_remote_code=True)
    labels = ["a dog", "a wet street", "a child in a red coat"]
    scores = classify(pictures[:2], candidate_labels=labels, hypothesis_template="{}")
    model = TinyCapForZeroShotImageClassification.from_pretrained(text_repository)
    tokenizer = AutoTokenizer.from_pretrained(text_repository)
    inputs = tokenizer(labels, padding=True, return_tensors="pt")
    pixels = classify.image_processor(pictures[0].convert("RGB"), return_tensors="pt").pixel_values
    expected = model(pixels, inputs["input_ids"], inputs["attention_mask"]).logits_per_image.softmax(dim=1)[0]
    assert {row["label"]: row["score"] for row in scores[0]} == pytest.approx(dict(zip(labels, expected.tolist())))


def test_what_is_saved_from_remote_code_has_the_zero_shot_file(text_repository, tmp_path):
    AutoModel.from_pretrained(text_repository, trust_remote_code=True).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy/zero_shot_tinycap.py").is_file()
    config = json.loads((tmp_path / "copy/config.json").read_text())
    assert config["auto_map"]["AutoModelForZeroShotImageClassification"].endswith("ForZeroShotImageClassification")


def test_missing_or_contradicting_encoder_weights_are_an_error(text_repository, tmp_path):
    for path in text_repository.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(text_repository / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "text_model.proj" not in name},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ValueError, match="2 are missing: text_model.projection"):
        TinyCapForConditionalGeneration.from_pretrained(tmp_path)
    weights["text_model.embed_positions.weight"] = torch.zeros(18, 16)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"embed_positions.weight: the config expects the shape \[17, 16\]"):
        TinyCapForConditionalGeneration.from_pretrained(tmp_path)
