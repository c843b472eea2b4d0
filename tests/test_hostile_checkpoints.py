"""Untrusted checkpoints: an error that names the file, before memory is allocated, and no pickle is loaded."""

import json
import math
import pickle
import re
import shutil
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from transformers import AutoModel, AutoModelForImageTextToText, pipeline

from tinycap import train_distill
from tinycap.checks_tinycap import PIXEL_SETTINGS, check_pixels
from tinycap.configuration_tinycap import TinyCapConfig, TinyCapVisionConfig
from tinycap.deploy.captioners import CaptionOptions
from tinycap.deploy.onnx_captioner import OnnxCaptioner
from tinycap.evaluation.captioning import load_captioner
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration, TinyCapVisionModel
from tinycap.training.repository import load_repository
from tinycap.training.tokenizer import load_tokenizer, train_tokenizer


WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(repository, tmp_path):
    """A copy of the tiny repository, to be corrupted."""
    return Path(shutil.copytree(repository, tmp_path / "copy"))


def from_auto_class(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)


def from_pipeline(folder):
    return pipeline("image-to-text", model=str(folder), trust_remote_code=True)


def from_trainer(folder):
    output_dir = folder.parent / "trained"
    train_distill.main(
        ["--model_name_or_path", str(folder), "--output_dir", str(output_dir), "--max_train_samples", "8"]
        + ["--max_eval_samples", "2", "--max_train_steps", "1", "--distill_weight", "0", "--image_size", "24"]
        + ["--max_caption_length", "12", "--dataloader_num_workers", "0", "--per_device_train_batch_size", "4"]
    )


DOORS = pytest.mark.parametrize("door", [from_auto_class, from_pipeline, from_trainer])


def each_case(names: str, cases: list):
    """Parametrizes by `door` and `names`: all cases for the auto class, whose loader all share, one for each other."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    doors = [(from_auto_class, *row) for row in rows] + [(door, *rows[0]) for door in (from_pipeline, from_trainer)]
    return pytest.mark.parametrize(
        f"door, {names}", doors, ids=lambda value: "/".join(value) if isinstance(value, dict) else None
    )


def change_config(folder, part=None, **values):
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(values)
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, **values):
    """Replaces tensors; `None` removes one. Dots are written as two underscores."""
    weights = load_file(folder / WEIGHTS)
    for name, value in values.items():
        name = name.replace("__", ".")
        assert name in weights
        weights.pop(name) if value is None else weights.update({name: value})
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def to_pickle(folder, name="pytorch_model.bin"):
    torch.save(load_file(folder / WEIGHTS), folder / name)
    (folder / WEIGHTS).unlink()


# --- pickles ----------------------------------------------------------------------------------------------------------


@each_case("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_and_the_error_says_how_to_convert_it(copy, door, name, monkeypatch):
    to_pickle(copy, name)
    for module in (pickle, torch):
        monkeypatch.setattr(module, "load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    with pytest.raises(ValueError) as error:
        door(copy)
    assert all(word in str(error.value) for word in (str(copy), name, "safetensors.torch.save_file"))


def test_what_the_error_says_converts_it(copy, pixel_values, monkeypatch):
    expected = from_auto_class(copy)(pixel_values).logits
    # Like files of older libraries: with the tied weight under both names.
    weights = dict(load_file(copy / WEIGHTS))
    weights["lm_head.weight"] = weights["decoder.embed_tokens.weight"]
    torch.save(weights, copy / "pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    with pytest.raises(ValueError) as error:
        from_auto_class(copy)
    code = re.search(r"weights = torch.load.*'pt'}\)", str(error.value))[0]
    monkeypatch.chdir(copy)
    exec(code, {"torch": torch, "safetensors": safetensors})
    assert torch.equal(from_auto_class(copy)(pixel_values).logits, expected)


def test_asking_for_anything_but_safetensors_is_an_error(copy):
    with pytest.raises(ValueError, match="use_safetensors"):
        AutoModel.from_pretrained(copy, trust_remote_code=True, use_safetensors=False)


def test_a_pickle_beside_the_weights_is_left_alone(copy, pixel_values):
    expected = from_auto_class(copy)(pixel_values).logits
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.")
    assert torch.equal(from_auto_class(copy)(pixel_values).logits, expected)


def write_index(folder, shard, weights=None, **content):
    """Replaces the weights by an index, and by that one file of them where `weights` writes it."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if weights is not None:
        weights(tensors, folder / shard)
    content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, shard), **content}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))


