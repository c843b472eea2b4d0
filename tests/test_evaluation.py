import contextlib
import importlib
import json
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import datasets
import evaluate
import pytest
import torch
from fresh import run_fresh
from PIL import Image
from tiny import CAPTIONS, draw_picture
from transformers import AutoModel, AutoProcessor, CLIPVisionConfig, CLIPVisionModel, pipeline

from tinycap import REPOSITORY, evaluation
from tinycap.evaluation import caption_metrics, confidence, reports
from tinycap.evaluation.__main__ import main
from tinycap.evaluation.caption_metrics.caption_metrics import cider_of_each
from tinycap.evaluation.caption_metrics.ptb_tokenizer import ptb_tokenize
from tinycap.evaluation.captioning import caption_dataset, caption_embeds
from tinycap.evaluation.metrics import (
    baseline_scores,
    distillation_fidelity,
    leave_one_out,
    most_typical_caption,
    score_captions,
)
from tinycap.evaluation.reports import contact_sheet, plot_curves
from tinycap.training.data import image_ids, load_splits, resolve_columns


REFERENCES = [[CAPTIONS[0], "A dog is running ."], [CAPTIONS[1], "Two people on a street ."], [CAPTIONS[2]]]


# --- caption metrics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("A man's dog, running!", "a man 's dog running"),
        ("They don't see the T-shirt.", "they do n't see the t-shirt"),
        ('"Stop" -- he said (loudly)', "stop he said -lrb- loudly -rrb-"),
        ("Mr. Smith has 2,000 balls...", "mr. smith has 2,000 balls"),
        ("  ", ""),
        ("cannot", "can not"),
        ("एक कुत्ता, दौड़ रहा है।", "एक कुत्ता दौड़ रहा है"),
        ("கருப்பு நாய் ஓடுகிறது.", "கருப்பு நாய் ஓடுகிறது"),
        ("كَلْبٌ يَجْرِي، هُنَا", "كَلْبٌ يَجْرِي هُنَا"),
        ("Ein Ba\u0308r mit Hu\u0308ten", "ein bär mit hüten"),
        ("मार्क्\u200dस", "मार्क्स"),
        ("一只狗。", "一 只 狗"),
        ("犬がiPhoneで、遊ぶ", "犬 が iphone で 遊 ぶ"),
        ("น้ำ", "น้ ำ"),
    ],
)
def test_tokens_are_the_penn_treebanks_without_punctuation(text, tokens):
    assert ptb_tokenize(text) == tokens


