import json

import datasets
import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tinycap import train_teacher
from tinycap.training import loop
from tinycap.training.repository import load_repository
from tinycap.training.teacher import Teacher
from tinycap.training.text_encoder import TextTeacher
from tinycap.training.tokenizer import load_tokenizer
from tinycap.training.towers import TEXT_HEAD_FILE, LockedTextModel, PretrainedImageTower


TINY = [
    *("--max_train_samples", "30", "--max_eval_samples", "8", "--image_size", "32", "--patch_size", "8"),
    *("--hidden_size", "18", "--num_hidden_layers", "1", "--num_attention_heads", "3", "--projection_dim", "14"),
    *("--text_hidden_size", "16", "--text_num_hidden_layers", "1", "--text_num_attention_heads", "2"),
    *("--per_device_train_batch_size", "10", "--max_train_steps", "6", "--checkpointing_steps", "2"),
    *("--num_warmup_steps", "1", "--logging_steps", "1", "--dataloader_num_workers", "0"),
]


def test_a_trained_teacher_loads_as_clip_and_as_its_vision_half(tmp_path):
    metrics = train_teacher.main([*TINY, "--output_dir", str(tmp_path / "out")])
    assert metrics["num_images"] == 8 and 0 <= metrics["image_to_text_recall_at_1"] <= 100
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text()) == metrics
    _, report = CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    _, report = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert Teacher.from_pretrained(str(tmp_path / "out"), "projected")(torch.randn(2, 3, 32, 32)).shape == (2, 14)
    assert AutoProcessor.from_pretrained(tmp_path / "out").tokenizer("").input_ids