def save_shard(tensors, path):
    save_file(tensors, path, metadata={"format": "pt"})


def save_integers(tensors, path):
    save_shard({name: value.to(torch.int8) for name, value in tensors.items()}, path)


@each_case(
    "shard, weights, named",
    [
        ("w.bin", torch.save, "w.bin"),
        ("../outside.safetensors", save_shard, "outside.safetensors"),
        ("missing.safetensors", None, "missing.safetensors"),
        ("a.safetensors", torch.save, "a.safetensors: expected safetensors"),
        ("a.safetensors", save_integers, "a.safetensors: .*F64, F32, F16, BF16, got I8"),
    ],
)
def test_an_index_names_safetensors_beside_it_and_nothing_else(copy, door, shard, weights, named, monkeypatch):
    write_index(copy, shard, weights)
    for module in (pickle, torch):
        monkeypatch.setattr(module, "load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    with pytest.raises(ValueError, match=named):
        door(copy)


@pytest.mark.parametrize("content", [{"weight_map": [1]}, {"metadata": 3}, {"weight_map": {"a": 5}}])
def test_an_index_of_another_kind_is_an_error_that_names_it(copy, content):
    write_index(copy, "a.safetensors", save_shard, **content)
    with pytest.raises(ValueError, match=f"{WEIGHTS}.index.json"):
        from_auto_class(copy)


def test_shards_load_like_one_file_and_hold_each_tensor_once(copy, pixel_values):
    expected = from_auto_class(copy)(pixel_values).logits
    tensors = load_file(copy / WEIGHTS)
    write_index(copy, "a.safetensors", save_shard)
    assert torch.equal(from_auto_class(copy)(pixel_values).logits, expected)
    save_shard(dict(list(tensors.items())[:1]), copy / "b.safetensors")
    index = json.loads((copy / f"{WEIGHTS}.index.json").read_text())
    index["weight_map"]["again"] = "b.safetensors"
    (copy / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="b.safetensors: .*expected it once"):
        from_auto_class(copy)


@pytest.mark.parametrize("name", ["adapter_config.json", "shard-00000-model-00001-of-00001.safetensors"])
def test_other_weights_beside_the_models_are_refused(copy, name):
    (copy / name).write_text("{}")
    with pytest.raises(ValueError, match=f"no other weights, got .*{name}"):
        from_auto_class(copy)


def test_weights_that_the_config_or_a_path_names_are_refused(copy):
    with pytest.raises(ValueError, match="expected a folder or a name on the Hub, got a file"):
        TinyCapForConditionalGeneration.from_pretrained(copy / WEIGHTS, config=tiny_config())
    change_config(copy, transformers_weights="other.safetensors")
    with pytest.raises(ValueError, match="config.json: transformers_weights"):
        from_auto_class(copy)


# --- weights ----------------------------------------------------------------------------------------------------------


def cut_weights(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def lie_about_the_header(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**40) + data[8:])


def lie_about_a_shape(folder):
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["decoder.embed_tokens.weight"]["shape"] = [2**31, 2**20]
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def write_no_header(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 40) + b"[" * 40 + bytes(64))


def write_a_page(folder):
    (folder / WEIGHTS).write_text("<!DOCTYPE html><html><body>404: no such file</body></html>")


@each_case("spoil", [cut_weights, lie_about_the_header, lie_about_a_shape, write_no_header, write_a_page])
def test_a_file_that_is_not_what_its_header_says_is_an_error_that_names_it(copy, door, spoil):
    before = (copy / WEIGHTS).read_bytes()
    spoil(copy)
    assert (copy / WEIGHTS).read_bytes() != before
    with pytest.raises(ValueError) as error:
        door(copy)
    assert str(copy / WEIGHTS) in str(error.value)


