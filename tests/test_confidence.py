"""The confidence of a caption: from the model's token probabilities to a calibrated probability."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from tiny import draw_picture, png_bytes
from transformers import AutoTokenizer, GenerationConfig, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import tinycap
from tinycap.confidence_tinycap import ConfidenceCalibration
from tinycap.evaluation import confidence
from tinycap.evaluation.caption_metrics.caption_metrics import cider_of_each
from tinycap.evaluation.captioning import caption_dataset
from tinycap.evaluation.metrics import score_captions
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.pipeline_tinycap import ImageToTextPipeline, caption_log_probs


CALIBRATION = {
    "calibrations": [
        {"num_beams": 1, "intercept": 2.0, "coefficients": {"mean_log_prob": 1.5, "num_tokens": -0.1}},
        {"num_beams": 4, "intercept": 0.5, "coefficients": {"mean_log_prob": 1.0, "num_tokens": -0.2}},
    ]
}


@pytest.fixture
def calibrated_repository(repository, tmp_path):
    folder = shutil.copytree(repository, tmp_path / "calibrated")
    (folder / "confidence.json").write_text(json.dumps(CALIBRATION))
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0},
        {"num_beams": 3, "repetition_penalty": 1.7},
        {"decoder_input_ids": torch.tensor([[1, 9, 7]] * 5)},
        {"num_beams": 3, "decoder_input_ids": torch.tensor([[1, 9, 7]] * 5)},
    ],
)
def test_the_models_probability_of_its_caption_is_that_of_reading_it(model, pixel_values, options):
    """For every kind of search, the sum equals that of one forward pass over the finished caption."""
    usual = model.generate(pixel_values, max_new_tokens=11, **options)
    for end_token in (token for token in usual.unique().tolist() if token > 2):
        # The first end token that gives captions of several lengths: equal lengths don't test padding.
        model.generation_config.eos_token_id = [2, end_token]
        generated = model.generate(
            pixel_values, max_new_tokens=11, return_dict_in_generate=True, output_logits=True, **options
        )
        log_probs, num_tokens = caption_log_probs(model, generated)
        if len(set(num_tokens.tolist())) > 1:
            break
    else:
        pytest.fail("all captions have one length")
    each = len(generated.sequences) // 5
    with torch.no_grad():
        images = pixel_values.repeat_interleave(each, dim=0)
        logits = model(images, decoder_input_ids=generated.sequences[:, :-1]).logits
    prompt_length = options["decoder_input_ids"].shape[1] if "decoder_input_ids" in options else 1
    for row, sequence in enumerate(generated.sequences.tolist()):
        caption = sequence[prompt_length:]
        ends = [position for position, token in enumerate(caption) if token in (2, end_token)]
        caption = caption[: ends[0] + 1 if ends else None]
        steps = torch.log_softmax(logits[row, prompt_length - 1 :], dim=-1)
        expected = sum(steps[position, token].item() for position, token in enumerate(caption))
        assert num_tokens[row] == len(caption)
        assert log_probs[row].item() == pytest.approx(expected, abs=1e-4)


def test_beam_search_ranks_by_the_same_sums(model, pixel_values):
    generated = model.generate(
        pixel_values,
        max_new_tokens=11,
        num_beams=4,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    log_probs, num_tokens = caption_log_probs(model, generated)
    torch.testing.assert_close(generated.sequences_scores, log_probs / num_tokens)


def test_the_pipeline_gives_the_confidence_of_each_caption(calibrated_repository, pictures):
    captioner = pipeline("image-to-text", model=str(calibrated_repository), trust_remote_code=True)
    plain = captioner(pictures, batch_size=3)
    found = captioner(pictures, batch_size=3, return_confidence=True)
    assert [entries[0]["generated_text"] for entries in found] == [entries[0]["generated_text"] for entries in plain]
    pixels = torch.cat([captioner.preprocess(picture)["pixel_values"] for picture in pictures])
    for beams in ({}, {"num_beams": 4, "num_return_sequences": 2}):
        generated = captioner.model.generate(pixels, return_dict_in_generate=True, output_logits=True, **beams)
        calibration = ConfidenceCalibration(CALIBRATION)
        expected = [
            calibration(log_prob, num_tokens, beams.get("num_beams", 1))
            for log_prob, num_tokens in zip(
                *(values.tolist() for values in caption_log_probs(captioner.model, generated))
            )
        ]
        found = captioner(pictures, batch_size=2, return_confidence=True, **beams)
        assert [entry["confidence"] for entries in found for entry in entries] == pytest.approx(expected, abs=1e-4)
        assert len(set(expected)) > 1
    config = GenerationConfig(**{**captioner.model.generation_config.to_diff_dict(), "num_beams": 4})
    by_config = captioner(pictures, return_confidence=True, generate_kwargs={"generation_config": config})
    assert by_config == captioner(pictures, return_confidence=True, num_beams=4)


def test_below_the_least_confidence_there_is_no_caption(calibrated_repository, pictures):
    captioner = pipeline("image-to-text", model=str(calibrated_repository), trust_remote_code=True)
    found = captioner([*pictures, "nowhere.png"], return_confidence=True)
    error = found.pop()
    confidences = sorted(entries[0]["confidence"] for entries in found)
    least = confidences[2]
    for entries, strict in zip(found, captioner(pictures, min_confidence=least)):
        text, value = entries[0]["generated_text"], entries[0]["confidence"]
        assert strict == [{"generated_text": text if value >= least else None, "confidence": value}]
    assert error[0]["generated_text"] is None and "nowhere.png" in error[0]["error"]


def test_a_confidence_that_cannot_be_given_is_an_error(repository, calibrated_repository, pictures):
    captioner = pipeline("image-to-text", model=str(repository), trust_remote_code=True)
    with pytest.raises(ValueError, match="no confidence.json"):
        captioner(pictures[0], return_confidence=True)
    captioner = pipeline("image-to-text", model=str(calibrated_repository), trust_remote_code=True)
    with pytest.raises(ValueError, match="do_sample"):
        captioner(pictures[0], return_confidence=True, do_sample=True)
    with pytest.raises(ValueError, match="min_confidence"):
        captioner(pictures[0], min_confidence=50)


def test_a_model_that_was_trained_on_takes_no_old_calibration_along(calibrated_repository, tmp_path):
    captioner = pipeline("image-to-text", model=str(calibrated_repository), trust_remote_code=True)
    captioner.model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "confidence_tinycap.py").exists()
    assert not (tmp_path / "saved" / "confidence.json").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "expected a JSON file"),
        ("[" * 100_000, "expected a JSON file"),
        ("\udcff", "expected a JSON file"),
        ("[" + "1, " * 6_000_000 + "1]", "got more than 16,777,216 characters"),
        ("[1, 2]", r"expected a JSON object, got \[1, 2\]"),
        ('{"calibrations": []}', "list of calibrations"),
        ('{"calibrations": {"num_beams": 1}}', "list of calibrations"),
        ('{"calibrations": [3]}', r"calibrations\[0\]: expected an object with coefficients, got 3"),
        ('{"calibrations": [{"num_beams": 1, "coefficients": {}}]}', "intercept, mean_log_prob, num_tokens, got"),
        ({"intercept": float("nan")}, "intercept, got {'intercept': nan}"),
        ({"intercept": "2.0"}, "intercept, got {'intercept': '2.0'}"),
        ({"intercept": 10**400}, "intercept, got"),
        ({"coefficients": {"mean_log_prob": float("inf"), "num_tokens": 1}}, "mean_log_prob, got"),
        ({"coefficients": {"mean_log_prob": 1.0, "num_tokens": None}}, "num_tokens, got"),
        ({"coefficients": [1, 2]}, "expected an object with coefficients"),
        ({"num_beams": "1"}, "num_beams of at least 1, got '1'"),
        ({"num_beams": 4}, r"calibrations\[1\]: expected another num_beams of at least 1, got 4"),
    ],
)
def test_a_malformed_calibration_is_an_error_naming_file_and_part(tmp_path, content, words):
    if isinstance(content, dict):
        first, second = CALIBRATION["calibrations"]
        content = json.dumps({"calibrations": [{**first, **content}, second]})
    path = tmp_path / "confidence.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=words) as error:
        ConfidenceCalibration.from_file(tmp_path)
    assert str(path) in str(error.value)


def test_a_missing_calibration_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        ConfidenceCalibration.from_file(tmp_path / "nowhere.json")


def test_a_log_probability_that_is_nan_gives_no_confidence():
    with pytest.raises(ValueError, match="log_prob"):
        ConfidenceCalibration(CALIBRATION)(float("nan"), 3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_or_an_endless_file_in_its_place_is_an_error(tmp_path):
    path = tmp_path / "confidence.json"
    for create in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        create(path)
        with pytest.raises(ValueError, match="confidence.json: expected a JSON file, got no regular file"):
            ConfidenceCalibration.from_file(tmp_path)
        path.unlink()


@pytest.fixture
def hub_cache(repository, tmp_path):
    """A Hub cache with two revisions of a model, "main" without and "v2" with a calibration."""
    cache = tmp_path / "cache"
    for revision, commit in (("main", "1" * 40), ("v2", "2" * 40)):
        model = cache / "models--me--captioner"
        shutil.copytree(repository, model / "snapshots" / commit)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / revision).write_text(commit)
    (model / "snapshots" / commit / "confidence.json").write_text(json.dumps(CALIBRATION))
    return cache


def test_the_calibration_comes_from_the_models_own_revision_and_cache(hub_cache, pictures):
    def captioner(**options):
        options["cache_dir"] = str(hub_cache)
        return ImageToTextPipeline(
            TinyCapForConditionalGeneration.from_pretrained("me/captioner", **options),
            tokenizer=AutoTokenizer.from_pretrained("me/captioner", **options),
            image_processor=AutoImageProcessor.from_pretrained("me/captioner", **options),
        )

    assert 0 < captioner(revision="v2")(pictures[0], return_confidence=True)[0]["confidence"] < 1
    with pytest.raises(ValueError, match="no confidence.json"):
        captioner()(pictures[0], return_confidence=True)


def test_the_calibration_is_asked_for_with_the_models_token(repository, monkeypatch):
    asked = []

    def cached_file(name, filename, **options):
        asked.append((str(name), filename, options["token"], options["revision"]))
        return str(repository / filename) if (repository / filename).exists() else None

    monkeypatch.setattr("tinycap.vision_tinycap.cached_file", cached_file)
    model = TinyCapForConditionalGeneration.from_pretrained(repository, token="hf_secret", revision="v2")
    names = [name for _, name, _, _ in asked]
    assert names[0] == "model.safetensors" and names[-1] == "confidence.json"
    assert asked == [(str(repository), name, "hf_secret", "v2") for name in names]
    assert "hf_secret" not in repr(model.__dict__) + repr(model.config.to_dict()), "saved with the model"


def test_a_calibration_in_the_models_subfolder_is_the_models(calibrated_repository, tmp_path):
    shutil.copytree(calibrated_repository, tmp_path / "all" / "small")
    model = TinyCapForConditionalGeneration.from_pretrained(tmp_path / "all", subfolder="small")
    assert model.confidence_path == str(tmp_path / "all" / "small" / "confidence.json")


def test_the_nearest_number_of_beams_is_taken_and_no_score_overflows():
    calibration = ConfidenceCalibration(CALIBRATION)
    assert calibration(-5.0, 5, 1) == calibration(-5.0, 5, 2) == pytest.approx(1 / (1 + np.exp(0.0)))
    assert calibration(-5.0, 5, 3) == calibration(-5.0, 5, 9) == pytest.approx(1 / (1 + np.exp(1.5)))
    assert calibration(-1e6, 1) == 0.0
    with pytest.raises(ValueError, match="num_tokens"):
        calibration(0.0, 0)


def synthetic(count: int, seed: int = 0):
    """Features, and labels that are right with a known probability."""
    random = np.random.default_rng(seed)
    num_tokens = random.integers(5, 20, count)
    features = np.stack([-random.random(count) * 3, num_tokens], axis=1)
    truth = 1 / (1 + np.exp(-(3.0 + 2.5 * features[:, 0] - 0.1 * num_tokens)))
    return features, truth, random.random(count) < truth


def test_fitting_finds_the_probabilities_that_made_the_captions_right():
    features, truth, right = synthetic(4000)
    entry = confidence.fit_calibration(features[:2000], right[:2000], num_beams=1)
    calibration = ConfidenceCalibration({"calibrations": [entry]})
    predicted = np.array([calibration(mean * tokens, round(tokens)) for mean, tokens in features[2000:]])
    assert np.abs(predicted - truth[2000:]).mean() < 0.03
    judged = confidence.calibration_metrics(predicted, right[2000:], seed=0)
    assert judged["ece"] < 0.04 and judged["brier"] < judged["brier_of_base_rate"]
    # An overconfident variant is detected.
    sure = 1 / (1 + ((1 - predicted) / predicted) ** 3)
    overconfident = confidence.calibration_metrics(sure, right[2000:], seed=0)
    assert overconfident["ece"] > 3 * judged["ece"] and overconfident["auc"] == pytest.approx(judged["auc"])


def test_the_calibration_error_of_bins_is_their_mean_distance():
    predicted, right = np.array([0.1] * 10 + [0.9] * 10), np.array([False] * 10 + [True] * 5 + [False] * 5)
    bins = confidence.reliability(predicted, right, num_bins=2)
    assert [(bin["count"], bin["share"]) for bin in bins] == [(10, 0.0), (10, 0.5)]
    assert confidence.expected_calibration_error(bins) == pytest.approx((0.1 + 0.4) / 2)


def test_a_threshold_leaves_the_captions_above_it():
    predicted = np.linspace(0, 1, 101)[:-1]
    ciders = np.arange(100.0)
    rows = confidence.threshold_table(predicted, predicted >= 0.5, ciders)
    assert rows[0] == {"min_confidence": 0.0, "share_left": 1.0, "cider": 49.5, "share_right": 0.5}
    assert rows[-1]["min_confidence"] == 0.9 and rows[-1]["share_left"] == pytest.approx(0.1)
    assert rows[-1]["cider"] == pytest.approx(94.5) and rows[-1]["share_right"] == 1.0


def test_the_mean_of_the_captions_ciders_is_the_corpus_cider():
    captions = ["a dog runs on grass", "two men walk", "a red car"]
    references = [["a dog runs fast", "dogs run on grass"], ["two men walk home"], ["the car is blue", "a red car"]]
    found = cider_of_each(captions, references)
    assert np.mean(found) == pytest.approx(score_captions(captions, references)["cider"])
    humans = confidence.human_ciders(references)
    assert len(humans) == 4, "those of pictures with several captions"
    with pytest.raises(ValueError, match="--min_cider"):
        confidence.human_ciders([["one"], ["each"]])


@pytest.fixture(scope="module")
def captioned(repository, tmp_path_factory):
    """Images whose references are the model's own caption for every other one, and another text for the rest."""
    folder = tmp_path_factory.mktemp("captioned")
    captioner = pipeline("image-to-text", model=str(repository), trust_remote_code=True)
    pictures = [draw_picture(seed) for seed in range(200)]
    captions = [entries[0]["generated_text"] or "none" for entries in captioner(pictures, batch_size=16)]
    words = "red green blue dog cat man woman child runs sits".split()
    rows = {
        "image": [{"bytes": png_bytes(picture)} for picture in pictures],
        "captions": [
            [caption, caption] if index % 2 else [f"the {words[index % 10]} {words[index % 7]}"] * 2
            for index, caption in enumerate(captions)
        ],
    }
    Dataset.from_dict(rows).cast_column("image", Image()).to_parquet(folder / "validation.parquet")
    return folder


