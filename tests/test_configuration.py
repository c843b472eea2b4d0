import pytest
import torch
from tiny import tiny_config

from tinycap.configuration_tinycap import TinyCapConfig, TinyCapTextConfig, TinyCapVisionConfig
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration


def test_the_defaults_are_the_seed_architecture_to_the_parameter():
    with torch.device("meta"):
        model = TinyCapForConditionalGeneration(TinyCapConfig())
    assert model.num_parameters() == 18_189_888
    assert model.vision_model.num_parameters() == 3_003_456
    assert model.decoder.num_parameters() == 15_186_432


def test_an_untied_head_adds_one_matrix_of_the_vocabulary():
    tied, untied = (
        TinyCapForConditionalGeneration(tiny_config()),
        TinyCapForConditionalGeneration(tiny_config(tie_word_embeddings=False)),
    )
    assert untied.num_parameters() - tied.num_parameters() == 37 * 16


def test_a_config_survives_its_json(tmp_path):
    config = tiny_config(memory="patches", memory_scale=2.5, distill_weight=0.3, label_smoothing=0.1)
    config.save_pretrained(tmp_path)
    loaded = TinyCapConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == {**config.to_dict(), "_name_or_path": loaded._name_or_path}
    assert (loaded.vision_config.projection_dim, loaded.text_config.vocab_size) == (14, 37)


def test_parts_may_be_given_as_configs_or_as_dicts():
    by_dict = TinyCapConfig(vision_config={"hidden_size": 66}, text_config={"vocab_size": 41})
    by_config = TinyCapConfig(TinyCapVisionConfig(hidden_size=66), TinyCapTextConfig(vocab_size=41))
    assert by_dict.to_dict() == by_config.to_dict()


def test_a_config_made_in_python_names_its_code_and_its_pipeline():
    config = TinyCapConfig()
    assert config.auto_map["AutoModelForImageTextToText"] == "modeling_tinycap.TinyCapForConditionalGeneration"
    assert config.custom_pipelines["image-to-text"]["impl"] == "pipeline_tinycap.ImageToTextPipeline"


def test_ids_given_at_the_top_reach_the_text_config():
    config = tiny_config(pad_token_id=5, eos_token_id=6)
    assert (config.text_config.pad_token_id, config.text_config.eos_token_id) == (5, 6)
    assert config.decoder_start_token_id == config.bos_token_id == 1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"vision_config": {"hidden_size": 13}}, ["hidden_size 13", "num_attention_heads 3"]),
        ({"vision_config": {"patch_size": 7}}, ["image_size 24", "patch_size 7"]),
        ({"vision_config": {"num_hidden_layers": 0}}, ["num_hidden_layers", "0"]),
        ({"text_config": {"vocab_size": -3}}, ["vocab_size", "-3"]),
        ({"text_config": {"max_position_embeddings": 2.5}}, ["max_position_embeddings", "2.5"]),
        ({"text_config": {"hidden_dropout_prob": 1.5}}, ["hidden_dropout_prob", "1.5"]),
        ({"text_config": {"eos_token_id": 37}}, ["eos_token_id", "37"]),
        ({"memory": "tokens"}, ["memory", "embedding", "patches", "tokens"]),
        ({"memory_scale": 0}, ["memory_scale", "0"]),
        ({"distill_weight": -1}, ["distill_weight", "-1"]),
        ({"label_smoothing": 1.0}, ["label_smoothing", "1.0"]),
        ({"memory_noise": -0.5}, ["memory_noise", "at least 0", "-0.5"]),
        ({"memory": "patches", "memory_noise": 0.5}, ["memory_noise", "patches", "0.5"]),
    ],
)
def test_a_size_that_makes_no_sense_is_an_error_that_names_it(changes, words):
    with pytest.raises(ValueError) as error:
        tiny_config(**changes)
    assert all(word in str(error.value) for word in words), error.value
