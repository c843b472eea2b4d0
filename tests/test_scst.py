import pytest
import torch
from pycocoevalcap.cider.cider import Cider
from tiny import CAPTIONS, tiny_repository_model

from tinycap.evaluation.caption_metrics.ptb_tokenizer import ptb_tokenize
from tinycap.training.scst import (
    END_WORD,
    CiderReward,
    SelfCriticalObjective,
    TokenDraw,
    labels_of,
    self_critical_advantage,
    self_critical_losses,
)


REFERENCES = [[caption, f"again , {caption}"] for caption in CAPTIONS]
GUESSES = ["a dog runs on grass", "two men", "a child jumps", "A woman with a hat is reading a book on a bench ."]


def test_the_reward_is_pycocoevalcaps_cider_with_the_end_as_a_word():
    rewards = CiderReward(REFERENCES)(GUESSES, REFERENCES, [True] * 4)
    truths = {i: [f"{ptb_tokenize(text)} {END_WORD}" for text in group] for i, group in enumerate(REFERENCES)}
    candidates = {i: [f"{ptb_tokenize(text)} {END_WORD}"] for i, text in enumerate(GUESSES)}
    _, expected = Cider().compute_score(truths, candidates)
    torch.testing.assert_close(rewards, torch.tensor(expected, dtype=torch.float32))
    assert rewards.argmax() == 3


def test_the_reward_of_a_caption_does_not_depend_on_what_is_scored_with_it():
    reward = CiderReward(REFERENCES)
    together = reward(GUESSES, REFERENCES, [True] * 4)
    for index in range(4):
        alone = reward([GUESSES[index]], [REFERENCES[index]], [True])
        torch.testing.assert_close(alone[0], together[index])


def test_a_caption_that_breaks_off_earns_less():
    whole, broken = CiderReward(REFERENCES)([CAPTIONS[0]] * 2, [REFERENCES[0]] * 2, [True, False])
    assert broken < whole


def test_a_sample_is_held_against_the_photos_other_samples():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    expected = torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(self_critical_advantage(rewards), expected)


def test_labels_end_with_the_first_end_token():
    sequences = torch.tensor([[1, 5, 6, 2, 2, 2], [1, 5, 2, 7, 2, 0], [1, 5, 6, 7, 8, 9]])
    expected = [[5, 6, 2, -100, -100], [5, 2, -100, -100, -100], [5, 6, 7, 8, 9]]
    assert labels_of(sequences, eos_token_id=2).tolist() == expected


def test_the_loss_makes_better_samples_likelier_and_worse_ones_less_likely():
    logits = torch.zeros(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[[1, 2, -100], [3, 4, 4]]])
    self_critical_losses(logits, labels, torch.tensor([[2.0, -1.0]]))[0].backward()
    assert logits.grad[0, 0, 1] < 0 and logits.grad[0, 1, 2] < 0, "descent raises them"
    assert logits.grad[1, 0, 3] > 0 and logits.grad[1, 2, 4] > 0
    assert not logits.grad[0, 2].any(), "padding has no say"


def test_the_human_captions_loss_counts_by_its_weight(tokenizer):
    model = tiny_repository_model(tokenizer).eval()
    labels = torch.tensor([[5, 7, 2, -100], [9, 2, -100, -100], [4, 4, 4, 2], [6, 2, -100, -100]])
    batch = {"pixel_values": torch.randn(2, 3, 24, 24), "references": [["one"], ["two"]], "labels": labels}
    found = {}
    for weight in (0.0, 0.25):
        torch.manual_seed(3)
        objective = SelfCriticalObjective(tokenizer, lambda *given: torch.arange(6.0), 3, 5, weight)
        found[weight] = objective(model, model, batch, None)
    assert "cross_entropy" not in found[0.0] and found[0.0]["loss"] == found[0.0]["scst_loss"]
    mixed, expected = found[0.25], model(pixel_values=batch["pixel_values"], labels=labels).caption_loss
    torch.testing.assert_close(mixed["cross_entropy"], expected)
    torch.testing.assert_close(mixed["scst_loss"], found[0.0]["scst_loss"])
    torch.testing.assert_close(mixed["loss"], mixed["scst_loss"] + 0.25 * expected)
    embeds = model.get_image_features(batch["pixel_values"]).pooler_output
    torch.manual_seed(3)
    cached = objective(model, model, {**batch, "pixel_values": None, "image_embeds": embeds}, None)
    torch.testing.assert_close(cached["loss"], mixed["loss"])


@pytest.mark.slow
def test_training_on_a_reward_raises_it(tokenizer):
    """On a model that is small enough to train in seconds."""
    model = tiny_repository_model(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)

    def reward(captions, references, ended):
        assert len(captions) == len(references) == len(ended) == 2 * 12
        return torch.tensor([float("a" in caption) for caption in captions])

    objective = SelfCriticalObjective(tokenizer, reward, num_samples=12, max_new_tokens=4)
    batch = {"pixel_values": torch.randn(2, 3, 24, 24), "references": [["one"], ["two"]]}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    rewards = []
    for _ in range(60):
        losses = objective(model.train(), model, batch, None)
        assert set(losses) == {"loss", "scst_loss", "reward"}
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(losses["reward"].item())
    assert sum(rewards[:5]) < 4 and sum(rewards[-5:]) > 4.5, rewards


def test_tokens_are_drawn_as_often_as_they_are_probable():
    torch.manual_seed(0)
    scores = torch.tensor([[0.0, -torch.inf, 2.0, 1.0, -torch.inf]]).expand(20_000, -1)
    left = TokenDraw()(None, scores)
    assert ((left == 0).sum(dim=1) == 1).all() and (left == -torch.inf).sum() == 4 * 20_000
    shares = (left == 0).float().mean(dim=0)
    torch.testing.assert_close(shares, scores[0].softmax(dim=0), atol=0.01, rtol=0)
    assert shares[1] == shares[4] == 0
