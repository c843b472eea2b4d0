import pytest
import torch
from tiny import CACHE, static_cache, tiny_model
from transformers import GenerationConfig, TextStreamer
from transformers.modeling_outputs import BaseModelOutput


LONG = {"max_new_tokens": 8, "min_new_tokens": 8}
PADDED = {
    "input_ids": torch.tensor([[0, 0, 5], [6, 7, 8]]),
    "attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1]]),
}


def test_greedy_decoding_takes_the_likeliest_token_at_every_step(model, pixel_values):
    sequences = model.generate(pixel_values, **LONG, eos_token_id=None)
    with torch.no_grad():
        logits = model(pixel_values, decoder_input_ids=sequences[:, :-1]).logits
    assert torch.equal(logits.argmax(dim=-1), sequences[:, 1:])
    assert (sequences[:, 0] == 1).all()


@pytest.mark.parametrize("memory", ["embedding", "patches"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_with_a_cache_equals_generation_without(memory, num_beams, pixel_values):
    model = tiny_model(memory=memory)
    cached = model.generate(pixel_values, num_beams=num_beams, **LONG)
    assert torch.equal(cached, model.generate(pixel_values, num_beams=num_beams, use_cache=False, **LONG))


@pytest.mark.parametrize("memory", ["embedding", "patches"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_each_image_of_a_batch_gets_the_caption_it_gets_alone(memory, num_beams, pixel_values):
    model = tiny_model(memory=memory)
    batch = model.generate(pixel_values, num_beams=num_beams, **LONG)
    alone = [model.generate(pixel_values[i : i + 1], num_beams=num_beams, **LONG) for i in range(5)]
    assert torch.equal(batch, torch.cat(alone))


def test_several_sequences_of_an_image_lie_next_to_each_other(model, pixel_values):
    beams = model.generate(pixel_values, num_beams=4, num_return_sequences=2, **LONG)
    assert beams.shape == (10, 9)
    assert torch.equal(beams[::2], model.generate(pixel_values, num_beams=4, **LONG))


def test_sampling_follows_the_seed(model, pixel_values):
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model.generate(pixel_values, do_sample=True, **LONG))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_captions_come_straight_from_an_embedding_of_any_norm(model, pixel_values):
    embeddings = model.get_image_features(pixel_values)
    bare = BaseModelOutput(last_hidden_state=3.7 * embeddings[:, None])
    assert torch.equal(model.generate(encoder_outputs=bare, **LONG), model.generate(pixel_values, **LONG))


def test_encoder_outputs_serve_several_generations(model, pixel_values):
    """GenerationMixin repeats their tensors for the beams in place: that mustn't reach the caller's object."""
    encoded = model.get_encoder()(pixel_values)
    first = model.generate(encoder_outputs=encoded, num_beams=3, **LONG)
    assert encoded.image_embeds.shape == (5, 14) and encoded.last_hidden_state.shape == (5, 10, 12)
    assert torch.equal(model.generate(encoder_outputs=encoded, num_beams=3, **LONG), first)


@static_cache
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("prompt", [{}, PADDED], ids=["no prompt", "padded prompt"])
def test_a_static_cache_gives_the_same_captions(model, pixel_values, implementation, prompt):
    model.set_attn_implementation(implementation)
    expected = model.generate(pixel_values[:2], **prompt, **LONG)
    static = model.generate(pixel_values[:2], cache_implementation="static", **prompt, **LONG)
    assert torch.equal(static, expected)


def test_a_streamer_hears_every_token(model, pixel_values):
    class Recorder(TextStreamer):
        def __init__(self):
            self.heard = []

        def put(self, value):
            self.heard += value.flatten().tolist()

        def end(self):
            pass

    recorder = Recorder()
    sequence = model.generate(pixel_values[:1], streamer=recorder, **LONG)
    assert recorder.heard == sequence[0].tolist()


def test_attentions_of_generation_are_those_of_each_step(model, pixel_values):
    output = model.generate(pixel_values, return_dict_in_generate=True, output_attentions=True, **LONG)
    assert len(output.cross_attentions) == 8
    assert output.cross_attentions[-1][0].shape == (5, 2, 1, 1)
    assert torch.equal(output.sequences, model.generate(pixel_values, **LONG))


def test_captions_end_where_the_position_table_does(model, pixel_values):
    sequences = model.generate(pixel_values, max_new_tokens=500, eos_token_id=None)
    assert sequences.shape[1] == model.config.text_config.max_position_embeddings


def test_generation_goes_on_from_a_cache_it_returned(model, pixel_values):
    lengths = {"max_new_tokens": 4, "eos_token_id": None}
    first = model.generate(pixel_values, return_dict_in_generate=True, **lengths)
    seen = []
    model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    rest = model.generate(pixel_values, decoder_input_ids=first.sequences, **{CACHE: first[CACHE]}, **lengths)
    assert seen == [1, 1, 1, 1]
    assert torch.equal(rest, model.generate(pixel_values, max_new_tokens=8, eos_token_id=None))


def test_drafts_by_another_model_change_no_caption(model, pixel_values):
    assistant = tiny_model()
    with torch.no_grad():
        assistant.decoder.layers[0].mlp.fc2.weight.neg_()
    for image in pixel_values.split(1):
        expected = model.generate(image, max_new_tokens=8, eos_token_id=None)
        drafted = model.generate(image, assistant_model=assistant, max_new_tokens=8, eos_token_id=None)
        assert torch.equal(drafted, expected)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_continued_as_teacher_forcing_would(model, pixel_values):
    whole = model.generate(pixel_values, **LONG, eos_token_id=None)
    continued = [
        model.generate(pixel_values[i : i + 1], input_ids=whole[i : i + 1, :4], max_new_tokens=5, eos_token_id=None)
        for i in range(5)
    ]
    assert torch.equal(torch.cat(continued), whole)


def test_a_prompt_gets_its_start_token_when_it_lacks_one(model, pixel_values):
    prompt = torch.tensor([[5, 9]])
    with_start = model.generate(pixel_values[:1], input_ids=torch.tensor([[1, 5, 9]]), max_new_tokens=4)
    assert torch.equal(model.generate(pixel_values[:1], input_ids=prompt, max_new_tokens=4), with_start)
    assert with_start[0, :3].tolist() == [1, 5, 9]


@pytest.mark.parametrize("pad_token_id", [0, 1])
def test_prompts_of_different_lengths_in_a_batch_end_as_they_do_alone(pixel_values, pad_token_id):
    """Also where pad and start token are the same one, as GPT-2's are."""
    model = tiny_model(pad_token_id=pad_token_id)
    pad = pad_token_id
    ids = torch.tensor([[pad, pad, 5], [6, 7, 8]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    batch = model.generate(pixel_values[:2], input_ids=ids, attention_mask=mask, **LONG)
    first = model.generate(pixel_values[:1], input_ids=torch.tensor([[5]]), **LONG)
    second = model.generate(pixel_values[1:2], input_ids=torch.tensor([[6, 7, 8]]), **LONG)
    assert torch.equal(batch[0, 2:], first[0])
    assert torch.equal(batch[1], second[0])


@pytest.mark.parametrize("ids", [torch.zeros(5, 0, dtype=torch.long), torch.ones(5, 1, dtype=torch.long)])
def test_an_empty_prompt_is_no_prompt(model, pixel_values, ids):
    assert torch.equal(model.generate(pixel_values, input_ids=ids, **LONG), model.generate(pixel_values, **LONG))


def test_a_prompt_that_leaves_no_room_is_an_error(model, pixel_values):
    with pytest.raises(ValueError, match="fewer than 19 tokens, got 21"):
        model.generate(pixel_values, input_ids=torch.full((5, 20), 4))


def test_the_generation_config_decides_when_the_caller_says_nothing(model, pixel_values):
    model.generation_config = GenerationConfig(
        max_new_tokens=3, min_new_tokens=3, num_beams=2, decoder_start_token_id=1, eos_token_id=2, pad_token_id=0
    )
    assert model.generate(pixel_values).shape == (5, 4)