def test_a_human_caption_repeated_word_for_word_scores_full_marks():
    scores = score_captions([group[0] for group in REFERENCES], REFERENCES)
    assert [scores[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx([100] * 4, abs=1e-3)
    assert scores["rouge_l"] == pytest.approx(100)
    assert scores["cider"] > 400 and scores["distinct_captions"] == 3


def test_captions_of_the_wrong_pictures_score_less():
    predictions = [group[0] for group in REFERENCES]
    right, wrong = (score_captions(p, REFERENCES) for p in (predictions, predictions[1:] + predictions[:1]))
    assert all(wrong[name] < right[name] / 2 for name in ("bleu_2", "bleu_4", "rouge_l", "cider"))


def test_all_references_count():
    only_second = score_captions(["A dog is running .", "two", "x"], REFERENCES)
    without = score_captions(["A dog is running .", "two", "x"], [group[:1] for group in REFERENCES])
    assert only_second["rouge_l"] > without["rouge_l"]


def test_bleu_1_is_the_share_of_words_that_a_reference_has():
    scores = score_captions(["a b c d"], [["a b x y"]])
    assert scores["bleu_1"] == pytest.approx(50, abs=1e-3)


def test_composed_and_decomposed_captions_score_the_same():
    captions = [["Ein Bär läuft über grünes Gras", "Ein Bär"], ["Zwei Männer", "Männer stehen"], ["ein Hündchen"]]
    decomposed = [unicodedata.normalize("NFD", group[0]) for group in captions]
    assert score_captions(decomposed, captions)["cider"] == score_captions([c[0] for c in captions], captions)["cider"]


@pytest.mark.parametrize("captions", [["a dog", "two men walk"], ["a b c d e x y", "f g h i"]])
def test_bleu_without_a_match_is_zero_and_not_nearly_so(captions):
    scores = score_captions(captions, [["dog a house e d c b a"], ["walk men two"]])
    assert scores["bleu_2"] == scores["bleu_3"] == scores["bleu_4"] == 0 < scores["bleu_1"]


@pytest.mark.filterwarnings("error")
def test_cider_that_says_little_is_warned_of_with_the_reason():
    score_captions(["a dog", "a cat"], [["a dog"], ["a cat"]])
    with pytest.warns(UserWarning, match="CIDEr of one image is 0"):
        assert score_captions(["a dog"], [["a dog"]])["cider"] == 0
    chinese = ["一只狗在草地上奔跑", "两个人走在街上", "一个小孩在读书"]
    with pytest.warns(UserWarning, match="characters, not words"):
        found = score_captions(["一只狗奔跑", *chinese[1:]], [[caption] for caption in chinese])
    assert 100 < found["cider"] < 1000


def test_empty_captions_are_scored_as_nothing():
    scores = score_captions(["", "...", ""], REFERENCES)
    assert scores["bleu_1"] == 0 and scores["cider"] == 0 and scores["mean_length"] < 1


def test_lists_that_do_not_match_are_an_error():
    with pytest.raises(ValueError, match="2 predictions and 3 lists"):
        score_captions(["a", "b"], REFERENCES)
    with pytest.raises(ValueError, match=r"references\[1\]"):
        score_captions(["a", "b"], [["a"], []])


def test_the_metric_loads_by_evaluate_offline_and_gives_the_same_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metric = evaluate.load(caption_metrics.__path__[0])
    predictions = ["a brown dog", "two men", "a child"]
    found = metric.compute(predictions=predictions, references=REFERENCES)
    expected = score_captions(predictions, REFERENCES)
    assert found == {name: expected[name] for name in found} and "cider" in found
    for prediction, references in zip(predictions, REFERENCES):
        metric.add(prediction=prediction, references=references)
    assert metric.compute() == found


# --- fidelity ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cone():
    """600 embeddings in a narrow cone, like CLIP's."""
    torch.manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(600, 12) + 4.0, dim=-1)


def test_a_perfect_student_is_perfect(cone):
    found = distillation_fidelity(3 * cone, cone)
    assert found["cosine_distance"] == pytest.approx(0, abs=1e-6)
    assert (found["centered_cosine"], found["recall_at_1"]) == (pytest.approx(1), 100)


def test_a_constant_student_looks_good_by_distance_only(cone):
    constant = torch.nn.functional.normalize(cone.mean(dim=0), dim=-1).expand_as(cone)
    found = distillation_fidelity(constant, cone)
    assert found["cosine_distance"] == pytest.approx(found["constant_cosine_distance"], rel=1e-5)
    assert found["cosine_distance"] < 0.06
    assert abs(found["centered_cosine"]) < 1e-3 and found["recall_at_1"] < 1 and found["recall_at_5"] < 2


def test_a_student_of_the_wrong_pictures_finds_nothing(cone):
    assert distillation_fidelity(cone.roll(1, 0), cone)["recall_at_1"] < 1


def test_recall_over_many_pictures_is_the_same_in_chunks(cone, monkeypatch):
    student = cone + 0.1 * torch.randn_like(cone)
    whole = distillation_fidelity(student, cone)
    monkeypatch.setattr("tinycap.evaluation.metrics.CHUNK", 7)
    assert distillation_fidelity(student, cone) == whole and 5 < whole["recall_at_1"] < 100


def test_embeddings_of_other_shapes_are_an_error(cone):
    with pytest.raises(ValueError, match=r"\(600, 12\).*\(600, 11\)"):
        distillation_fidelity(cone, cone[:, :11])


# --- captioning a data set --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tinycap(repository):
    return (
        AutoModel.from_pretrained(repository, trust_remote_code=True),
        AutoProcessor.from_pretrained(repository, trust_remote_code=True),
    )


def rows_of(tmp_path, num: int = 7, bad: tuple[int, ...] = ()) -> datasets.Dataset:
    paths = []
    for index in range(num):
        paths.append(str(tmp_path / f"{index}.png"))
        draw_picture(index).save(paths[-1])
        if index in bad:
            (tmp_path / f"{index}.png").write_bytes(b"no picture")
    rows = {"image": paths, "captions": [[CAPTIONS[i % 4], f"number {i}"] for i in range(num)]}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


@pytest.fixture(scope="module")
def expected(repository) -> list[str]:
    """The pipeline's captions of the images of `rows_of`."""
    captioner = pipeline("image-to-text", model=str(repository), trust_remote_code=True)
    return [captioner(draw_picture(index), num_beams=2)[0]["generated_text"] for index in range(7)]


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_captions_come_in_the_data_sets_order_whatever_the_batch(tinycap, expected, tmp_path, batch_size):
    model, processor = tinycap
    found = caption_dataset(model, processor, rows_of(tmp_path), batch_size=batch_size, num_beams=2)
    assert found.captions == expected and found.rows == list(range(7))
    assert [processor.decode(tokens, skip_special_tokens=True).strip() for tokens in found.tokens] == expected
    end = model.generation_config.eos_token_id
    for tokens, number in zip(found.tokens, found.num_tokens):
        assert len(tokens) == number and end not in tokens[:-1] and (tokens[-1] == end or number == 9)
    assert found.image_embeds.shape == (7, 14) and found.teacher_embeds is None


def test_pictures_that_cannot_be_read_are_listed_and_the_others_captioned(tinycap, tmp_path):
    found = caption_dataset(*tinycap, rows_of(tmp_path, bad=(1, 5)), batch_size=3)
    assert found.rows == [0, 2, 3, 4, 6] and [row for row, _ in found.skipped] == [1, 5]
    assert all("row" in reason for _, reason in found.skipped)
    with pytest.raises(ValueError, match="at least one image"):
        caption_dataset(*tinycap, rows_of(tmp_path, 2, bad=(0, 1)))


def test_a_teacher_sees_the_same_pixels(tinycap, tmp_path):
    model, processor = tinycap
    found = caption_dataset(
        model, processor, rows_of(tmp_path), teacher=lambda pixels: model.get_image_features(pixels).pooler_output
    )
    torch.testing.assert_close(found.image_embeds, found.teacher_embeds)
    # The student's embeddings in the teacher's place: the student's captions.
    assert caption_embeds(model, processor, found.teacher_embeds, batch_size=3) == found.captions


@pytest.mark.usefixtures("undrawn_figures")
def test_captions_of_the_teachers_embeddings_are_scored_too(repository, photos, tmp_path):
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 14, "intermediate_size": 9, "num_hidden_layers": 1}
    teacher = str(tmp_path / "teacher")
    CLIPVisionModel(CLIPVisionConfig(**sizes, num_attention_heads=2)).save_pretrained(teacher)
    flags = ["--model_name_or_path", str(repository), "--dataset_name", photos, "--output_dir", str(tmp_path / "out")]
    results = main([*flags, "--teacher_name_or_path", teacher, "--report_photos", "0", "--max_new_tokens", "5"])
    assert results["teacher_captions"].keys() == score_captions([""], [["a"]]).keys()
    assert "recall_at_1" in results["fidelity"]