@pytest.mark.slow
def test_one_command_calibrates_a_model_and_reports_it(repository, captioned, tmp_path):
    folder = shutil.copytree(repository, tmp_path / "model")
    flags = [
        "--model_name_or_path",
        str(folder),
        "--dataset_name",
        str(captioned),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    results = confidence.main([*flags, "--min_cider", "100", "--num_beams", "1"])
    assert results["num_images"] == 200 and 0.1 <= results["decodings"][0]["share_right"] <= 0.5
    stored = json.loads((folder / "confidence.json").read_text())
    assert stored == json.loads((tmp_path / "out" / "confidence.json").read_text())
    assert stored["weights_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    report = (tmp_path / "out" / "confidence.md").read_text()
    assert "| 1 | the other half | 100 |" in report and "| 0.00 | 100.0% |" in report
    assert (tmp_path / "out" / "confidence.png").stat().st_size > 1000
    found = pipeline("image-to-text", model=str(folder), trust_remote_code=True)(
        draw_picture(0), return_confidence=True
    )
    assert 0 < found[0]["confidence"] < 1
    with pytest.raises(ValueError, match="right captions"):
        confidence.main([*flags, "--min_cider", "5000", "--num_beams", "1"])


def test_log_probabilities_of_a_data_set_stay_with_their_captions(repository, photos):
    from transformers import AutoProcessor

    from tinycap.training.data import load_split

    captioner = pipeline("image-to-text", model=str(repository), trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
    rows = load_split(photos, "validation").select(range(5))
    together = caption_dataset(captioner.model, processor, rows, batch_size=3, num_beams=2)
    alone = caption_dataset(captioner.model, processor, rows, batch_size=1, num_beams=2)
    assert together.captions == alone.captions and together.num_tokens == alone.num_tokens
    assert together.log_probs == pytest.approx(alone.log_probs, abs=1e-4)


def test_the_released_calibration_is_of_the_released_weights():
    root = tinycap.REPOSITORY
    stored = json.loads((root / "confidence.json").read_text())
    assert stored["weights_sha256"] == confidence.weights_sha256(root), (
        "python -m tinycap.evaluation.confidence --model_name_or_path . calibrates the new weights"
    )
    num_beams = json.loads((root / "generation_config.json").read_text())["num_beams"]
    assert {1, num_beams} <= set(ConfidenceCalibration.from_file(root).by_num_beams)