@each_case("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_an_error_that_names_the_tensor(copy, door, value):
    spoilt = load_file(copy / WEIGHTS)["decoder.memory_projection.weight"].clone()
    spoilt[3, 2] = value
    change_weights(copy, decoder__memory_projection__weight=spoilt)
    with pytest.raises(ValueError, match="decoder.memory_projection.weight.*finite"):
        door(copy)


@each_case("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_no_floats_are_an_error_that_names_the_tensor(copy, door, dtype):
    weight = load_file(copy / WEIGHTS)["decoder.memory_projection.weight"]
    change_weights(copy, decoder__memory_projection__weight=weight.to(dtype))
    with pytest.raises(ValueError, match=f"{WEIGHTS}: decoder.memory_projection.weight: expected weights of type"):
        door(copy)


@pytest.mark.parametrize("method", [{"quant_method": "none"}, {}])
def test_an_unknown_quantisation_excuses_nothing(copy, method):
    save_integers(load_file(copy / WEIGHTS), copy / WEIGHTS)
    change_config(copy, quantization_config=method)
    with pytest.raises(ValueError, match="quant"):
        from_auto_class(copy)


@DOORS
def test_missing_weights_are_an_error_where_random_ones_would_caption(copy, door):
    change_weights(copy, decoder__memory_projection__weight=None)
    with pytest.raises(ValueError, match="decoder.memory_projection.weight"):
        door(copy)


def test_who_asks_for_the_report_gets_what_there_is(copy):
    change_weights(copy, decoder__memory_projection__weight=None)
    model, report = TinyCapForConditionalGeneration.from_pretrained(copy, output_loading_info=True)
    assert set(report["missing_keys"]) == {"decoder.memory_projection.weight"} and model is not None


def test_a_student_alone_still_begins_a_captioner(copy):
    student = from_auto_class(copy).vision_model
    student.save_pretrained(copy / "student")
    model = TinyCapForConditionalGeneration.from_pretrained(copy / "student", config=tiny_config())
    for name, value in student.state_dict().items():
        assert torch.equal(model.vision_model.state_dict()[name], value), name
    assert isinstance(TinyCapVisionModel.from_pretrained(copy), TinyCapVisionModel)


# --- configurations ---------------------------------------------------------------------------------------------------


@each_case(
    "part, values, named",
    [
        ("text_config", {"vocab_size": 2_000_000}, "decoder.embed_tokens.weight.*2000000"),
        ("text_config", {"vocab_size": 10**12}, "decoder.embed_tokens.weight.*1000000000000"),
        ("text_config", {"vocab_size": 10**30}, "expected a config of possible sizes"),
        ("text_config", {"num_hidden_layers": 3_000}, "decoder.layers.*3000"),
        ("text_config", {"num_hidden_layers": 1}, "decoder.layers.*expects 1 layers, got 3"),
        ("text_config", {"intermediate_size": 2_000_000}, "mlp.fc1.weight"),
        ("vision_config", {"image_size": 800_000}, "position_embeddings"),
        (
            "vision_config",
            {"image_size": 2**24, "patch_size": 1, "hidden_size": 2**24, "num_attention_heads": 1},
            "expected a config of possible sizes",
        ),
        ("vision_config", {"hidden_size": 1_200_000, "intermediate_size": 1_200_000}, "position_embeddings"),
        ("text_config", {"max_position_embeddings": 9_000_000}, "decoder.embed_positions.weight"),
        ("vision_config", {"image_size": 24_000}, "position_embeddings"),
        ("vision_config", {"hidden_size": 15}, "position_embeddings"),
        ("vision_config", {"projection_dim": 1_000_000}, "projection.weight"),
    ],
)
def test_a_config_that_contradicts_its_weights_allocates_no_memory(copy, door, part, values, named, monkeypatch):
    change_config(copy, part, **values)
    # All copies of the modeling file build their layers from these; on the meta device they take no memory.
    init = torch.nn.LayerNorm.__init__

    def on_meta(self, *args, **kwargs):
        init(self, *args, **kwargs)
        assert self.weight.is_meta, "memory was allocated"

    monkeypatch.setattr(torch.nn.LayerNorm, "__init__", on_meta)
    with pytest.raises(ValueError, match=named):
        door(copy)


@pytest.mark.parametrize(
    "part, values, named",
    [
        ("vision_config", {"hidden_size": "12"}, "hidden_size: expected a positive integer"),
        ("vision_config", {"layer_norm_eps": "0"}, "layer_norm_eps"),
        ("text_config", {"initializer_range": float("nan")}, "initializer_range"),
        (None, {"memory_scale": float("inf")}, "memory_scale"),
        (None, {"memory_scale": "5"}, "memory_scale"),
        (None, {"memory_scale": 1e30}, "memory_scale"),
        ("text_config", {"layer_norm_eps": 1e30}, "layer_norm_eps"),
        (None, {"dtype": "int8"}, "TinyCapConfig.dtype.*got 'int8'"),
        ("text_config", {"dtype": "float8_e4m3fn"}, "TinyCapTextConfig.dtype"),
        (None, {"distill_weight": -1.0}, "distill_weight"),
        (None, {"eos_token_id": 10**6}, "eos_token_id"),
        (None, {"eos_token_id": [1, -3]}, "eos_token_id"),
        (None, {"bos_token_id": "2"}, "bos_token_id"),
    ],
    ids=lambda value: "/".join(value) if isinstance(value, dict) else None,
)
def test_absurd_sizes_are_an_error_that_names_the_field(copy, part, values, named):
    change_config(copy, part, **values)
    with pytest.raises(ValueError, match=named):
        from_auto_class(copy)


def test_an_activation_that_is_not_known_is_an_error_that_names_the_field(copy):
    change_config(copy, "vision_config", hidden_act="system")
    with pytest.raises(ValueError, match="TinyCapVisionConfig.hidden_act: expected one of .*gelu.*got 'system'"):
        from_auto_class(copy)


def test_the_released_sizes_and_ten_times_them_are_not_absurd():
    TinyCapConfig()
    TinyCapVisionConfig(hidden_size=1_920, num_hidden_layers=60, num_attention_heads=30, intermediate_size=7_680)


# --- tokenizers and image processors ----------------------------------------------------------------------------------


def test_a_tokenizer_that_does_not_fit_is_an_error_that_names_both_sizes(copy, tokenizer):
    other = train_tokenizer([" ".join(f"word{i}" for i in range(200))] * 3, 500, 19)
    assert len(other) > len(tokenizer)
    other.save_pretrained(copy)
    for door in (from_pipeline, from_trainer):
        with pytest.raises(ValueError, match=rf"{len(tokenizer)}.*{len(other)}"):
            door(copy)


def test_a_tokenizer_with_other_special_tokens_is_an_error(copy, tokenizer):
    other = json.loads((copy / "tokenizer_config.json").read_text())
    other["eos_token"], other["bos_token"] = other["bos_token"], other["eos_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(other))
    for door in (from_pipeline, from_trainer):
        with pytest.raises(ValueError, match="tokenizer.*expected bos_token_id"):
            door(copy)


@pytest.mark.parametrize("content", ["", '{"version": "1.0", "model', '{"version": "1.0"}', "[]"])
def test_a_tokenizer_that_cannot_be_read_is_an_error_that_names_its_folder(copy, content):
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=str(copy)):
        load_tokenizer(str(copy))


def test_a_tokenizer_never_runs_the_checkpoints_code(copy):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    config["tokenizer_class"] = "Evil"
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    (copy / "tokenization_evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\nclass Evil: pass\n")
    try:
        load_tokenizer(str(copy))
    except ValueError as error:
        assert str(copy) in str(error)
    assert not (copy / "ran").exists()


def test_an_image_processor_that_would_ask_for_gigabytes_is_an_error(copy):
    config = json.loads((copy / "preprocessor_config.json").read_text())
    config["size"] = {"shortest_edge": 100_000}
    (copy / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="preprocessor_config.json: size.*100000"):
        from_pipeline(copy)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_cut_json_file_ends_training_with_an_error_that_names_it(copy, name):
    (copy / name).write_text((copy / name).read_text()[:40])
    with pytest.raises(ValueError, match="--model_name_or_path"):
        from_trainer(copy)


def change_json(folder, name, **values):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **values}))