# --- reports and the command ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_contact_sheet_shows_every_picture(tmp_path):
    pictures = [Image.new("RGB", (30, 20), color) for color in ("#e01010", "#10e010", "#1010e0", "#e0e010", "#e010e0")]
    captions = ["one", "", "costs $5 & 10$", "a very long caption " * 9, "日本"]
    contact_sheet(pictures, captions, tmp_path / "sheet.png", references=captions, columns=2, title="Five")
    colors = {color for _, color in Image.open(tmp_path / "sheet.png").convert("RGB").getcolors(10**6)}
    assert {picture.getpixel((0, 0)) for picture in pictures} <= colors
    with pytest.raises(ValueError, match="5 images, 1 captions"):
        contact_sheet(pictures, ["one"], tmp_path / "sheet.png")


def sheet_fonts(monkeypatch, tmp_path, caption: str, fonts: dict[str, str]) -> list[str]:
    """The font families of a contact sheet's caption if only `fonts` (letters by name) are installed."""
    from matplotlib import axes, figure, font_manager

    installed = [font_manager.FontEntry(fname=name, name=name) for name in fonts]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", installed)
    monkeypatch.setattr(
        font_manager, "get_font", lambda name: SimpleNamespace(get_charmap=lambda: dict.fromkeys(map(ord, fonts[name])))
    )
    drawn = []
    monkeypatch.setattr(axes.Axes, "text", lambda self, x, y, text, **options: drawn.append(options))
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **options: Path(path).touch())
    contact_sheet([Image.new("RGB", (30, 20))], [caption], tmp_path / "sheet.png")
    return drawn[0]["fontfamily"]


