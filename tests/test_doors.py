"""The three ways to load the model, from another working directory and, where code is loaded, in a new process."""

import json

import pytest
import torch
import transformers
from fresh import run_fresh
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_model, tiny_repository_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    generation,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import tinycap


TRUST = {"trust_remote_code": True}


@pytest.fixture(autouse=True)
def another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# transformers 4 has no `AutoModelForMultimodalLM`.
AUTO_CLASSES = [AutoModel, AutoModelForImageTextToText]
AUTO_CLASSES += [getattr(transformers, name) for name in ["AutoModelForMultimodalLM"] if hasattr(transformers, name)]


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_save_and_reload_is_bit_exact(repository, auto_class, pixel_values, tokenizer):
    original = tiny_repository_model(tokenizer)
    loaded, report = auto_class.from_pretrained(repository, output_loading_info=True, **TRUST)
    assert type(loaded).__name__ == "TinyCapForConditionalGeneration"
    assert not any(report.values()), report
    for name, parameter in original.state_dict().items():
        assert torch.equal(parameter, loaded.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values).logits, original(pixel_values).logits)


def test_the_tied_head_is_stored_once(repository):
    stored = load_file(repository / "model.safetensors")
    assert "lm_head.weight" not in stored and "decoder.embed_tokens.weight" in stored
    model = AutoModel.from_pretrained(repository, **TRUST)
    assert model.lm_head.weight is model.decoder.embed_tokens.weight


def test_every_auto_class_opens_the_folder(repository):
    assert AutoConfig.from_pretrained(repository, **TRUST).model_type == "tinycap"
    assert AutoTokenizer.from_pretrained(repository, **TRUST)("").input_ids == [2]
    assert AutoImageProcessor.from_pretrained(repository, **TRUST).crop_size["height"] == 24
    processor = AutoProcessor.from_pretrained(repository, **TRUST)
    inputs = processor(images=Image.new("RGB", (31, 29)), text="A brown", return_tensors="pt")
    model = AutoModel.from_pretrained(repository, **TRUST)
    text = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0]
    assert text.startswith("A brown")


@pytest.mark.slow
def test_a_new_process_elsewhere_loads_and_captions(repository, tmp_path):
    code = """
import sys, torch
from PIL import Image
from transformers import AutoModel, pipeline
torch.manual_seed(0)
captioner = pipeline("image-to-text", model=sys.argv[1], trust_remote_code=True)
print(captioner(Image.new("RGB", (40, 30), "red"))[0]["generated_text"].encode())
"""
    caption = pipeline("image-to-text", model=str(repository), **TRUST)(Image.new("RGB", (40, 30), "red"))
    assert run_fresh(code, repository, folder=tmp_path).strip() == str(caption[0]["generated_text"].encode())


@pytest.mark.slow
def test_a_user_sees_no_deprecation_warning(repository, tmp_path):
    code = """
import sys
sys.stderr = sys.stdout
import torch
from PIL import Image
from transformers import pipeline
captioner = pipeline("image-to-text", model=sys.argv[1], trust_remote_code=True)
pictures = [Image.new("RGB", (40, 30), "red")] * 2
captioner(pictures, prompt="A", num_beams=2, batch_size=2)
pixels, labels = torch.zeros(2, 3, 24, 24), torch.full((2, 3), 5)
captioner.model.generate(pixels, return_dict_in_generate=True, output_attentions=True, output_hidden_states=True)
captioner.model(pixels, decoder_input_ids=labels)
captioner.model.train()(pixels, labels=labels).loss.backward()
print("done")
"""
    shown = run_fresh(code, repository, folder=tmp_path)
    assert "done" in shown and "deprecat" not in shown.lower(), shown


@pytest.mark.parametrize("how", ["model", "pipeline"])
def test_what_save_pretrained_writes_is_a_repository_again(repository, tmp_path, pictures, how):
    captioner = pipeline("image-to-text", model=str(repository), **TRUST)
    copy = tmp_path / "copy"
    if how == "model":
        captioner.model.save_pretrained(copy)
        captioner.tokenizer.save_pretrained(copy)
        captioner.image_processor.save_pretrained(copy)
    else:
        captioner.save_pretrained(copy)
    for name in ("configuration", "modeling", "pipeline", "processing"):
        assert (copy / f"{name}_tinycap.py").read_bytes() == (repository / f"{name}_tinycap.py").read_bytes()
    again = pipeline("image-to-text", model=str(copy), **TRUST)
    assert again(pictures) == captioner(pictures)
    assert type(again).__name__ == "ImageToTextPipeline"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_load_in_the_wanted_precision_and_generate(repository, dtype, pixel_values):
    model = AutoModel.from_pretrained(repository, dtype=dtype, **TRUST)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.generate(pixel_values, max_new_tokens=4).shape[0] == 5