@pytest.mark.parametrize("kind", ["fresh", "locked", "frozen"])
@pytest.mark.slow
def test_a_teachers_run_that_was_killed_resumes_to_the_same_weights(
    kind, sentence_encoder, resnet, tmp_path, monkeypatch
):
    """Also with cached text embeddings, which are the same in a resumed run, and with cached features and dropout."""
    locked = ["--text_model_name_or_path", sentence_encoder, "--captions_per_image", "5"]
    frozen = [*FROZEN, "--image_model_name_or_path", resnet, *locked]
    flags = {"fresh": TINY, "locked": [*LOCKED, *locked], "frozen": frozen}[kind]
    train_teacher.main([*flags, "--output_dir", str(tmp_path / "whole")])
    flags = [*flags, "--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as patch:

        def dies(losses, step, image_ids):
            if step == 6:
                raise KeyboardInterrupt

        patch.setattr(loop, "check_finite", dies)
        with pytest.raises(KeyboardInterrupt):
            train_teacher.main(flags)
    train_teacher.main([*flags, "--resume_from_checkpoint", "latest"])
    for name in ("model.safetensors", "checkpoint-6/model.safetensors"):
        whole, resumed = (load_file(tmp_path / folder / name) for folder in ("whole", "out"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture
def sentence_encoder(tmp_path) -> str:
    """A folder with a tiny BERT and its tokenizer, in the format of sentence-transformers' models."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "the", "two", "red", "blue", "ball", "box", "and", "on", "in"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path / "encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=48, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


LOCKED = [word for flag in zip(TINY[::2], TINY[1::2]) if not flag[0].startswith("--text_") for word in flag]


@pytest.mark.slow
def test_a_teacher_can_learn_a_locked_sentence_encoders_space(sentence_encoder, tmp_path):
    out = tmp_path / "out"
    train_teacher.main([*LOCKED, "--text_model_name_or_path", sentence_encoder, "--output_dir", str(out)])
    _, report = CLIPVisionModelWithProjection.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert Teacher.from_pretrained(str(out), "projected")(torch.randn(2, 3, 32, 32)).shape == (2, 14)
    assert load_file(out / TEXT_HEAD_FILE)["text_projection.weight"].shape == (14, 12)
    # Trained and frozen weights, from the last checkpoint, which has all of them.
    trained, given = (
        load_file(out / "checkpoint-6" / "model.safetensors"),
        load_file(f"{sentence_encoder}/model.safetensors"),
    )
    assert given and all(torch.equal(trained[f"text_model.{name}"], value) for name, value in given.items())


OWN = ("--patch_size", "--hidden_size", "--num_hidden_layers", "--num_attention_heads")
PRETRAINED = [word for flag in zip(LOCKED[::2], LOCKED[1::2]) if flag[0] not in OWN for word in flag]


def drop_flag(flags: list[str], name: str) -> list[str]:
    return [*flags[: (place := flags.index(name))], *flags[place + 2 :]]


FROZEN = [*PRETRAINED, "--freeze_image_model", "--feature_views", "3"]


@pytest.mark.slow
def test_a_teacher_can_start_from_a_pretrained_image_model(sentence_encoder, classifier, tmp_path):
    flags = [*PRETRAINED, "--text_model_name_or_path", sentence_encoder, "--image_model_name_or_path", classifier]
    out = tmp_path / "out"
    train_teacher.main([*flags, "--output_dir", str(out)])
    given, trained = load_file(f"{classifier}/model.safetensors"), load_file(out / "model.safetensors")
    assert set(given) == set(trained) and trained["classifier.weight"].shape[0] == 14
    kernel = next(name for name in given if "conv_stem" in name and given[name].dim() == 4)
    assert not trained[kernel].equal(given[kernel]), "not frozen"
    teacher = Teacher.from_pretrained(str(out), "projected")
    assert teacher.image_size == 32 and teacher(torch.randn(2, 3, 32, 32)).shape == (2, 14)
    assert list(AutoImageProcessor.from_pretrained(out).image_mean) == [0.1, 0.2, 0.3]


@pytest.mark.slow
def test_a_frozen_image_model_is_asked_once_for_each_crop(sentence_encoder, resnet, photos, tmp_path, monkeypatch):
    seen = []
    forward = PretrainedImageTower.forward

    def counted(self, pixel_values):
        seen.extend(pixel_values)
        return forward(self, pixel_values)

    monkeypatch.setattr(PretrainedImageTower, "forward", counted)
    flags = [*FROZEN, "--text_model_name_or_path", sentence_encoder, "--feature_cache_dir", str(tmp_path / "cache")]
    flags, out = [*flags, "--dataset_name", photos, "--crop_scale", "0.6"], tmp_path / "out"
    metrics = train_teacher.main([*flags, "--image_model_name_or_path", resnet, "--output_dir", str(out)])
    assert len(seen) == 3 * 23 + 6, "three crops of each training image, one of a validation image"
    assert not seen[0].equal(seen[23]), "another crop of the same image"
    given, trained = load_file(f"{resnet}/model.safetensors"), load_file(out / "model.safetensors")
    assert set(given) == set(trained)
    moved = {name for name in given if given[name].shape != trained[name].shape or not given[name].equal(trained[name])}
    assert moved == {"classifier.1.weight", "classifier.1.bias"}, "frozen but for its new head"

    crops = torch.stack(seen[-6:])
    teacher = Teacher.from_pretrained(str(out), "projected")
    assert teacher.image_size == 32 and teacher(crops).shape == (6, 14)
    assert metrics["num_images"] == 6

    # Two of them, with another seed: the features of both are there.
    seen.clear()
    pair = [*flags, "--image_model_name_or_path", resnet, resnet, "--seed", "5"]
    train_teacher.main([*pair, "--output_dir", str(tmp_path / "pair")])
    # But for the cache's check of a row in each of its files.
    assert len(seen) == 2 * (3 + 1)
    assert Teacher.from_pretrained(str(tmp_path / "pair"), "projected")(crops).shape == (6, 14)


@pytest.mark.slow
def test_texts_learn_where_a_captioner_embeds_images(sentence_encoder, repository, photos, tmp_path):
    flags = [*FROZEN, "--text_model_name_or_path", sentence_encoder, "--dataset_name", photos]
    flags = [*drop_flag(flags, "--image_size"), "--crop_scale", "1", "--no-horizontal_flip", "--color_jitter", "0"]
    flags[flags.index("--feature_views") + 1] = "1"
    out, flags = tmp_path / "out", drop_flag(flags, "--projection_dim")
    metrics = train_teacher.main([*flags, "--image_model_name_or_path", str(repository), "--output_dir", str(out)])
    assert metrics["num_images"] == 6 and not (out / "model.safetensors").exists()
    teacher, rows = TextTeacher(str(out), sentence_encoder), datasets.load_dataset(photos, split="validation")
    embeds = teacher([caption for group in rows["captions"] for caption in group])
    assert embeds.shape == (12, 14)
    model, _, image_processor = load_repository(str(repository))
    pixels = image_processor(list(rows["image"]), return_tensors="pt")["pixel_values"]
    features = [load_file(path)["image_embeds"] for path in out.glob("features/*/*.safetensors")]
    images = model.get_image_features(pixels).pooler_output
    # The run's own resizing differs a little from the image processor's.
    cosines = [F.cosine_similarity(each.float(), images) for each in features if len(each) == 6]
    assert len(features) == 2 and cosines[0].min() > 0.9, cosines
    flags += ["--output_dir", str(tmp_path / "wrong")]
    unfrozen = [flag for flag in drop_flag(flags, "--feature_views") if flag != "--freeze_image_model"]
    for wrong, words in (
        ([*flags, "--image_size", "32"], "image_size: expected 24"),
        ([*flags, "--projection_dim", "13"], "--projection_dim: expected 14"),
        (unfrozen, "--freeze_image_model: expected"),
    ):
        with pytest.raises(ValueError, match=words):
            train_teacher.main([*wrong, "--image_model_name_or_path", str(repository)])
    with pytest.raises(ValueError, match="a captioner alone"):
        train_teacher.main([*flags, "--image_model_name_or_path", str(repository), str(repository)])


@pytest.mark.slow
def test_two_processes_train_the_same_head_on_features_as_one(sentence_encoder, resnet, tmp_path):
    flags = [*FROZEN, "--text_model_name_or_path", sentence_encoder, "--image_model_name_or_path", resnet]
    # Dropout would differ; nothing else does.
    flags += ["--captions_per_image", "2", "--feature_dropout", "0"]
    train_teacher.main([*flags, "--output_dir", str(tmp_path / "one")])
    halves = [*flags, "--per_device_train_batch_size", "5", "--output_dir", str(tmp_path / "two")]
    Ranks(halves, tmp_path / "log", script="train_teacher").finish()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    start = load_file(tmp_path / "one" / "checkpoint-4" / "model.safetensors")["vision_model.head.weight"]
    last = load_file(tmp_path / "one" / "checkpoint-6" / "model.safetensors")["vision_model.head.weight"]
    assert not start.equal(last)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)


def test_a_locked_text_tower_means_its_real_tokens_and_stays_in_eval_mode(sentence_encoder):
    args = train_teacher.parse_args([*LOCKED, "--text_model_name_or_path", sentence_encoder])
    tokenizer = load_tokenizer(sentence_encoder)
    model = train_teacher.build_model(args, tokenizer).train()
    assert model.vision_model.training and not model.text_model.training
    labels = torch.tensor([[4, 7, 9, tokenizer.eos_token_id, -100, -100], [5, 8, 10, 11, 6, tokenizer.eos_token_id]])
    inputs = train_teacher.text_inputs(labels, tokenizer)
    assert inputs["input_ids"][0].tolist() == [2, 4, 7, 9, 3, 0, 0], "[CLS] in front, [SEP] behind, then padding"
    pixel_values = torch.randn(2, 3, 32, 32)
    padded = model(pixel_values, **inputs)
    alone = model(pixel_values[:1], **train_teacher.text_inputs(labels[:1, :4], tokenizer))
    torch.testing.assert_close(padded.text_embeds[:1], alone.text_embeds)
    padded.text_embeds.sum().backward()
    assert model.text_projection.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.text_model.parameters())


@pytest.mark.slow
def test_a_locked_sentence_encoder_reads_each_training_caption_once(sentence_encoder, tmp_path, monkeypatch):
    read = []
    encode = LockedTextModel.encode_sentences

    def counted(self, input_ids, attention_mask):
        read.extend(tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask))
        return encode(self, input_ids, attention_mask)

    monkeypatch.setattr(LockedTextModel, "encode_sentences", counted)
    flags = [*LOCKED, "--text_model_name_or_path", sentence_encoder]
    # 30 scenes have 150 captions: fewer than 16 steps of 10 draw, more than 6 do. 8 scenes are for validation.
    train_teacher.main([*flags, "--output_dir", str(tmp_path / "short")])
    asked = len(read)
    read.clear()
    train_teacher.main([*flags, "--max_train_steps", "16", "--output_dir", str(tmp_path / "long")])
    trained, validated = read[:-40], read[-40:]
    assert asked == 6 * 10 + 40 and len(trained) == len(set(trained)) <= 150 and set(validated) - set(trained)


def test_a_remembered_text_is_embedded_as_a_read_one(sentence_encoder, monkeypatch):
    args = train_teacher.parse_args([*LOCKED, "--text_model_name_or_path", sentence_encoder])
    tokenizer = load_tokenizer(sentence_encoder)
    model = train_teacher.build_model(args, tokenizer)
    labels = torch.tensor([[4, 7, 9, tokenizer.eos_token_id, -100, -100], [5, 8, 10, 11, 6, tokenizer.eos_token_id]])
    inputs, pixel_values = train_teacher.text_inputs(labels, tokenizer), torch.randn(2, 3, 32, 32)
    read = model(pixel_values, **inputs)
    model.cache_text_embeddings([(2, 5, 8, 10, 11, 6, 3), (2, 4, 7, 9, 3), (2, 5, 3), (2, 5, 3)])
    assert model.sentences.shape == (3, 12)
    monkeypatch.setattr(LockedTextModel, "encode_sentences", None)
    remembered = model(pixel_values, **inputs)
    torch.testing.assert_close(remembered.text_embeds, read.text_embeds)


def test_a_text_model_that_is_no_sentence_encoder_is_a_named_error(tmp_path):
    args = train_teacher.parse_args([*LOCKED, "--text_model_name_or_path", str(tmp_path / "none")])
    with pytest.raises(ValueError, match="none: expected a sentence encoder"):
        train_teacher.build_model(args, None)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 18, "num_hidden_layers": 1, "num_attention_heads": 3}
    CLIPVisionModel(CLIPVisionConfig(intermediate_size=20, **sizes)).save_pretrained(tmp_path / "vision")
    args = train_teacher.parse_args([*LOCKED, "--text_model_name_or_path", str(tmp_path / "vision")])
    with pytest.raises(ValueError, match="expected a whole text encoder, got CLIPVisionModel"):
        train_teacher.build_model(args, None)


def test_the_text_tower_pools_the_end_token_and_ignores_padding(tmp_path, tokenizer):
    args = train_teacher.parse_args([*TINY, "--max_caption_length", "12"])
    torch.manual_seed(0)
    model = train_teacher.build_model(args, tokenizer).eval()
    labels = torch.tensor([[5, 9, 7, tokenizer.eos_token_id, -100, -100], [5, 9, 7, 8, 6, tokenizer.eos_token_id]])
    with torch.no_grad():
        padded = model.get_text_features(**train_teacher.text_inputs(labels, tokenizer))
        alone = model.get_text_features(**train_teacher.text_inputs(labels[:1, :4], tokenizer))
    # transformers 4 returns the tensor itself.
    padded, alone = getattr(padded, "pooler_output", padded), getattr(alone, "pooler_output", alone)
    torch.testing.assert_close(padded[:1], alone)
    assert not torch.allclose(padded[0], padded[1], atol=1e-3)


def test_one_caption_an_image_gives_clips_own_loss():
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(6, 5), dim=-1) for _ in range(2))
    logits = 7.0 * images @ texts.t()
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.t(), torch.arange(6))) / 2
    torch.testing.assert_close(train_teacher.contrastive_loss(images, texts, torch.tensor(7.0)), expected)


def test_all_captions_of_an_image_are_its_positives():
    images = torch.eye(4)
    right = images.repeat_interleave(3, dim=0)
    scale = torch.tensor(30.0)
    assert train_teacher.contrastive_loss(images, right, scale) < train_teacher.contrastive_loss(
        images, right.roll(1, 0), scale
    )
    # All three captions match an image equally: the loss is the entropy of the uniform distribution.
    expected = (torch.log(torch.tensor(3.0)) + 0) / 2
    torch.testing.assert_close(train_teacher.contrastive_loss(images, right, scale), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--hidden_size", "20"], ["--hidden_size", "3 heads", "20"]),
        (["--patch_size", "7"], ["--image_size", "--patch_size 7"]),
        (["--attention_dropout", "1.5"], ["--attention_dropout", "1.5"]),
        (["--projection_dim", "0"], ["--projection_dim"]),
        (["--text_model_name_or_path", "m"], ["--text_hidden_size", "--text_model_name_or_path"]),
        (["--image_model_name_or_path", "m"], ["--image_model_name_or_path", "--text_model_name_or_path"]),
        (["--freeze_image_model"], ["--freeze_image_model", "--image_model_name_or_path"]),
        (["--feature_views", "3"], ["--feature_views", "--freeze_image_model"]),
        (["--feature_dropout", "1"], ["--feature_dropout", "1"]),
        (
            ["--image_model_name_or_path", "m", "--text_model_name_or_path", "t"],
            ["--patch_size", "contradicts --image_model_name_or_path"],
        ),
    ],
)
def test_sizes_that_do_not_fit_are_errors_that_name_them(extra, words, capsys):
    with pytest.raises(SystemExit):
        train_teacher.parse_args([*TINY, *extra])
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
