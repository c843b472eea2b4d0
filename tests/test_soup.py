"""Model soups: the mean of several models' weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training import soup


def change(folder, file: str, **fields) -> None:
    """Changes fields of a JSON file in a model's folder; `part__field` for a nested one."""
    content = json.loads((folder / file).read_text())
    for name, value in fields.items():
        part, _, field = name.rpartition("__")
        (content[part] if part else content)[field] = value
    (folder / file).write_text(json.dumps(content))


@pytest.fixture
def models(made_models, tmp_path):
    """Folders of three models: the repository's and two with other weights."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in made_models]


@pytest.fixture(scope="module")
def made_models(repository, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    folders = [root / name for name in ("a", "b", "c")]
    for index, folder in enumerate(folders):
        shutil.copytree(repository, folder)
        model = TinyCapForConditionalGeneration.from_pretrained(folder)
        torch.manual_seed(index)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(index * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folders


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_every_weight_of_a_soup_is_the_mean_of_the_models(models, tmp_path):
    soup.main(["--models", *map(str, models), "--output_dir", str(tmp_path / "soup")])
    found, parts = weights(tmp_path / "soup"), [weights(folder) for folder in models]
    assert found.keys() == parts[0].keys()
    for name, value in found.items():
        torch.testing.assert_close(value, torch.stack([part[name] for part in parts]).mean(dim=0))
    assert not torch.equal(parts[0]["decoder.embed_tokens.weight"], parts[1]["decoder.embed_tokens.weight"])
    assert json.loads((tmp_path / "soup" / soup.SOUP_FILE).read_text())["models"] == list(map(str, models))


def test_a_model_counts_as_much_in_a_soup_as_its_weight_says(models, tmp_path):
    flags = ["--models", *map(str, models), "--output_dir", str(tmp_path / "soup"), "--weights", "1", "2", "0.5"]
    soup.main(flags)
    found, (a, b, c) = weights(tmp_path / "soup"), [weights(folder) for folder in models]
    for name, value in found.items():
        torch.testing.assert_close(value, (a[name] + 2 * b[name] + 0.5 * c[name]) / 3.5)
    assert json.loads((tmp_path / "soup" / soup.SOUP_FILE).read_text())["weights"] == [1.0, 2.0, 0.5]


def test_a_soup_has_no_text_encoder_and_says_so(models, text_repository, tmp_path, caplog):
    soup.main(["--models", str(text_repository), str(models[0]), "--output_dir", str(tmp_path / "soup")])
    assert f"{text_repository}: the text encoder is left out" in caplog.text
    found, part, searchable = map(weights, (tmp_path / "soup", models[0], text_repository))
    assert found.keys() == part.keys() < searchable.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, (part[name] + searchable[name]) / 2)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "soup", models[0])]
    assert configs[0]["auto_map"] == configs[1]["auto_map"], "nothing offers what needs texts"


@pytest.mark.parametrize("given", (["1"], ["1", "-2"], ["1", "inf"], ["1", "0"]))
def test_weights_that_do_not_fit_the_models_are_an_error(given, capsys):
    with pytest.raises(SystemExit):
        soup.parse_args(["--models", "a", "b", "--output_dir", "c", "--weights", *given])
    assert "--weights: expected a positive number for each of 2 models, got [1.0" in capsys.readouterr().err


def test_a_soup_is_a_repository_like_its_first_model(models, tmp_path):
    change(models[0], "generation_config.json", num_beams=3, length_penalty=0.7)
    soup.main(["--models", *map(str, models), "--output_dir", str(tmp_path / "soup")])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "soup", trust_remote_code=True)
    assert (model.generation_config.num_beams, model.generation_config.length_penalty) == (3, 0.7)
    for kind in (AutoTokenizer, AutoImageProcessor):
        ours, first = (
            kind.from_pretrained(folder).to_dict()
            if kind is AutoImageProcessor
            else kind.from_pretrained(folder).get_vocab()
            for folder in (tmp_path / "soup", models[0])
        )
        assert ours == first


def test_models_may_differ_in_how_they_were_trained(models, tmp_path):
    change(models[1], "config.json", label_smoothing=0.3, vision_config__patch_dropout=0.6)
    soup.main(["--models", *map(str, models), "--output_dir", str(tmp_path / "soup")])
    assert (tmp_path / "soup" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"memory_scale": 2.5}, r"b: expected the memory_scale of \S+a, None, got 2.5"),
        ({"vision_config__num_attention_heads": 2}, "vision_config.num_attention_heads of .*, 3, got 2"),
        ({"text_config__layer_norm_eps": 1e-3}, "text_config.layer_norm_eps"),
    ],
)
def test_models_that_compute_otherwise_are_an_error(models, tmp_path, fields, words):
    change(models[1], "config.json", **fields)
    with pytest.raises(ValueError, match=words):
        soup.main(["--models", *map(str, models), "--output_dir", str(tmp_path / "soup")])
    assert not (tmp_path / "soup").exists()


def test_models_with_other_words_or_colours_are_an_error(models, tmp_path):
    flags = ["--models", *map(str, models), "--output_dir", str(tmp_path / "soup")]
    change(models[2], "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="c: expected the image processor of"):
        soup.main(flags)
    text = (models[1] / "tokenizer.json").read_text()
    content = json.loads(text)
    vocab = content["model"]["vocab"]
    first, second = sorted(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (models[1] / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="b: expected the tokenizer of"):
        soup.main(flags)


def test_what_is_no_model_is_an_error_that_names_it(models, tmp_path):
    (models[1] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"--models {models[1]}: .*model.safetensors"):
        soup.main(["--models", *map(str, models), "--output_dir", str(tmp_path / "soup")])


def test_a_soup_writes_over_nothing_unasked(models, tmp_path, capsys):
    flags = ["--models", *map(str, models)]
    (tmp_path / "soup").mkdir()
    (tmp_path / "soup" / "metrics.jsonl").write_text("{}")
    (tmp_path / "soup" / "train_args.json").write_text('{"output_dir": "soup"}')
    with pytest.raises(ValueError, match="pass --overwrite_output_dir to clear it$"):
        soup.main([*flags, "--output_dir", str(tmp_path / "soup")])
    soup.main([*flags, "--output_dir", str(tmp_path / "soup"), "--overwrite_output_dir"])
    assert not (tmp_path / "soup" / "metrics.jsonl").exists(), "another run's"
    for wrong, words in (
        ([*flags, "--output_dir", f"{models[0]}/"], "other than the models'"),
        (["--models", str(models[0]), "--output_dir", str(tmp_path / "other")], "two or more models, got 1"),
    ):
        with pytest.raises(SystemExit):
            soup.main(wrong)
        assert words in capsys.readouterr().err