def test_the_builtin_image_text_to_text_pipeline_captions_and_continues(repository, pictures):
    captioner = pipeline("image-text-to-text", model=str(repository), **TRUST)
    expected = pipeline("image-to-text", model=str(repository), **TRUST)
    # transformers 4 has a default length for this task.
    found = captioner(images=pictures[0], text="", generate_kwargs={"max_new_tokens": 9})
    assert found[0]["generated_text"].strip() == expected(pictures[0])[0]["generated_text"]
    found = captioner(images=pictures[:2], text=["A brown", "Two"])
    assert [one["generated_text"][: len(start)] for one, start in zip(found, ("A brown", "Two"))] == ["A brown", "Two"]


def test_the_pipelines_lengths_come_before_the_models(repository, pictures, monkeypatch):
    warned = []
    monkeypatch.setattr(generation.utils.logger, "warning", warned.append)
    captioner = pipeline("image-to-text", model=str(repository), **TRUST)
    assert captioner.model.generation_config.max_new_tokens == 9
    captioner.model.generation_config.eos_token_id = None
    sizes = []
    monkeypatch.setattr(captioner, "postprocess", lambda outputs, **_: sizes.append(outputs["sequences"].shape[-1]))
    for options in ({}, {"max_length": 5}, {"max_new_tokens": 3}, {"generate_kwargs": {"max_length": 6}}):
        captioner(pictures[0], **options)
    assert sizes == [1 + 9, 5, 1 + 3, 6] and not warned


def test_the_feature_extraction_pipeline_gives_features_not_logits(repository, pictures):
    extractor = pipeline("image-feature-extraction", model=str(repository), **TRUST)
    pixels = extractor.image_processor(pictures, return_tensors="pt").pixel_values
    expected = extractor.model.get_image_features(pixels)
    pooled, tokens = extractor(pictures, pool=True), extractor(pictures)
    torch.testing.assert_close(torch.tensor(pooled)[:, 0], expected.pooler_output)
    torch.testing.assert_close(torch.tensor(tokens)[:, 0], expected.last_hidden_state)


def test_the_tokenizer_names_a_class_that_transformers_4_knows(repository):
    config = json.loads((repository / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["processor_class"] == "GitProcessor"


def test_the_weights_may_be_read_by_others(repository):
    assert (repository / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_saving_over_the_code_itself_is_refused(tokenizer):
    from tinycap.training.repository import create_image_processor, save_repository

    with pytest.raises(ValueError, match="folder other than the code's own"):
        save_repository(tinycap.REPOSITORY, tiny_model(), tokenizer, create_image_processor(24))


@pytest.mark.slow
def test_the_root_of_the_project_is_such_a_repository(pictures, tmp_path):
    root = str(tinycap.REPOSITORY)
    captioner = pipeline("image-to-text", model=root, **TRUST)
    captions = [entries[0]["generated_text"] for entries in captioner(pictures, batch_size=3)]
    assert all(captions)
    for auto_class in (AutoConfig, AutoTokenizer, AutoImageProcessor, AutoProcessor, AutoModelForImageTextToText):
        auto_class.from_pretrained(root, **TRUST)
    builtin = pipeline("image-text-to-text", model=root, **TRUST)
    assert builtin(images=pictures[0], text="A")[0]["generated_text"].startswith("A")
    # The default architecture with a smaller vocabulary.
    student, text = captioner.model.vision_model, captioner.model.config.text_config
    assert student.num_parameters() == 3_003_456
    assert (text.hidden_size, text.num_hidden_layers, text.max_position_embeddings) == (256, 2, 64)
    captioner.save_pretrained(tmp_path)
    again = pipeline("image-to-text", model=str(tmp_path), **TRUST)
    assert [entries[0]["generated_text"] for entries in again(pictures, batch_size=3)] == captions
