"""The exported graphs and the captioner without PyTorch, compared with `generate()` and the pipeline."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh import run_fresh
from PIL import Image
from tiny import draw_picture, png_bytes, tiny_model
from transformers import AutoModelForImageTextToText, CLIPImageProcessor, pipeline

from tinycap import REPOSITORY
from tinycap.deploy import cli, export
from tinycap.deploy.export import DecoderGraph, EncoderGraph, export_onnx
from tinycap.deploy.image_preprocessing import ImagePreprocessor
from tinycap.deploy.onnx_captioner import OnnxCaptioner
from tinycap.deploy.token_search import beam_search
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training.repository import create_image_processor


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(exported_repository):
    return AutoModelForImageTextToText.from_pretrained(exported_repository, trust_remote_code=True)


@pytest.fixture(scope="module")
def captioner(exported) -> OnnxCaptioner:
    return OnnxCaptioner.from_pretrained(exported, num_threads=1)


def test_the_captions_are_the_pipelines(exported_repository, captioner, pictures):
    pipe = pipeline("image-to-text", model=str(exported_repository), trust_remote_code=True)
    for options in ({}, {"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2}, {"prompt": "A brown "}):
        expected = [[found["generated_text"] for found in row] for row in pipe(pictures, **options)]
        assert [[found.text for found in row] for row in captioner(pictures, **options)] == expected
        alone = [[found.text for found in captioner(picture, **options)[0]] for picture in pictures]
        assert alone == expected, "batches change nothing"


NPM = os.environ.get("TINYCAP_NPM", "")
HAS_TRANSFORMERS_JS = Path(NPM, "node_modules/@huggingface/transformers").is_dir() and shutil.which("node") is not None


@pytest.mark.skipif(
    not NPM or not HAS_TRANSFORMERS_JS,
    reason="needs node, and TINYCAP_NPM, a folder where npm installed @huggingface/transformers",
)
def test_transformers_js_captions_with_the_exported_folder(exported, captioner, tmp_path):
    """Greedily, in both precisions, from images of the model's size: its resize isn't Pillow's."""
    images = [str(tmp_path / f"{seed}.png") for seed in range(6)]
    for seed, path in enumerate(images):
        draw_picture(seed, (24, 24)).save(path)
    script = Path(__file__).with_name("slow") / "transformers_js.mjs"
    found = json.loads(subprocess.check_output(["node", script, NPM, exported, *images], text=True))
    quantized = OnnxCaptioner.from_pretrained(exported, quantized=True, num_threads=1)
    for name, each in (("fp32", captioner), ("q8", quantized)):
        assert found[name] == [row[0].text for row in each(images, num_beams=1)]


@pytest.mark.skipif(
    not os.environ.get("TINYCAP_OPTIMUM"),
    reason="needs TINYCAP_OPTIMUM, a Python with optimum-onnx[onnxruntime], which requires transformers 4.57",
)
def test_optimum_captions_with_the_exported_folder(exported, captioner, tmp_path):
    images = [str(tmp_path / f"{seed}.png") for seed in range(6)]
    for seed, path in enumerate(images):
        draw_picture(seed).save(path)
    script = Path(__file__).with_name("slow") / "optimum_captions.py"
    command = [os.environ["TINYCAP_OPTIMUM"], script, exported, *images]
    # By itself, without this project.
    found = json.loads(subprocess.check_output(command, text=True, cwd=tmp_path).splitlines()[-1])
    for num_beams in (1, 3):
        assert found[str(num_beams)] == [row[0].text for row in captioner(images, num_beams=num_beams)]


