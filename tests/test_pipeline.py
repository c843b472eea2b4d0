import base64

import pytest
import transformers
from datasets import Dataset, Image
from tiny import png_bytes
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.pipelines.pt_utils import KeyDataset


@pytest.fixture(scope="module")
def captioner(repository):
    return pipeline("image-to-text", model=str(repository), trust_remote_code=True)


@pytest.fixture
def photo(pictures, tmp_path):
    path = tmp_path / "photo.png"
    pictures[0].save(path)
    return path


def test_one_image_gives_a_list_of_one_caption(captioner, pictures):
    found = captioner(pictures[0])
    assert len(found) == 1 and list(found[0]) == ["generated_text"] and isinstance(found[0]["generated_text"], str)


def test_every_way_to_give_an_image_gives_the_same_caption(captioner, pictures, photo):
    expected = captioner(pictures[0])
    coded = base64.b64encode(png_bytes(pictures[0])).decode()
    for image in (str(photo), photo, png_bytes(pictures[0]), coded, f"data:image/png;base64,{coded}"):
        assert captioner(image) == expected, str(image)[:40]
    assert captioner(images=pictures[0]) == captioner(inputs=pictures[0]) == expected


@pytest.mark.parametrize("batch_size", [1, 3])
def test_lists_generators_and_datasets_keep_their_order(captioner, pictures, batch_size):
    expected = [captioner(picture) for picture in pictures]
    assert captioner(pictures, batch_size=batch_size) == expected
    assert list(captioner((picture for picture in pictures), batch_size=batch_size)) == expected
    rows = Dataset.from_dict({"photo": [{"bytes": png_bytes(picture)} for picture in pictures]})
    rows = rows.cast_column("photo", Image())
    assert list(captioner(KeyDataset(rows, "photo"), batch_size=batch_size)) == expected
    assert captioner(rows["photo"], batch_size=batch_size) == expected
    assert captioner(tuple(pictures), batch_size=batch_size) == expected
    assert captioner(rows[:0]["photo"]) == captioner(rows.select([])["photo"]) == []


def test_an_empty_list_gives_an_empty_list(captioner):
    assert captioner([]) == []


@pytest.mark.parametrize("batch_size", [1, 3])
def test_several_captions_of_an_image_stay_with_it(captioner, pictures, batch_size):
    kwargs = {"num_beams": 4, "num_return_sequences": 2}
    expected = [captioner(picture, generate_kwargs=kwargs) for picture in pictures]
    assert all(len(entries) == 2 for entries in expected)
    assert captioner(pictures, batch_size=batch_size, generate_kwargs=kwargs) == expected


def test_a_prompt_begins_every_caption(captioner, pictures):
    for entries in captioner(pictures, prompt="A small ", batch_size=2):
        assert entries[0]["generated_text"].startswith("A small")


def test_max_new_tokens_shortens_captions(captioner, pictures):
    short = captioner(pictures[0], max_new_tokens=1)[0]["generated_text"]
    assert len(short) < len(captioner(pictures[0])[0]["generated_text"])
    assert captioner(pictures[0], generate_kwargs={"max_new_tokens": 1})[0]["generated_text"] == short


def test_arguments_given_to_the_pipeline_itself_hold_for_every_call(repository, pictures):
    short = pipeline("image-to-text", model=str(repository), trust_remote_code=True, max_new_tokens=1, batch_size=2)
    plain = pipeline("image-to-text", model=str(repository), trust_remote_code=True)
    assert short(pictures) == plain(pictures, max_new_tokens=1)


def test_a_model_and_a_processor_in_memory_make_a_pipeline(captioner, repository, pictures):
    model = AutoModelForImageTextToText.from_pretrained(repository, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    kind = type(captioner)
    for made in (
        kind(model=model, processor=processor),
        pipeline("image-text-to-text", model=model, pipeline_class=kind, **parts),
    ):
        assert made(pictures) == captioner(pictures)


def test_call_arguments_go_over_those_of_the_pipeline(captioner, repository, pictures, caplog):
    transformers.utils.logging.enable_propagation()
    caplog.clear()
    beams = pipeline("image-to-text", model=str(repository), trust_remote_code=True, num_beams=3)
    found = beams(pictures[0], max_new_tokens=2, num_return_sequences=3)
    transformers.utils.logging.disable_propagation()
    assert found == captioner(pictures[0], max_new_tokens=2, num_return_sequences=3, num_beams=3)
    assert "generation-related arguments" not in caplog.text


def test_an_argument_given_twice_or_unknown_is_an_error_that_names_it(captioner, pictures):
    with pytest.raises(ValueError, match="max_new_tokens"):
        captioner(pictures[0], max_new_tokens=3, generate_kwargs={"max_new_tokens": 4})
    with pytest.raises(TypeError, match="max_tokens"):
        captioner(pictures[0], max_tokens=3)
    with pytest.raises(ValueError, match="prompt"):
        captioner(pictures[0], prompt=["A", "B"])
    with pytest.raises(ValueError, match="images"):
        captioner(None)


def test_an_image_that_cannot_be_read_is_an_error_naming_it(captioner, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 no picture")
    for name in (str(broken), str(tmp_path / "nowhere.jpg")):
        with pytest.raises(ValueError) as error:
            captioner(name)
        assert name in str(error.value)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_among_several_images_the_others_still_get_captions(captioner, pictures, photo, tmp_path, batch_size):
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    found = captioner([str(photo), str(empty), pictures[1], "nowhere.png"], batch_size=batch_size)
    assert [found[0], found[2]] == [captioner(pictures[0]), captioner(pictures[1])]
    for entries, name in ((found[1], str(empty)), (found[3], "nowhere.png")):
        assert entries[0]["generated_text"] is None and name in entries[0]["error"]


@pytest.mark.parametrize("size", [(1, 1), (60, 3), (3, 60), (1, 4), (50, 1)])
def test_an_image_as_high_as_there_are_channels_is_captioned(captioner, size):
    """transformers 4 guesses the channel axis."""
    from PIL import Image as Pillow

    plain = captioner.preprocess(Pillow.new("RGB", size, (200, 30, 90)))["pixel_values"]
    large = captioner.preprocess(Pillow.new("RGB", (60, 60), (200, 30, 90)))["pixel_values"]
    assert (plain - large).abs().max() < 0.02