def test_letters_of_other_scripts_are_drawn_with_a_font_that_has_them(monkeypatch, tmp_path, caplog):
    fonts = {"Last Resort X": "日本犬", "Noto": "日本", "cmmi10": "犬", "DejaVu Sans": "a dogИ"}
    assert sheet_fonts(monkeypatch, tmp_path, "a dog", fonts) == ["DejaVu Sans"]
    assert sheet_fonts(monkeypatch, tmp_path, "日本 dog И", fonts) == ["DejaVu Sans", "Noto"] and not caplog.text
    assert sheet_fonts(monkeypatch, tmp_path, "日本の犬", fonts) == ["Noto"]
    assert "no installed font has the letters の犬" in caplog.text


@pytest.mark.filterwarnings("error")
def test_wide_letters_stay_under_their_image(monkeypatch):
    assert max(map(len, reports._wrap("犬" * 60, 38, max_lines=3).split("\n"))) == 19
    assert max(map(len, reports._wrap("dog " * 60, 38, max_lines=3).split("\n"))) > 30


def test_curves_have_no_panel_without_finite_values(tmp_path):
    rows = [{"step": step, "loss": 2.0, "grad_rate": float("nan"), "eval_cider": None} for step in range(3)]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_curves(log, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width < 600, "one panel"
    log.write_text('{"step": 1, "loss": NaN}\n')
    with pytest.raises(ValueError, match="finite metrics"):
        plot_curves(log, tmp_path / "curves.png")


@pytest.mark.slow
def test_curves_are_drawn_from_the_log(tmp_path):
    rows = [{"step": step, "loss": 3.0 / step, "learning_rate": 0.1, "epoch": 0} for step in range(1, 30)]
    rows.append({"step": 30, "epoch": 1, "eval_cider": 9.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 800, "three panels"
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"step": 31, "epoch": 1, "reward": 0.2}\n')
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "rewarded.png")
    assert Image.open(tmp_path / "rewarded.png").width > 1.2 * Image.open(tmp_path / "curves.png").width, "a fourth"
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="expected rows"):
        plot_curves(tmp_path / "empty.jsonl", tmp_path / "curves.png")