PIXELS = [
    *({"image_std": [0, 1, 1]}, {"image_std": [math.nan] * 3}, {"image_std": [-0.2] * 3}, {"image_std": 1e-30}),
    *({"image_mean": [math.inf] * 3}, {"image_mean": [0.5, 0.5]}, {"image_mean": None}, {"image_mean": "abc"}),
    *({"rescale_factor": 0}, {"rescale_factor": math.inf}, {"rescale_factor": "1"}, {"resample": 99}),
    *({"crop_size": {"height": 12, "width": 12}}, {"size": {"shortest_edge": 3}}, {"size": {"shortest_edge": 10**6}}),
]


def name_of(values):
    return f"{values}"[1:40] if isinstance(values, dict) else None


@pytest.mark.parametrize("values", PIXELS, ids=name_of)
def test_an_image_processor_of_nonsense_is_an_error_that_names_the_field(copy, values):
    change_json(copy, "preprocessor_config.json", **values)
    # Both call the same check.
    for door in (from_pipeline, load_captioner) if values == PIXELS[0] else (load_captioner,):
        with pytest.raises(ValueError, match=f"preprocessor_config.json: {next(iter(values))}"):
            door(str(copy))


@pytest.mark.parametrize("values", [{"num_beams": "3"}, {"max_new_tokens": [9]}, {"num_beams": 10**6}], ids=name_of)
def test_generation_settings_of_nonsense_end_training_before_it_begins(copy, values):
    change_json(copy, "generation_config.json", **values)
    with pytest.raises(ValueError, match="--model_name_or_path"):
        from_trainer(copy)


