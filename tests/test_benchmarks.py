import pytest
import torch
from tiny import tiny_config, tiny_model

from benchmarks.peers import PEERS
from benchmarks.reference import Floor, ReferenceCaptioner, as_pairs, reference_losses
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
