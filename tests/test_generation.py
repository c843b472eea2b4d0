import copy

import accelerate
import pytest
import torch
import torch.nn.functional as F
from tiny import CACHE, ONE_LAYER, static_cache, tiny_model
from torch import nn
from transformers import GenerationConfig, TextStreamer, generation
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
    embeddings = model.get_image_features(pixel_values).pooler_output
    bare = BaseModelOutput(last_hidden_state=3.7 * embeddings[:, None])
    assert torch.equal(model.generate(encoder_outputs=bare, **LONG), model.generate(pixel_values, **LONG))


def test_encoder_outputs_serve_several_generations(model, pixel_values):
    """GenerationMixin repeats their tensors for the beams in place; the caller's object must stay unchanged."""
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
    # transformers keeps the cache for the next call.
    again = model.generate(
        pixel_values[:2], cache_implementation="static", return_dict_in_generate=True, **prompt, **LONG
    )
    assert torch.equal(again.sequences, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_a_replaced_forward_is_used_for_every_token(model, pixel_values, options):
    """Like `model.forward = torch.compile(model.forward)`."""
    expected = model.generate(pixel_values, **LONG)
    steps, forward = [], model.forward

    def counted(*args, **kwargs):
        steps.append(1)
        return forward(*args, **kwargs)

    model.forward = counted
    captions = model.generate(pixel_values, **LONG, **options)
    assert len(steps) == 8 and (options or torch.equal(captions, expected))


@pytest.mark.slow
def test_a_compiled_forward_is_used_by_greedy_search(pixel_values):
    model = tiny_model(**ONE_LAYER)
    expected, graphs = model.generate(pixel_values, **LONG), []

    def backend(graph, inputs):
        def counted(*args):
            graphs.append(1)
            return graph(*args)

        return counted

    model.forward = torch.compile(model.forward, backend=backend, dynamic=True)
    assert torch.equal(model.generate(pixel_values, **LONG), expected)
    assert len(graphs) >= 8


def test_hooks_on_model_and_layers_hear_every_step(model, pixel_values):
    heard = []
    for module in (model, model.decoder, model.decoder.layers[1].self_attn, model.decoder.layers[1].mlp.fc2):
        module.register_forward_hook(lambda *args: heard.append(1))
    model.generate(pixel_values, **LONG)
    assert len(heard) == 4 * 8


def test_adapters_in_place_of_projections_stay_in_force(model, pixel_values):
    plain = model.generate(pixel_values, **LONG)

    class Adapter(nn.Module):
        def __init__(self, base, scale):
            super().__init__()
            self.base, self.scale = base, scale

        def forward(self, states):
            return self.scale * self.base(states)

    for scale, same in ((1.0, True), (-3.0, False)):
        adapted = tiny_model()
        for layer in adapted.decoder.layers:
            layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj, scale)
            layer.mlp.fc2 = Adapter(layer.mlp.fc2, scale)
        assert torch.equal(adapted.generate(pixel_values, **LONG), plain) == same


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_weights_give_the_same_captions(model, pixel_values, offload, tmp_path):
    expected = model.generate(pixel_values, **LONG)
    if offload == "cpu":
        accelerate.cpu_offload(model, "cpu")
    else:
        accelerate.disk_offload(model, tmp_path, "cpu")
    assert model.decoder.layers[0].mlp.fc1.weight.is_meta
    assert torch.equal(model.generate(pixel_values, **LONG), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_half_precision_generates(model, pixel_values, dtype, num_beams):
    assert model.to(dtype).generate(pixel_values, num_beams=num_beams, **LONG).shape == (5, 9)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_what_is_generated_can_be_trained_on(model, pixel_values, num_beams):
    """Tensors of inference mode couldn't be."""
    plain = model.generate(pixel_values, num_beams=num_beams, **LONG)
    output = model.generate(pixel_values, num_beams=num_beams, **LONG, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(plain, output.sequences)
    for tokens in (plain, output.sequences):
        tokens[:, -1] = 4
        model(pixel_values, decoder_input_ids=tokens).logits.sum().backward()
    assert not output.logits[0].is_inference() and not output[CACHE].self_attention_cache.layers[0].keys.is_inference()


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


@pytest.mark.parametrize("options", [{"max_length": 500}, {"generation_config": GenerationConfig(max_length=500)}])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_longer_lengths_than_the_table_are_cut(model, pixel_values, options, num_beams):
    config = copy.deepcopy(options)
    sequences = model.generate(pixel_values, **config, num_beams=num_beams, eos_token_id=None)
    assert sequences.shape[1] == model.config.text_config.max_position_embeddings
    assert config == options, "the caller's config stays as it is"


@pytest.mark.parametrize(
    "options, length",
    [
        ({}, 1 + 9),
        ({"max_length": 5}, 5),
        ({"max_new_tokens": 3}, 1 + 3),
        ({"max_length": 5, "max_new_tokens": 7}, 1 + 7),
        ({"generation_config": GenerationConfig(max_length=5)}, 5),
        ({"generation_config": GenerationConfig(max_new_tokens=3)}, 1 + 3),
        ({"generation_config": GenerationConfig(max_new_tokens=3), "max_length": 6}, 6),
        ({"generation_config": GenerationConfig(num_beams=2)}, 1 + 9),
        ({"input_ids": torch.full((5, 3), 4), "max_length": 6}, 6),
        ({"input_ids": torch.full((5, 3), 4), "max_new_tokens": 2}, 4 + 2),
    ],
)
def test_the_callers_length_comes_before_the_models(model, pixel_values, options, length, monkeypatch):
    model.generation_config.max_new_tokens, model.generation_config.eos_token_id = 9, None
    warned = []
    monkeypatch.setattr(generation.utils.logger, "warning", warned.append)
    assert model.generate(pixel_values, **options).shape == (5, length)
    assert not warned


@pytest.mark.parametrize("options", [{"max_length": 1}, {"max_new_tokens": 0}], ids=str)
def test_a_length_without_room_for_a_token_is_an_error(model, pixel_values, options):
    with pytest.raises(ValueError, match="max_length: expected more than 1 |max_new_tokens: .* of at least 1, got 0"):
        model.generate(pixel_values, **options)


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
    """Also with the same pad and start token, as in GPT-2."""
    model = tiny_model(pad_token_id=pad_token_id)
    pad = pad_token_id
    ids = torch.tensor([[pad, pad, 5], [6, 7, 8]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    batch = model.generate(pixel_values[:2], input_ids=ids, attention_mask=mask, **LONG)
    first = model.generate(pixel_values[:1], input_ids=torch.tensor([[5]]), **LONG)
    second = model.generate(pixel_values[1:2], input_ids=torch.tensor([[6, 7, 8]]), **LONG)
    assert torch.equal(batch[0, 2:], first[0])
    assert torch.equal(batch[1], second[0])


@pytest.mark.parametrize("has_start", [True, False])
@pytest.mark.parametrize("padding", [1, 2, 13])
def test_padding_of_every_row_changes_nothing(model, pixel_values, padding, has_start):
    """As by `pad_to_multiple_of` and `padding="max_length"`, even if the padding fills all positions."""
    prompts = torch.tensor([[0, 1, 5], [1, 6, 7]] if has_start else [[0, 5], [6, 7]])
    mask = (prompts > 0).long()
    expected = model.generate(pixel_values[:2], input_ids=prompts, attention_mask=mask, **LONG)
    padded = {"input_ids": F.pad(prompts, (padding, 0)), "attention_mask": F.pad(mask, (padding, 0))}
    assert torch.equal(model.generate(pixel_values[:2], **padded, **LONG), expected)
    assert (expected == 1).sum(dim=1).tolist() == [1, 1]


@pytest.mark.parametrize("arguments", [{}, {"input_ids": torch.ones(1, 1, dtype=torch.long)}], ids=["none", "text"])
def test_text_without_images_is_an_error(model, arguments):
    with pytest.raises(ValueError, match="pixel_values: expected images, got none"):
        model.generate(**arguments)


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