def test_statistics_of_nonsense_end_training_before_it_begins(copy):
    change_json(copy, "preprocessor_config.json", image_std=[0, 1, 1])
    with pytest.raises(ValueError, match="preprocessor_config.json: image processor: image_std"):
        from_trainer(copy)


def test_padding_to_a_million_pixels_is_an_error():
    settings = {name: None for name in PIXEL_SETTINGS} | {"do_pad": True, "pad_size": {"height": 10**6, "width": 24}}
    with pytest.raises(ValueError, match="here: pad_size: expected an integer from 24 to 192, got 1000000"):
        check_pixels(settings, 24, 3, "here")


# --- generation settings ----------------------------------------------------------------------------------------------

SETTINGS = [
    *({"num_beams": 10**6}, {"num_beams": "3"}, {"num_beams": 0}, {"num_return_sequences": 10**6, "do_sample": True}),
    *({"max_new_tokens": "9"}, {"max_new_tokens": [9]}, {"max_new_tokens": math.nan}, {"length_penalty": math.nan}),
    *({"length_penalty": 1e6}, {"eos_token_id": 10**6}, {"eos_token_id": "x"}, {"decoder_start_token_id": -1}),
    *({"suppress_tokens": [10**6]}, {"do_sample": "yes"}, {"early_stopping": 5}, {"num_beam_groups": 10**6}),
]


@pytest.mark.parametrize("values", SETTINGS, ids=name_of)
def test_a_generation_config_of_nonsense_is_an_error_that_names_the_field(copy, values):
    change_json(copy, "generation_config.json", **values)
    with pytest.raises(ValueError, match=f"generation_config.json: {next(iter(values))}: expected"):
        from_auto_class(copy)