def test_baselines_put_a_score_into_proportion():
    captions = [group[0] for group in REFERENCES]
    found = baseline_scores(captions, REFERENCES, None, seed=0)
    assert found["shuffled"]["cider"] < 50
    assert found["constant"]["distinct_captions"] == 1 and found["constant"]["chosen_from"] == "evaluated captions"
    assert set(found) == {"constant", "shuffled", "human", "model_leave_one_out"}
    trained = baseline_scores(captions, REFERENCES, [["only this one"]], seed=0)["constant"]
    assert trained["caption"] == "only this one" and trained["chosen_from"] == "training captions"
    assert "human" not in baseline_scores(captions, [group[:1] for group in REFERENCES], None, seed=0)


def test_the_constant_caption_scores_better_than_all_others():
    references = [[f"a dog runs on grass {name}", f"a dog {name}"] for name in ("one", "two", "three", "four")]
    references.append(["a man sits", "a man waits on a chair"])
    captions = [caption for group in references for caption in group]
    scores = {caption: score_captions([caption] * 5, references)["cider"] for caption in captions}
    assert most_typical_caption(references, seed=0) == max(scores, key=scores.get)


def test_a_human_is_scored_against_the_others_and_so_may_a_model_be():
    references = [["a b c d", "a b c d", "x y"], ["e f g h", "e f g h", "u v"]]
    human = leave_one_out(None, references)
    rounds = [
        score_captions([group[i] for group in references], [group[:i] + group[i + 1 :] for group in references])
        for i in range(3)
    ]
    assert human["cider"] == pytest.approx(sum(scores["cider"] for scores in rounds) / 3)
    model = leave_one_out(["a b c d", "e f g h"], references)
    assert model["cider"] > human["cider"] and model["distinct_captions"] == 2


def test_the_ciders_of_single_captions_average_to_that_of_all():
    captions = ["a brown dog", "two men on a street", ""]
    each = cider_of_each(captions, REFERENCES)
    assert sum(each) / 3 == pytest.approx(score_captions(captions, REFERENCES)["cider"])
    assert each[0] > 0 == each[2]


