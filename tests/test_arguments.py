from pathlib import Path

import pytest

from tinycap import train_distill, train_teacher
from tinycap.training.arguments import flags_of
from tinycap.training.flags import RULES


ROOT = Path(train_distill.__file__).resolve().parent


@pytest.fixture
def config_file(tmp_path):
    """Writes a configuration file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def refused(argv: list[str], capsys, script=train_distill) -> str:
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_file_sets_defaults_and_flags_override_them(config_file):
    path = config_file("learning_rate: 3e-4\nmixed_precision: no\nhorizontal_flip: false\nnum_beams: 2\nseed: 5\n")
    args = train_distill.parse_args(["--num_beams", "4", "--config_file", path, "--horizontal_flip"])
    assert (args.learning_rate, args.mixed_precision, args.seed) == (3e-4, "no", 5)
    assert args.num_beams == 4 and args.horizontal_flip is True
    assert train_distill.parse_args(["--config_file", path]).horizontal_flip is False


def test_a_file_may_list_the_values_of_a_flag_that_takes_several(config_file, capsys):
    path = config_file("image_model_name_or_path: [a, b]\ntext_model_name_or_path: t\n")
    args = train_teacher.parse_args(["--config_file", path])
    assert args.image_model_name_or_path == ["a", "b"] and args.text_model_name_or_path == "t"
    assert "key 'seed': expected one value" in refused(["--config_file", config_file("seed: [1, 2]")], capsys)


def test_scene_defaults_hold_only_where_nothing_names_a_dataset(config_file):
    text = "seed: 5\ndistill_weight: 0\n"
    assert train_distill.parse_args(["--config_file", config_file(text)]).vocab_size == 512
    path = config_file(f"{text}dataset_name: my_photos\n")
    assert train_distill.parse_args(["--config_file", path]).vocab_size == 8192


def test_null_leaves_a_flag_at_its_default(config_file):
    args = train_distill.parse_args(["--config_file", config_file("max_grad_norm: null\nmemory:\n")])
    assert args.max_grad_norm == 1.0 and args.memory is None


@pytest.mark.parametrize("script", [train_distill, train_teacher])
@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rat: 3e-4", ["unknown key 'learning_rat'"]),
        ("--seed: 3", ["unknown key '--seed'"]),
        ("no-horizontal_flip: true", ["unknown key 'no-horizontal_flip'"]),
        ("config_file: other.yaml", ["unknown key 'config_file'"]),
        ("learning_rate: quick", ["--learning_rate", "'quick'"]),
        ("lr_scheduler_type: sine", ["--lr_scheduler_type", "'sine'"]),
        ("horizontal_flip: 3", ["--horizontal_flip", "'3'"]),
        ("seed: true", ["--seed", "'true'"]),
        ("seed: false", ["--seed", "'false'"]),
        ("seed: [1, 2]", ["'seed'", "one value", "list"]),
        ("- seed", ["key: value", "list"]),
        ("seed: {", ["readable YAML"]),
    ],
)
def test_a_bad_line_is_an_error_that_names_the_file_and_the_key(text, words, script, config_file, capsys):
    path = config_file(text)
    message = refused(["--config_file", path], capsys, script)
    assert all(word in message for word in [path, *words]), message


def test_a_file_that_is_not_there_is_an_error_that_names_it(tmp_path, capsys):
    assert "none.yaml" in refused(["--config_file", str(tmp_path / "none.yaml")], capsys)


def test_a_contradiction_between_file_and_flags_is_found(config_file, capsys):
    message = refused(["--config_file", config_file("model_name_or_path: m"), "--tokenizer_name", "t"], capsys)
    assert "--tokenizer_name: contradicts --model_name_or_path" in message


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--freeze_vision_model", "--distill_weight", "0"], "--freeze_vision_model: needs --model_name_or_path"),
        (
            ["--model_name_or_path", "m", "--freeze_vision_model"],
            "--freeze_vision_model: needs --distill_weight 0",
        ),
        (
            ["--model_name_or_path", "m", "--freeze_vision_model", "--distill_weight", "0", "--patch_dropout", "0.5"],
            "--patch_dropout: contradicts --freeze_vision_model",
        ),
        (["--memory_noise", "-1"], "--memory_noise: expected at least 0, got -1"),
    ],
)
def test_a_decoder_alone_needs_a_student_and_no_teacher(flags, words, capsys):
    assert words in refused(flags, capsys)


def test_the_reference_recipe_is_what_was_published():
    flags = ["--dataset_name", "flickr8k", "--teacher_name_or_path", "openai/clip-vit-base-patch32"]
    args = train_distill.parse_args(["--config_file", str(ROOT / "configs" / "reference.yaml"), *flags])
    assert (args.learning_rate, args.weight_decay, args.dropout, args.label_smoothing) == (3e-4, 0.01, 0.1, 0.1)
    assert args.per_device_train_batch_size * args.captions_per_image * args.gradient_accumulation_steps == 128
    assert (args.crop_scale, args.horizontal_flip, args.color_jitter, args.patch_dropout) == (1, False, 0, 0)
    assert args.num_beams == 1 and args.teacher_feature == "pooled" and args.memory is None


def test_every_condition_in_the_table_names_a_flag():
    names = flags_of("distill").keys() | flags_of("teacher").keys()
    for subject, relation, condition, _ in RULES:
        assert {subject.partition(" ")[0], condition.partition(" ")[0]} <= names, (subject, condition)
        assert relation in ("needs", "contradicts")


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_a_number_outside_its_range_is_an_error_that_names_both(value, capsys):
    assert f"--learning_rate: expected a positive number, got {float(value)}" in refused(
        ["--learning_rate", value], capsys
    )


def test_help_groups_the_flags_by_what_a_person_wants_to_do(capsys):
    with pytest.raises(SystemExit):
        train_distill.parse_args(["--help"])
    text = capsys.readouterr().out
    for title in ("train on your own images:", "learn from a teacher:", "save, resume and share:"):
        assert title in text