def test_the_exported_config_has_stock_names_and_older_exports_load(
    exported_repository, exported, captioner, pictures, tmp_path
):
    config, own = (json.loads((folder / "config.json").read_text()) for folder in (exported, exported_repository))
    assert config["model_type"] == "vision-encoder-decoder" and not {"auto_map", "custom_pipelines"} & set(config)
    text = own["text_config"]
    assert config["decoder"]["model_type"] == "trocr" and config["decoder"]["d_model"] == text["hidden_size"]
    assert config["decoder"]["decoder_layers"] == text["num_hidden_layers"]
    assert config["decoder"]["decoder_attention_heads"] == text["num_attention_heads"]
    older = Path(shutil.copytree(exported, tmp_path / "older"))
    shutil.copy(exported_repository / "config.json", older / "config.json")
    found = OnnxCaptioner.from_pretrained(older, num_threads=1)
    assert found.max_positions == captioner.max_positions == text["max_position_embeddings"]
    assert found(pictures) == captioner(pictures)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.4}])
def test_scores_are_the_log_probabilities_that_the_model_gives_the_tokens(model, captioner, pictures, options):
    pixel_values = torch.from_numpy(captioner.preprocessor(pictures))
    for row, picture in zip(captioner(pictures, **options), pixel_values):
        tokens = model.generate(picture[None], **options)
        with torch.no_grad():
            logits = model(picture[None], decoder_input_ids=tokens[:, :-1]).logits
        log_probs = logits.log_softmax(dim=-1).gather(2, tokens[:, 1:, None])[..., 0]
        for caption, scores, ids in zip(row, log_probs, tokens[:, 1:].tolist()):
            eos = model.generation_config.eos_token_id
            length = ids.index(eos) + 1 if eos in ids else len(ids)
            assert caption.num_tokens == length
            assert caption.score == pytest.approx(scores[:length].sum().item(), abs=1e-4)