def test_the_command_scores_a_checkpoint_and_leaves_its_reports(tinycap, repository, tmp_path):
    model, processor = tinycap
    data = tmp_path / "data"
    data.mkdir()
    rows_of(data, 6, bad=(4,)).to_parquet(data / "validation.parquet")
    flags = ["--model_name_or_path", str(repository), "--dataset_name", str(data), "--baselines", "--num_beams", "2"]
    results = main([*flags, "--output_dir", str(tmp_path / "out")])
    tokens_of_all = caption_dataset(model, processor, rows_of(tmp_path, 6, bad=(4,)), num_beams=2).tokens
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text()) == json.loads(json.dumps(results))
    used = {token for caption in tokens_of_all for token in caption}
    assert results["vocabulary_used"] == pytest.approx(100 * len(used) / model.config.text_config.vocab_size)
    assert results["num_images"] == 5 and results["num_skipped"] == 1 and "cider" in results["baselines"]["human"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in lines] == [f"{index}.png" for index in (0, 1, 2, 3, 5, 4)]
    assert lines[-1]["caption"] is None and "4.png" in lines[-1]["error"]
    assert Image.open(tmp_path / "out" / "samples.png").width > 300
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        main([*flags, "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("flag", ["model_name_or_path", "dataset_name"])
def test_a_folder_that_is_not_there_is_named_as_such(flag, repository, photos, tmp_path):
    names = {"model_name_or_path": str(repository), "dataset_name": str(photos), flag: "nowhere"}
    argv = [word for name, value in names.items() for word in (f"--{name}", value)]
    with pytest.raises(ValueError, match=f"--{flag}: no such folder: nowhere"):
        main([*argv, "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("command", [main, confidence.main])
def test_evaluation_runs_no_code_of_the_models_repository(command, repository, photos, tmp_path):
    folder = shutil.copytree(repository, tmp_path / "model")
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        autos = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
        content["auto_map"] = {auto: "evil.Evil" for auto in autos}
        content["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
        (folder / name).write_text(json.dumps(content))
    for path in [*folder.glob("*.py"), folder / "evil.py"]:
        path.write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    # Captions or an error; too few are right for a calibration.
    flags = ["--model_name_or_path", str(folder), "--dataset_name", photos, "--output_dir", str(tmp_path / "out")]
    with contextlib.suppress(ValueError, AttributeError):
        command(flags)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.usefixtures("undrawn_figures")
def test_evaluation_ends_with_a_short_table(repository, photos, tmp_path, capsys):
    flags = ["--model_name_or_path", str(repository), "--dataset_name", photos, "--output_dir", str(tmp_path / "out")]
    results = main([*flags, "--report_photos", "0"])
    head, model, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["CIDEr", "BLEU-1", "BLEU-4", "ROUGE-L", "distinct", "captions", "words"]
    assert f"the model  {results['cider']:5.1f}" in model and last.startswith("6 images, 0 skipped.")


def test_evaluation_refuses_a_model_that_is_not_a_tinycap(teacher, photos, tmp_path):
    flags = ["--dataset_name", photos, "--output_dir", str(tmp_path / "out"), "--model_name_or_path"]
    with pytest.raises(ValueError, match="expected model_type tinycap, got clip_vision_model"):
        main([*flags, teacher])
    with pytest.raises(ValueError, match="nowhere"):
        main([*flags, str(tmp_path / "nowhere"), "--overwrite_output_dir"])


@pytest.mark.usefixtures("undrawn_figures")
def test_rows_without_captions_are_skipped_and_counted_before_captioning(repository, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = rows_of(data, 6)
    rows = rows.map(lambda row, index: {"captions": [] if index == 2 else row["captions"]}, with_indices=True)
    rows.to_parquet(data / "validation.parquet")
    flags = ["--model_name_or_path", str(repository), "--dataset_name", str(data), "--num_beams", "1"]
    results = main([*flags, "--report_photos", "0", "--output_dir", str(tmp_path / "out")])
    assert (results["num_images"], results["num_skipped"]) == (5, 1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert lines[-1]["image_id"] == "2.png" and "expected a caption" in lines[-1]["error"]


@pytest.mark.usefixtures("undrawn_figures")
@pytest.mark.parametrize("given", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_without_a_validation_split_what_training_held_out_is_scored(given, repository, tmp_path, caplog):
    model = tmp_path / "model"
    shutil.copytree(repository, model)
    (model / "train_args.json").write_text(json.dumps({"seed": 9 if given else 4}))
    data = tmp_path / "data"
    data.mkdir()
    rows = rows_of(data, 25)
    halves = [rows.map(lambda row, number=number: {"captions": [row["captions"][number]]}) for number in (0, 1)]
    datasets.concatenate_datasets(halves).to_parquet(data / "train.parquet")
    held_out = load_splits(str(data), seed=4)[1]
    caplog.set_level("INFO")
    flags = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--num_beams", "1"]
    flags += ["--seed", "4"] if given else []
    results = main([*flags, "--baselines", "--report_photos", "0", "--output_dir", str(tmp_path / "out")])
    lines = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in lines] == image_ids(held_out, resolve_columns(held_out))
    assert all(len(line["references"]) == 2 for line in lines) and results["num_images"] == 2
    assert "2 of its 25 training images are held out, drawn by seed 4" in caplog.text
    assert results["baselines"]["constant"]["chosen_from"] == "training captions"


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs accelerate: pip install 'tinycap\[evaluation\]'"):
        importlib.reload(evaluation)


@pytest.mark.slow
def test_importing_the_model_does_not_import_the_metrics(tmp_path):
    code = (
        "import sys; names = ('pycocoevalcap', 'matplotlib', 'evaluate', 'datasets.load')\n"
        # The server of such processes has imported some.
        "for name in names: sys.modules.pop(name, None)\n"
        "import tinycap.modeling_tinycap, tinycap.pipeline_tinycap; print([n for n in names if n in sys.modules])"
    )
    assert run_fresh(code, folder=tmp_path, path=(REPOSITORY,)).strip().endswith("[]")
