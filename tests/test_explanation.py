import pytest
import torch
from tiny import ONE_LAYER, tiny_model

from tinycap.evaluation.explanation import saliency, token_probabilities


TOKENS = [[5, 9, 2], [7, 2], [4, 4, 4, 4, 2], [30, 2], [11, 12, 13]]


def log_probabilities(model, pixel_values) -> torch.Tensor:
    """By one forward pass for each caption, without padding and without the code under test."""
    found = []
    for pixels, tokens in zip(pixel_values, TOKENS):
        with torch.no_grad():
            logits = model(pixels[None], decoder_input_ids=torch.tensor([[1, *tokens[:-1]]])).logits[0]
        found.append(logits.log_softmax(dim=-1)[range(len(tokens)), tokens].sum())
    return torch.stack(found)


def generated_tokens(model, pixel_values, **options) -> list[list[int]]:
    """Greedy captions without the start token and padding, with the end token if there is one."""
    rows = model.generate(pixel_values, num_beams=1, **options)[:, 1:].tolist()
    end = model.generation_config.eos_token_id
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


@pytest.mark.parametrize("memory", ["embedding", "patches"])
def test_token_probabilities_are_the_decoders(pixel_values, memory):
    model = tiny_model(memory=memory)
    found = token_probabilities(model, pixel_values, TOKENS)
    assert [[token for token, _, _ in caption] for caption in found] == TOKENS
    sums = torch.tensor([sum(torch.tensor(probability).log() for _, probability, _ in caption) for caption in found])
    torch.testing.assert_close(sums, log_probabilities(model, pixel_values), rtol=1e-4, atol=1e-4)
    for caption in found:
        for token, probability, alternatives in caption:
            shares = [share for _, share in alternatives]
            assert shares == sorted(shares, reverse=True) and probability <= shares[0] + 1e-6
            assert all(share != probability or other == token for other, share in alternatives)


def test_the_likeliest_alternative_is_what_greedy_decoding_takes(model, pixel_values):
    tokens = generated_tokens(model, pixel_values, max_new_tokens=6)
    assert len({len(caption) for caption in tokens}) > 1 or len(tokens[0]) == 6
    for caption in token_probabilities(model, pixel_values, tokens):
        assert [alternatives[0][0] for _, _, alternatives in caption] == [token for token, _, _ in caption]


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["embedding", "patches"])
def test_a_map_sums_to_what_the_image_adds_to_the_log_probability(pixel_values, memory):
    model = tiny_model(memory=memory)
    maps = saliency(model, pixel_values, TOKENS, steps=100)
    assert maps.shape == (5, 3, 3)
    raised = log_probabilities(model, pixel_values) - log_probabilities(model, torch.zeros_like(pixel_values))
    assert raised.abs().min() > 0.01
    torch.testing.assert_close(maps.sum(dim=(1, 2)), raised, rtol=0.02, atol=0.01)


def test_a_map_is_the_same_in_chunks_and_leaves_no_gradient(model, pixel_values, monkeypatch):
    whole = saliency(model, pixel_values, TOKENS)
    monkeypatch.setattr("tinycap.evaluation.explanation.CHUNK", 2)
    torch.testing.assert_close(saliency(model, pixel_values, TOKENS), whole, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def pictures_with_a_spot(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Grey noise with a patch of one of two colours at a random place, or (2) without: images, places and colours."""
    generator = torch.Generator().manual_seed(seed)
    pixels = 0.5 * torch.randn(num, 3, 24, 24, generator=generator)
    place = torch.randint(9, (num,), generator=generator)
    color = torch.randint(3, (num,), generator=generator)
    for index in range(num):
        row, column = divmod(place[index].item(), 3)
        value = torch.tensor([[1.5, -1.5, 0.0], [-1.5, 1.5, 0.0], [0.0, 0.0, 0.0]][color[index]])
        pixels[index, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += value[:, None, None]
    return pixels, place, color


@pytest.mark.slow
def test_saliency_peaks_where_the_information_is():
    """A model learns to name the colour of a patch at a random place, or its absence: its maps must peak there."""
    model = tiny_model(**ONE_LAYER).train()
    words = torch.tensor([[10, 2], [20, 2], [30, 2]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(100):
        pixels, _, color = pictures_with_a_spot(32, seed=step)
        loss = model(pixels, labels=words[color]).caption_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    pixels, place, color = pictures_with_a_spot(60, seed=999)
    tokens = generated_tokens(model, pixels, max_new_tokens=2)
    spots = [index for index in range(60) if color[index] < 2]
    right = [index for index in spots if tokens[index][0] == words[color[index], 0]]
    assert len(right) > 0.9 * len(spots) > 30, "it has learnt to tell the colours apart"
    maps = saliency(model, pixels[right], [tokens[index] for index in right])
    hits = maps.flatten(1).argmax(dim=1) == place[right]
    assert hits.float().mean().item() > 0.8, f"{hits.float().mean():.2f}, where chance is 0.11"