@pytest.mark.parametrize("memory", ["embedding", "patches"])
def test_the_graphs_say_what_the_model_says(memory, pixel_values):
    """As modules, without an export: both kinds of memory, with and without a cache."""
    model = tiny_model(memory=memory)
    tokens = torch.randint(3, 37, (5, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(pixel_values, decoder_input_ids=tokens).logits
        states, image_embeds = EncoderGraph(model)(pixel_values)
        empty = [torch.zeros(5, 2, 0, 8) for _ in range(6)]
        first, *present = DecoderGraph(model)(tokens[:, :4], states, empty)
        rest, *present = DecoderGraph(model)(tokens[:, 4:], states, present)
    torch.testing.assert_close(first[:, 0], expected[:, 3])
    torch.testing.assert_close(rest[:, 0], expected[:, 5])
    torch.testing.assert_close(image_embeds, model.get_image_features(pixel_values).pooler_output)
    assert present[0].shape == (5, 2, 6, 8)


def test_memory_of_patches_is_exported_too(
    patches_repository, exported_patches, tokenizer, tmp_path, pictures, monkeypatch
):
    model = AutoModelForImageTextToText.from_pretrained(patches_repository, trust_remote_code=True)
    sequences = model.generate(create_image_processor(24)(pictures, return_tensors="pt").pixel_values)
    expected = [text.strip() for text in tokenizer.batch_decode(sequences, skip_special_tokens=True)]
    assert [row[0].text for row in OnnxCaptioner.from_pretrained(exported_patches)(pictures)] == expected
    # Into the repository itself, which already has the small files; the graphs are those above.
    folder = shutil.copytree(patches_repository, tmp_path / "patches")
    monkeypatch.setattr(
        export, "_export", lambda module, inputs, path, *_: shutil.copy(exported_patches / "onnx" / path.name, path)
    )
    assert cli.main(["export", "--model", str(folder), "--output", str(folder), "--no-quantize"]) == 0
    assert not list((folder / "onnx").glob("*quantized*"))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "tinycap"
    assert [row[0].text for row in OnnxCaptioner.from_pretrained(folder)(pictures)] == expected


def decoding_step(model: TinyCapForConditionalGeneration, pixel_values: torch.Tensor):
    """The model as a step function of the searches, without an export."""
    states, cache = EncoderGraph(model)(pixel_values)[0], []

    def step(tokens: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
        repeated = states.repeat_interleave(len(tokens) // len(states), dim=0)
        if not cache:
            cache[:] = [torch.zeros(len(tokens), 2, 0, 8) for _ in range(6)]
        elif rows is not None:
            cache[:] = [tensor[torch.from_numpy(rows)] for tensor in cache]
        logits, *cache[:] = DecoderGraph(model)(torch.from_numpy(tokens), repeated, cache)
        return logits[:, -1].numpy()

    return step


def model_with_end(bias: float) -> TinyCapForConditionalGeneration:
    """A tiny model whose end token becomes more likely with the bias."""
    model = tiny_model()
    model.lm_head = torch.nn.Linear(16, 37)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5, generator=torch.Generator().manual_seed(4))
    torch.nn.init.zeros_(model.lm_head.bias).data[2] = bias
    return model


@torch.no_grad()
def test_beam_search_is_that_of_transformers(pixel_values):
    pixel_values, lengths = pixel_values[:3], set()
    for bias in (1.0, 3.5):
        model = model_with_end(bias)
        for early_stopping, length_penalty in itertools.product((False, True, "never"), (-1.0, 0.0, 1.5)):
            search = {
                **{"num_beams": 4, "num_return_sequences": 3},
                **{"early_stopping": early_stopping, "length_penalty": length_penalty},
                **({"suppress_tokens": [3, 17, 21]} if length_penalty else {}),
            }
            expected = model.generate(
                pixel_values, max_new_tokens=7, return_dict_in_generate=True, output_scores=True, **search
            )
            found, scores = beam_search(decoding_step(model, pixel_values), np.ones((3, 1), np.int64), [2], 7, **search)
            rows = [tokens for image in found for tokens in image]
            for tokens, row in zip(rows, expected.sequences[:, 1:].tolist(), strict=True):
                assert tokens == row[: len(tokens)] and set(row[len(tokens) :]) <= {0, 2}, "then only padding"
            counts = np.array([len(tokens) for tokens in rows])
            scores = torch.from_numpy(scores.flatten() / counts**length_penalty)
            torch.testing.assert_close(scores.float(), expected.sequences_scores, atol=1e-5, rtol=1e-5)
            lengths |= set(counts)
    assert len(lengths) > 3, "captions of many lengths were compared"


@torch.no_grad()
def test_greedy_search_is_that_of_transformers(pixel_values):
    lengths = set()
    for bias, suppressed in ((-1.0, []), (1.0, []), (1.0, [3, 17, 21]), (3.5, [])):
        model = model_with_end(bias)
        prompt, options = np.ones((5, 1), np.int64), {"num_beams": 1, "suppress_tokens": suppressed}
        found, _ = beam_search(decoding_step(model, pixel_values), prompt, [2], 9, **options)
        expected = model.generate(pixel_values, max_new_tokens=9, suppress_tokens=suppressed or None)[:, 1:].tolist()
        for (tokens,), row in zip(found, expected):
            assert tokens == row[: len(tokens)] and not any(row[len(tokens) :])
            lengths.add(len(tokens))
    assert len(lengths) > 1, "captions of several lengths were compared"


@pytest.mark.parametrize("size", [(24, 24), (37, 29), (29, 37), (640, 481), (25, 99), (7, 5), (1, 1)])
def test_pixels_are_the_image_processors_to_the_last_bit(size):
    processor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 22})
    picture = draw_picture(5, size)
    expected = processor(picture, return_tensors="np").pixel_values
    assert np.array_equal(ImagePreprocessor(processor.to_dict())([picture]), expected)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"do_normalize": False}, "do_normalize True, got False"),
        ({"image_processor_type": "ViTImageProcessor"}, "expected CLIPImageProcessor, got ViT"),
        ({"size": {"height": 24, "width": 24}}, "expected a shortest_edge"),
        ({"crop_size": {"height": 30, "width": 30}}, "no shorter than the crop 30x30"),
        ({"do_pad": True}, "expected do_pad False, got True"),
        ({"do_sharpen": True}, "do_sharpen=True isn't supported"),
    ],
)
def test_preprocessing_that_would_differ_is_refused(repository, change, words):
    config = json.loads((repository / "preprocessor_config.json").read_text())
    with pytest.raises(ValueError, match=words):
        ImagePreprocessor({**config, **change})


