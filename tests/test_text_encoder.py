"""Training of the text encoder: it learns a teacher's text embeddings; nothing else changes."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from safetensors.torch import load_file, save_file
from tiny import CAPTIONS
from transformers import AutoModel, BertConfig, BertModel, CLIPConfig, CLIPModel

from tinycap import train_distill
from tinycap.confidence_tinycap import CONFIDENCE_NAME
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training import student, text_encoder
from tinycap.training.repository import load_repository, weights_sha256
from tinycap.training.towers import TEXT_HEAD_FILE


SIZES = {"hidden_size": 18, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 22}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "texts.txt"
    path.write_text("\n".join(CAPTIONS))
    return str(path)


def clip(folder, tokenizer, vision_width: int, projection_dim: int) -> str:
    """A folder with a tiny CLIP of both towers and the repository's tokenizer."""
    torch.manual_seed(2)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = {**SIZES, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 40}
    vision = {**SIZES, "hidden_size": vision_width, "num_attention_heads": 2, "image_size": 24, "patch_size": 8}
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection_dim)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, tokenizer) -> str:
    return clip(tmp_path_factory.mktemp("clip"), tokenizer, 20, 14)


def run(repository, teacher, corpus, out, *more) -> dict:
    sources = ["--model_name_or_path", str(repository), "--teacher_name_or_path", str(teacher)]
    small = ["--text_file", corpus, "--per_device_train_batch_size", "8", "--num_train_epochs", "1"]
    return text_encoder.main([*sources, *small, "--output_dir", str(out), *more])


@pytest.fixture(scope="module")
def trained(repository, clip_folder, corpus, tmp_path_factory):
    """A captioner with a text encoder, and its metrics."""
    out = tmp_path_factory.mktemp("trained") / "model"
    flags = ["--num_train_epochs", "40", "--learning_rate", "1e-2", "--spans_per_caption", "9"]
    return out, run(repository, clip_folder, corpus, out, *flags)


@pytest.mark.slow
def test_held_out_texts_come_near_the_teachers_embeddings(trained, repository, clip_folder, corpus, tmp_path):
    fresh = run(repository, clip_folder, corpus, tmp_path / "fresh", "--learning_rate", "1e-9")
    assert trained[1]["text_cosine_distance"] < 0.3 * fresh["text_cosine_distance"]


@pytest.mark.slow
def test_captions_and_image_embeddings_stay_as_they_were(trained, repository, pixel_values):
    before, after = (AutoModel.from_pretrained(each, trust_remote_code=True) for each in (repository, trained[0]))
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
    assert before.generation_config.to_dict() == after.generation_config.to_dict()
    for name in ("tokenizer.json", "preprocessor_config.json"):
        assert (repository / name).read_text() == (trained[0] / name).read_text(), name
    assert "truncation_side" not in (trained[0] / "tokenizer_config.json").read_text()
    assert torch.equal(before.generate(pixel_values), after.generate(pixel_values))


@pytest.mark.slow
def test_the_captions_calibration_stays_with_the_digest_of_the_new_weights(repository, clip_folder, corpus, tmp_path):
    before = shutil.copytree(repository, tmp_path / "before")
    calibration = {"num_beams": 1, "intercept": 0.5, "coefficients": {"mean_log_prob": 1.0, "num_tokens": 0.1}}
    flags = ["--num_train_epochs", "1"]
    for digest in (weights_sha256(before), "other weights'"):
        (before / CONFIDENCE_NAME).write_text(json.dumps({"calibrations": [calibration], "weights_sha256": digest}))
        run(before, clip_folder, corpus, tmp_path / digest, *flags)
    assert not (tmp_path / digest / CONFIDENCE_NAME).exists()
    after = tmp_path / weights_sha256(before)
    stored = json.loads((after / CONFIDENCE_NAME).read_text())
    assert stored == {"calibrations": [calibration], "weights_sha256": weights_sha256(after)}


def test_a_captioner_with_a_text_encoder_continues_from_it(trained, clip_folder, corpus, tmp_path):
    flags = ["--learning_rate", "1e-9", "--spans_per_caption", "9"]
    again = run(trained[0], clip_folder, corpus, tmp_path / "again", *flags)
    assert again["text_cosine_distance"] == pytest.approx(trained[1]["text_cosine_distance"], abs=1e-4)
    with pytest.raises(ValueError, match="its text encoder's num_hidden_layers: expected 1, got 2"):
        run(trained[0], clip_folder, corpus, tmp_path / "other", "--num_hidden_layers", "1")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(repository, clip_folder, corpus, tmp_path):
    models = []
    for name in ("first", "second"):
        run(repository, clip_folder, corpus, tmp_path / name)
        models.append(TinyCapForConditionalGeneration.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.slow
def test_two_processes_train_the_same_text_encoder_as_one(repository, clip_folder, corpus, photos, tmp_path):
    def flags(name: str, batch_size: int) -> list[str]:
        sources = ["--model_name_or_path", str(repository), "--teacher_name_or_path", clip_folder]
        sizes = ["--text_file", corpus, "--spans_per_caption", "5", "--per_device_train_batch_size", str(batch_size)]
        sizes += ["--dataset_name", photos, "--contrastive_weight", "0.3"]
        return [*sources, *sizes, "--num_train_epochs", "6", "--output_dir", str(tmp_path / name)]

    text_encoder.main(flags("one", 10))
    Ranks(flags("two", 5), tmp_path / "log", script="training.text_encoder").finish()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)


