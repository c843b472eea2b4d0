"""Tests for every supported release of transformers, run by the sessions of noxfile.py.

They need only torch, transformers and scikit-learn, and no conftest.py.
"""

import logging

import pytest
import torch
import transformers
from golden import DECODING, ROOT, golden_images, read_golden_captions
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

# `from transformers import AutoImageProcessor` requires torchvision in 5.4 to 5.16.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tinycap.checks_tinycap import read_json
from tinycap.deploy.image_preprocessing import ImagePreprocessor


TRUST = {"trust_remote_code": True}
IMAGES, GOLDEN = golden_images(), read_golden_captions()


@pytest.fixture(autouse=True)
def another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def captioner():
    return pipeline("image-to-text", model=str(ROOT), **TRUST)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(ROOT, **TRUST)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, **TRUST)


def captions_of(outputs) -> list[str]:
    return [entries[0]["generated_text"] for entries in outputs]


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
def test_every_weight_is_loaded_and_the_head_is_tied(auto_class):
    model, report = auto_class.from_pretrained(ROOT, output_loading_info=True, **TRUST)
    assert not any(report.values()), report
    assert model.lm_head.weight is model.decoder.embed_tokens.weight


def test_tokenizer_and_image_processor_load_by_themselves():
    assert AutoTokenizer.from_pretrained(ROOT, **TRUST)("").input_ids == [2]
    pixel_values = AutoImageProcessor.from_pretrained(ROOT, **TRUST)(IMAGES["china"], return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 224, 224)


def test_a_path_an_image_and_a_list_are_captioned_alike(captioner, tmp_path):
    IMAGES["china"].save(tmp_path / "china.png")
    expected = [GOLDEN[name]["3 beams"] for name in ("china", "ball", "one pixel")]
    assert captions_of([captioner("china.png"), captioner(IMAGES["china"])]) == [expected[0]] * 2
    images = ["china.png", IMAGES["ball"], IMAGES["one pixel"]]
    assert captions_of(captioner(images)) == captions_of(captioner(images, batch_size=2)) == expected


@pytest.mark.parametrize("decoding", ["greedy", pytest.param("3 beams", marks=pytest.mark.slow)])
def test_processor_and_generate_give_the_golden_captions(model, processor, decoding):
    images = {name: image for name, image in IMAGES.items() if image.height > 4}
    inputs = processor(images=list(images.values()), text=[""] * len(images), return_tensors="pt")
    tokens = model.generate(**inputs, **DECODING[decoding])
    captions = processor.batch_decode(tokens, skip_special_tokens=True)
    assert dict(zip(images, map(str.strip, captions))) == {name: GOLDEN[name][decoding] for name in images}


def test_a_prompt_is_continued_and_several_captions_are_returned(captioner, model, processor):
    image = IMAGES["ball"]
    assert captions_of([captioner(image, prompt="Two dogs")])[0].startswith("Two dogs")
    several = captioner(image, num_beams=3, num_return_sequences=3)
    assert len({entry["generated_text"] for entry in several}) == 3
    assert several[0]["generated_text"] == GOLDEN["ball"]["3 beams"]
    inputs = processor(images=image, text="Two dogs", return_tensors="pt")
    assert model.generate(**inputs, num_return_sequences=2).shape[0] == 2


def test_a_static_cache_gives_the_same_caption_or_an_error(model, processor):
    inputs = processor(images=IMAGES["china"], text="", return_tensors="pt")
    try:
        tokens = model.generate(**inputs, num_beams=1, cache_implementation="static")
    except ValueError as error:
        assert "static" in str(error)
    else:
        assert processor.batch_decode(tokens, skip_special_tokens=True)[0].strip() == GOLDEN["china"]["greedy"]


def test_what_is_saved_elsewhere_captions_alike(captioner, tmp_path):
    captioner.save_pretrained(tmp_path / "copy")
    again = pipeline("image-to-text", model=str(tmp_path / "copy"), **TRUST)
    assert captions_of([again(IMAGES["flower"])]) == [GOLDEN["flower"]["3 beams"]]


def test_generation_logs_no_warning(captioner, caplog):
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        captioner(IMAGES["china"], max_new_tokens=5)
        captioner(IMAGES["china"])
    transformers.utils.logging.disable_propagation()
    assert not [record.message for record in caplog.records if "max_length" in record.message]


def test_a_step_of_training_lowers_the_loss(model, captioner):
    model = AutoModel.from_pretrained(ROOT, **TRUST).train()
    pixel_values = captioner.preprocess(IMAGES["china"])["pixel_values"]
    labels = captioner.tokenizer("A temple", return_tensors="pt").input_ids
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        loss = model(pixel_values, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_pixels_differ_from_those_of_pillow_by_little(captioner, record_property):
    """transformers 5 resizes with torchvision if it is installed."""
    expected = torch.from_numpy(ImagePreprocessor(read_json(ROOT / "preprocessor_config.json"))(list(IMAGES.values())))
    pixel_values = torch.cat([captioner.preprocess(image)["pixel_values"] for image in IMAGES.values()])
    difference = (pixel_values - expected).abs()
    record_property("image_processor", type(captioner.image_processor).__name__)
    record_property("max_difference", difference.max().item())
    record_property("mean_difference", difference.mean().item())
    assert difference.mean() < 0.01


@pytest.mark.parametrize("size", [(1, 1), (60, 3), (3, 60), (1, 4), (5, 2), (12, 4), (50, 1)])
def test_rows_of_a_tiny_image_are_not_taken_for_channels(captioner, size):
    plain = captioner.preprocess(Image.new("RGB", size, (200, 30, 90)))["pixel_values"]
    large = captioner.preprocess(Image.new("RGB", (60, 60), (200, 30, 90)))["pixel_values"]
    assert (plain - large).abs().max() < 0.02