@pytest.mark.parametrize("name", ["generation_config.json", "preprocessor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[]", '{"a', "5"])
def test_a_small_file_that_is_no_json_object_is_an_error_that_names_it(copy, name, content):
    (copy / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: expected a JSON"):
        from_auto_class(copy)


def test_a_million_beams_are_refused_where_they_are_asked_for(copy, pixel_values):
    with pytest.raises(ValueError, match="num_beams: expected an integer from 1 to 128, got 1000000"):
        from_auto_class(copy).generate(pixel_values, num_beams=10**6, max_new_tokens=2)
    for options in ({"num_beams": 10**6}, {"num_captions": 10**6}):
        with pytest.raises(ValueError, match="expected an integer from 1 to 128, got 1000000"):
            CaptionOptions(str(copy), **options).resolve_num_beams(1)


def test_a_models_own_number_of_captions_is_not_the_command_lines(copy):
    change_json(copy, "generation_config.json", num_beams=3, num_return_sequences=3)
    assert CaptionOptions(str(copy)).generation() == {"num_return_sequences": 1}


@pytest.mark.parametrize("content", ["[]", "", '{"version": "1.0"}'])
def test_a_tokenizer_of_nonsense_is_one_error_everywhere(copy, content):
    (copy / "tokenizer.json").write_text(content)
    for door in (load_repository, load_captioner):
        with pytest.raises(ValueError, match=f"model {re.escape(str(copy))}: "):
            door(str(copy))


# --- ONNX folders -----------------------------------------------------------------------------------------------------


def change_graph(path, change):
    import onnx

    graph = onnx.load(path)
    change(graph.graph, max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data)))
    path.write_bytes(graph.SerializeToString())


def point_outside(graph, tensor):
    import onnx

    onnx.external_data_helper.set_external_data(tensor, "../../secret.dat", offset=0, length=len(tensor.raw_data))
    tensor.ClearField("raw_data")


def fill_with_nan(graph, tensor):
    import onnx

    values = onnx.numpy_helper.to_array(tensor).copy()
    values[...] = math.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


ENCODER, DECODER = "onnx/encoder_model.onnx", "onnx/decoder_model_merged.onnx"
ONNX_FAULTS = [
    (lambda folder: change_json(folder, "preprocessor_config.json", image_std=[0, 1, 1]), "image_std"),
    (lambda folder: change_json(folder, "preprocessor_config.json", size={"shortest_edge": 10**6}), "size"),
    (lambda folder: change_json(folder, "generation_config.json", num_beams=10**6), "num_beams"),
    (lambda folder: change_json(folder, "generation_config.json", suppress_tokens=[10**6]), "suppress_tokens"),
    (lambda folder: change_config(folder, "decoder", vocab_size=5000), "logits"),
    (lambda folder: change_config(folder, "decoder", decoder_attention_heads=1), "2 layers and 1 heads"),
    (lambda folder: change_config(folder, "decoder", max_position_embeddings="x"), "max_position_embeddings"),
    (lambda folder: change_config(folder, decoder=5), "config.json: decoder"),
    (lambda folder: (folder / "config.json").write_text("[]"), "config.json: expected a JSON object"),
    (lambda folder: (folder / "tokenizer.json").write_text("[]"), "tokenizer.json: expected a tokenizer"),
    (lambda folder: (folder / DECODER).write_text("hello"), "decoder_model_merged.onnx: expected an ONNX graph"),
    (lambda folder: shutil.copy(folder / ENCODER, folder / DECODER), "decoder_model_merged.onnx: expected input_ids"),
    (lambda folder: change_graph(folder / DECODER, point_outside), "external data"),
    (lambda folder: change_graph(folder / DECODER, fill_with_nan), "expected finite outputs"),
    (lambda folder: change_graph(folder / ENCODER, fill_with_nan), "expected finite outputs"),
]


@pytest.mark.slow
@pytest.mark.parametrize("spoil, named", ONNX_FAULTS, ids=[named for _, named in ONNX_FAULTS])
def test_an_onnx_folder_of_nonsense_is_an_error_that_names_the_file(exported, tmp_path, pictures, spoil, named):
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    spoil(folder)
    with pytest.raises(ValueError, match=named):
        OnnxCaptioner.from_pretrained(folder)(pictures[:2])