def test_further_training_leaves_a_text_encoder_out(text_repository, photos, tmp_path):
    """Its images and tokens would no longer be those that it was trained for."""
    flags = ["--model_name_or_path", str(text_repository), "--dataset_name", photos, "--distill_weight", "0"]
    args = train_distill.parse_args([*flags, "--output_dir", str(tmp_path)])
    model = student.build_model(args, student.build_config(args))
    assert model.config.text_encoder_config is None and not hasattr(model, "text_model")
    given = load_file(text_repository / "model.safetensors")
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items() if name in given)


@pytest.mark.slow
def test_a_pooled_clips_projection_of_images_is_carried_along(repository, tokenizer, corpus, tmp_path):
    teacher = clip(tmp_path / "clip", tokenizer, 14, 10)
    run(repository, teacher, corpus, tmp_path / "out")
    model = TinyCapForConditionalGeneration.from_pretrained(tmp_path / "out")
    pooled = F.normalize(torch.randn(3, 14), dim=1)
    expected = F.normalize(CLIPModel.from_pretrained(teacher).visual_projection(pooled), dim=1)
    assert torch.allclose(model.project_for_texts(pooled), expected, atol=1e-6)
    assert model.get_text_features(torch.tensor([[3, 4]])).pooler_output.shape == (1, 10)


@pytest.fixture
def sentence_teacher(tmp_path, tokenizer, classifier) -> list[str]:
    """Arguments that name an image tower with a head for texts, and its sentence encoder."""
    torch.manual_seed(4)
    encoder = BertModel(BertConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=40))
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    AutoModel.from_pretrained(classifier).save_pretrained(tmp_path / "tower")
    head = {"text_projection.weight": torch.randn(14, 18), "logit_scale": torch.tensor(3.5)}
    save_file(head, tmp_path / "tower" / TEXT_HEAD_FILE)
    return [str(tmp_path / "tower"), "--text_model_name_or_path", str(tmp_path / "encoder")]


@pytest.mark.slow
def test_a_sentence_encoder_with_a_trained_head_is_a_teacher(sentence_teacher, repository, corpus, tmp_path):
    tower, *encoder = sentence_teacher
    run(repository, tower, corpus, tmp_path / "out", *encoder)
    model = TinyCapForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.logit_scale.item() == 3.5
    teacher = text_encoder.TextTeacher(tower, encoder[1])
    alone, padded = teacher(["a dog"]), teacher(["a dog", "two men are walking along a wet street"])
    assert torch.allclose(alone[0], padded[0], atol=1e-5)


def test_spans_are_adjacent_words_of_their_caption():
    spans = text_encoder.draw_spans("a small child in a red coat", 50, text_encoder.random.Random(0))
    assert all(f" {span} " in " a small child in a red coat " for span in spans)
    assert {len(span.split()) for span in spans} == {1, 2, 3, 4, 5, 6}


def test_captions_of_a_data_set_are_texts_too(repository, clip_folder, photos, tmp_path):
    sources = ["--model_name_or_path", str(repository), "--teacher_name_or_path", clip_folder]
    flags = ["--dataset_name", photos, "--num_train_epochs", "1", "--spans_per_caption", "0"]
    metrics = text_encoder.main([*sources, *flags, "--output_dir", str(tmp_path / "out")])
    # Four captions and three numbered ones.
    assert metrics["num_texts"] == 7


def test_a_contrastive_loss_brings_captions_to_their_images(repository, clip_folder, photos, tmp_path):
    """The teacher's texts are random, and so are the student's images."""
    sources = ["--model_name_or_path", str(repository), "--teacher_name_or_path", clip_folder, "--dataset_name", photos]
    flags = [*sources, "--num_train_epochs", "60", "--learning_rate", "1e-2", "--spans_per_caption", "0"]
    losses = []
    for weight in ("0", "3"):
        out = tmp_path / weight
        text_encoder.main([*flags, "--contrastive_weight", weight, "--output_dir", str(out)])
        model, tokenizer, image_processor = load_repository(str(out))
        args = text_encoder.parse_args([*flags, "--contrastive_weight", "3", "--output_dir", "x"])
        images, image_of = text_encoder.embed_images(args, model.eval(), image_processor)
        assert images.shape == (23, 14), "one of 24 is broken"
        inputs = tokenizer(list(image_of), padding=True, return_tensors="pt")
        with torch.no_grad():
            texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
            logits = model.logit_scale.exp() * texts @ images.t()
        losses.append(F.cross_entropy(logits, torch.tensor(list(image_of.values()))).item())
    assert losses[1] < losses[0] - 0.3


def test_what_does_not_fit_is_named(repository, tokenizer, sentence_teacher, corpus, tmp_path, capsys):
    narrow = clip(tmp_path / "narrow", tokenizer, 20, 10)
    with pytest.raises(ValueError, match="width 14.*got width 10"):
        run(repository, narrow, corpus, tmp_path / "out")
    with pytest.raises(ValueError, match="--text_model_name_or_path: expected the sentence encoder"):
        run(repository, sentence_teacher[0], corpus, tmp_path / "out")
    with pytest.raises(ValueError, match="--text_file .*nowhere.txt"):
        run(repository, narrow, str(tmp_path / "nowhere.txt"), tmp_path / "out")
    with pytest.raises(SystemExit):
        text_encoder.main(["--model_name_or_path", "a", "--teacher_name_or_path", "b", "--output_dir", "c"])
    assert "expected --dataset_name or --text_file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_of_others_is_not_written_to(repository, clip_folder, corpus, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="--output_dir: expected an empty folder"):
        run(repository, clip_folder, corpus, tmp_path)