def test_the_captioner_needs_neither_pytorch_nor_transformers(exported, captioner, tmp_path):
    """From a rotated JPEG to its caption, in a process that can import neither."""
    exif = Image.Exif()
    exif[0x0112] = 6
    draw_picture(3, (90, 60)).save(tmp_path / "photo.jpg", exif=exif)
    code = """
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torch", "transformers"):
                    raise ImportError(f"{name} is blocked")

        sys.meta_path.insert(0, Blocker())
        from tinycap.deploy.onnx_captioner import OnnxCaptioner

        captioner = OnnxCaptioner.from_pretrained(sys.argv[1])
        print(captioner(sys.argv[2], num_beams=2)[0][0].text)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(exported), str(tmp_path / "photo.jpg")]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == captioner(tmp_path / "photo.jpg", num_beams=2)[0][0].text


@pytest.mark.parametrize("module", ["deploy.onnx_captioner", "deploy.captioners", "deploy.export"])
def test_onnxruntime_is_imported_with_its_telemetry_off(tmp_path, module):
    """Otherwise it connects to its vendor and writes a device id to the home folder."""
    code = """
        import importlib, os, sys

        class Witness:
            def find_spec(self, name, path=None, target=None):
                if name == "onnxruntime":
                    assert os.environ.get("ORT_DISABLE_TELEMETRY") == "1"

        sys.meta_path.insert(0, Witness())
        importlib.import_module(sys.argv[1])
        import onnxruntime

        onnxruntime.SessionOptions()
    """
    variables = {"ORT_DISABLE_TELEMETRY": None, "CI": None, "HOME": str(tmp_path)}
    run_fresh(textwrap.dedent(code), f"tinycap.{module}", folder=tmp_path, path=(REPOSITORY,), **variables)
    assert not [path for path in tmp_path.rglob("*") if "onnx" in path.name.lower() or "device" in path.name.lower()]


def test_int8_graphs_are_close_and_hold_small_weights(exported, captioner, pictures):
    import onnx

    quantized = OnnxCaptioner.from_pretrained(exported, quantized=True)
    pixel_values = captioner.preprocessor(pictures)
    cosines = (captioner.encode(pixel_values)[1] * quantized.encode(pixel_values)[1]).sum(axis=-1)
    assert (cosines > 0.99).all() and (cosines < 1 - 1e-7).any(), "quantised, but not lost"
    assert all(row[0].text is not None for row in quantized(pictures))
    states = captioner.encode(pixel_values)[0]
    logits, close = (
        each.decoding_step(states)(np.full((len(states), 1), captioner.start_token_id), None)
        for each in (captioner, quantized)
    )
    assert np.abs(logits - close).max() < 0.05 * np.abs(logits).max() and not np.array_equal(logits, close)
    encoder, decoder = (
        onnx.load(exported / "onnx" / f"{name}_quantized.onnx") for name in ("encoder_model", "decoder_model_merged")
    )
    assert "DynamicQuantizeLinear" in {node.op_type for node in encoder.graph.node}
    assert "MatMulNBits" in {node.op_type for node in decoder.graph.node}
    tables = [tensor for tensor in decoder.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16]
    assert len(tables) == 1


def test_captions_depend_on_no_other_image_of_their_batch(exported, captioner):
    """In int8 an activation has one scale for a batch."""
    pictures = [draw_picture(seed, (24 + seed, 31)) for seed in range(9)]
    for found in (captioner, OnnxCaptioner.from_pretrained(exported, quantized=True, num_threads=1)):
        pixels = found.preprocessor(pictures)
        alone = [np.concatenate(parts) for parts in zip(*(found.encode(each[None]) for each in pixels))]
        for together, expected in zip(found.encode(pixels), alone):
            np.testing.assert_allclose(together, expected, atol=1e-5, rtol=0)
        for beams in (1, 3):
            rows = [found(pictures, num_beams=beams, batch_size=size) for size in (1, 3, 8)]
            for captions in zip(*rows):
                assert len({caption.text for (caption,) in captions}) == 1
                assert np.ptp([caption.score for (caption,) in captions]) < 1e-4


def test_the_graphs_name_no_source_files(exported):
    import onnx

    for path in (exported / "onnx").glob("*.onnx"):
        assert b"modeling_tinycap" not in path.read_bytes()
        onnx.checker.check_model(str(path))


def test_embeddings_are_the_models(captioner, model, pictures):
    pixel_values = torch.from_numpy(captioner.preprocessor(pictures))
    with torch.no_grad():
        expected = model.get_image_features(pixel_values).pooler_output
    torch.testing.assert_close(torch.from_numpy(captioner.get_image_features(pictures)), expected, atol=1e-5, rtol=1e-5)


def test_among_several_images_a_bad_one_leaves_the_others_their_captions(captioner, pictures):
    images = [pictures[0], b"no image", png_bytes(pictures[1]), 7]
    rows = captioner(images, batch_size=3)
    assert [row[0].text for row in rows] == [captioner(pictures[0])[0][0].text, None] + [
        captioner(pictures[1])[0][0].text,
        None,
    ]
    assert "not an image file" in rows[1][0].error and "got int" in rows[3][0].error
    with pytest.raises(ValueError, match="not an image file"):
        captioner([b"no image"])
    assert captioner([]) == []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_beams": 0}, "num_beams: expected an integer from 1 to 128, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer of at least 1, got 0"),
        ({"num_return_sequences": 2}, r"at most 1 \(num_beams\), got 2"),
        ({"prompt": "dog " * 30}, "expected fewer than 19 tokens"),
    ],
)
def test_arguments_that_make_no_sense_are_errors(captioner, pictures, options, words):
    with pytest.raises(ValueError, match=words):
        captioner(pictures, **options)


def test_captions_end_where_the_position_table_does(captioner, model, pictures):
    pixel_values = torch.from_numpy(captioner.preprocessor(pictures))
    tokens = model.generate(pixel_values, max_new_tokens=500)
    assert max(row[0].num_tokens for row in captioner(pictures, max_new_tokens=500)) == tokens.shape[1] - 1


def test_the_generation_config_decides_when_the_caller_says_nothing(exported, captioner, pictures, tmp_path):
    shutil.copytree(exported, tmp_path / "own")
    path = tmp_path / "own" / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_beams": 3, "max_new_tokens": 5, "length_penalty": 0.0}))
    own = OnnxCaptioner.from_pretrained(tmp_path / "own")
    assert own(pictures) == captioner(pictures, num_beams=3, max_new_tokens=5, length_penalty=0.0)
    path.write_text(json.dumps({**config, "no_repeat_ngram_size": 2}))
    with pytest.raises(ValueError, match="no_repeat_ngram_size=2 isn't supported"):
        OnnxCaptioner.from_pretrained(tmp_path / "own")


def test_what_isnt_an_export_is_an_error_that_says_what_is_missing(repository, exported, tmp_path):
    with pytest.raises(ValueError, match="without encoder_model.onnx"):
        OnnxCaptioner.from_pretrained(repository)
    shutil.copytree(exported, tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="without tokenizer.json"):
        OnnxCaptioner.from_pretrained(tmp_path / "broken")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}))
    with pytest.raises(ValueError, match="expected model_type tinycap, got blip"):
        export_onnx(tmp_path, tmp_path / "out")
