import os

import pytest
import torch
from tiny import tiny_config, tiny_model

from benchmarks import compare_runs
from benchmarks.peers import PEERS
from benchmarks.reference import Floor, ReferenceCaptioner, as_pairs, reference_losses
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.train_distill import joint_losses
from tinycap.training.logs import write_json


def test_the_published_loop_has_our_losses_and_gradients(pixel_values):
    """Training throughput is compared for the same objective."""
    torch.manual_seed(0)
    model = TinyCapForConditionalGeneration(tiny_config(initializer_range=0.2)).train()
    reference = ReferenceCaptioner(model).train()
    labels = torch.randint(3, 37, (10, 7))
    labels[2, 4:] = labels[7, 2:] = -100
    teacher_embeds = torch.nn.functional.normalize(torch.randn(5, 14), dim=-1)
    batch = {"pixel_values": pixel_values, "labels": labels}
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
def test_peers_have_their_published_sizes(name, millions):
    peer = next(peer for full_name, peer in PEERS.items() if full_name.startswith(name))
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in peer.model_class(peer.config()).parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.01)


def write_run(folder, evaluated=None, cider=5.0, **arguments) -> str:
    folder.mkdir(parents=True)
    write_json(folder / "train_args.json", {"seed": 1, "distill_weight": 1.0, "output_dir": str(folder), **arguments})
    write_json(folder / "eval_results.json", {"cider": cider, "rouge_l": 30.0})
    (folder / "metrics.jsonl").write_text('{"elapsed_seconds": 90}\n')
    if evaluated is not None:
        (folder / "evaluation").mkdir()
        write_json(folder / "evaluation" / "eval_results.json", evaluated)
    return str(folder)


def test_runs_that_differ_by_their_seed_become_one_row(tmp_path, capsys):
    none = write_run(tmp_path / "a", distill_weight=0, cider=9.0)
    pair = [
        write_run(tmp_path / "b", {"cider": 7.0, "fidelity": {"recall_at_5": 2.0}}, seed=1),
        write_run(tmp_path / "c", {"cider": 8.0, "fidelity": {"recall_at_5": 3.0}}, seed=2),
    ]
    out = str(tmp_path / "out")
    runs = ["--runs", f"none={none}", f"weight = 1={','.join(pair)}"]
    compare_runs.main([*runs, "--plot_over", "distill_weight", "--output_dir", out])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| recipe | seeds | CIDEr | ROUGE-L | R@5 | minutes |"
    assert table[2:] == [
        "| none | 1 | 9.0 | 30.0 | - | 1.5 |",
        "| weight = 1 | 2 | 7.5 ± 0.5 | 30.0 ± 0.0 | 2.5 ± 0.5 | 1.5 ± 0.0 |",
    ]
    assert {"compare_runs.json", "compare_runs.md", "compare_runs.png"} == set(os.listdir(out))


def test_runs_of_one_row_that_differ_by_a_flag_are_an_error(tmp_path):
    pair = f"{write_run(tmp_path / 'a')},{write_run(tmp_path / 'b', seed=2, dropout=0.2)}"
    with pytest.raises(ValueError, match=r"same: .*differ by their seed, they do by \['dropout'\]"):
        compare_runs.main(["--runs", f"same={pair}"])
    with pytest.raises(ValueError, match="train_args.json: no such file"):
        compare_runs.main(["--runs", f"none={tmp_path / 'none'}"])
    with pytest.raises(ValueError, match="--plot_over: expected a flag with numbers, warmth"):
        compare_runs.main(["--runs", f"one={tmp_path / 'a'}", "--plot_over", "warmth"])
