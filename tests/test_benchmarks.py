import json
from argparse import Namespace

import pytest
import torch
from tiny import tiny_config, tiny_model

from benchmarks import gpu
from benchmarks.peers import PEERS
from benchmarks.reference import Floor, ReferenceCaptioner, as_pairs, reference_losses
from tinycap import train_distill
from tinycap.evaluation.captioning import load_captioner
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.train_distill import joint_losses


def test_the_published_loop_has_our_losses_and_gradients(pixel_values):
    """Training throughput is compared for the same objective."""
    torch.manual_seed(0)
    model = TinyCapForConditionalGeneration(tiny_config(initializer_range=0.2)).train()
    reference = ReferenceCaptioner(model).train()
    labels = torch.randint(3, 37, (10, 7))
    labels[2, 4:] = labels[7, 2:] = -100
    teacher_embeds = torch.nn.functional.normalize(torch.randn(5, 14), dim=-1)
    batch = {"pixel_values": pixel_values, "labels": labels, "captioned": torch.arange(5)}
    ours = joint_losses(model, model, batch, teacher_embeds)

    def teacher(repeated):
        assert repeated.shape[0] == 10, "runs for every pair"
        return teacher_embeds.repeat_interleave(2, dim=0)

    theirs = reference_losses(reference, teacher, as_pairs(batch), start_token_id=1, pad_token_id=0)
    for name in ("loss", "caption_loss", "distill_loss"):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)
    ours["loss"].backward()
    theirs["loss"].backward()
    torch.testing.assert_close(model.decoder.embed_tokens.weight.grad, reference.tokens.weight.grad)
    torch.testing.assert_close(model.vision_model.projection.weight.grad, reference.projection.weight.grad)


def test_floor_and_reference_generate_the_same_tokens_as_generate(pixel_values):
    model = tiny_model()
    expected = model.generate(pixel_values, max_new_tokens=8, min_new_tokens=8, eos_token_id=36)
    assert torch.equal(Floor(model)(pixel_values, 8), expected)
    assert torch.equal(ReferenceCaptioner(model).eval().generate(pixel_values, 1, 8), expected)


def test_a_batch_of_pairs_repeats_each_image_for_its_captions():
    batch = {"pixel_values": torch.arange(3.0).view(3, 1), "labels": torch.arange(6).view(6, 1)}
    pairs = as_pairs(batch, limit=5)
    assert pairs["pixel_values"].flatten().tolist() == [0, 0, 1, 1, 2]
    assert pairs["labels"].flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "name, millions",
    [("Florence-2", 232), ("SmolVLM", 256), ("BLIP", 224), ("vit-gpt2", 239), ("GIT", 177), ("distilvit", 182)],
)
@pytest.mark.slow
def test_peers_have_their_published_sizes(name, millions):
    peer = next(peer for full_name, peer in PEERS.items() if full_name.startswith(name))
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in peer.model_class(peer.config()).parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.slow
def test_the_gpu_benchmark_measures_each_of_its_parts(repository, tmp_path, monkeypatch, capsys, undrawn_figures):
    """All but compiling, which takes a minute; with a tiny captioner."""
    monkeypatch.setattr(gpu, "load_captioner", lambda name: load_captioner(str(repository)))
    monkeypatch.setattr(gpu, "run_training", lambda argv, launch: train_distill.main(argv))
    parts = ["numerics", "resume", "teacher", "step", "training", "generate"]
    flags = ["--smoke", "--mixed_precision", "no", "--output_dir", str(tmp_path / "out")]
    assert gpu.main([*flags, "--parts", *parts]) == 0
    written = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["parts"].keys() == written.keys() == set(parts)
    numerics, losses = written["numerics"], written["numerics"]["losses"]
    assert numerics["grey_levels_max"] < 2 and losses["cpu"] == losses["device"] != losses["device bf16"]
    assert numerics["same_captions_float32"] == numerics["captions"]
    assert written["resume"]["weights_max_difference"] == 0
    assert 0 <= written["training"]["waiting_share"] < 1
    for part, values in written.items():
        speeds = [value for name, value in values.items() if "per_second" in name]
        assert all(value > 0 for value in speeds) and (speeds or part in ("numerics", "resume"))


def test_a_part_that_fails_is_recorded_and_the_others_are_measured(tmp_path, monkeypatch):
    def fails(setup):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "PARTS", {"broken": fails, "whole": lambda setup: {"photos_per_second": 3.0}})
    setup = {"device": torch.device("cpu"), "precision": "no", "sizes": {}}
    monkeypatch.setattr(gpu, "Setup", lambda args, folder: Namespace(**setup))
    assert gpu.main(["--output_dir", str(tmp_path)]) == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert "no such kernel" in parts["broken"]["error"] and parts["whole"]["photos_per_second"] == 3.0


def test_the_log_of_a_run_gives_its_speed_and_waiting_at_epochs(tmp_path):
    rows = [(1, 1.0, 0.5), (3, 2.0, 0.0), (5, 3.0, 0.2), (7, 5.0, 0.3), (9, 6.0, 0.1)]
    names = ("step", "elapsed_seconds", "waiting_share")
    lines = [json.dumps(dict(zip(names, row))) for row in rows] + [json.dumps({"step": 8, "eval_cider": 1.0})]
    (tmp_path / "log").write_text("\n".join(lines) + "\n")
    # 48 images are five steps of 9.6: the row of step 7 has the start of the second epoch.
    found = gpu.summarize_log(tmp_path / "log", images=48, batch=10)
    assert found["photos_per_second"] == pytest.approx(8 * 9.6 / 5)
    assert found["waiting_share"] == pytest.approx((0.0 + 0.2 + 2 * 0.3 + 0.1) / 5)
    assert found["waiting_at_epochs"] == pytest.approx(0.3)
    later = gpu.summarize_log(tmp_path / "log", images=48, batch=10, skipped_epochs=1)
    assert later["photos_per_second"] == pytest.approx(4 * 9.6 / 3)
    assert later["waiting_share"] == pytest.approx((2 * 0.3 + 0.1) / 3)
