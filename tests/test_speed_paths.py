"""What is there only for speed says what the plain way says. Speed itself is measured in `benchmarks/`."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import CACHE, static_cache, tiny_model
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from benchmarks.floor import Floor
from tinycap import modeling_tinycap
from tinycap.modeling_tinycap import TinyCapDecoder, TinyCapForConditionalGeneration


# transformers 4 tells every step where in the cache it is: it takes whole ones.
lean_steps = pytest.mark.skipif(transformers.__version__ < "5", reason="lean steps are taken from transformers 5 on")

LONG = {"max_new_tokens": 8, "min_new_tokens": 8}


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """Grows by one with every lean step."""
    taken, next_token = [], TinyCapDecoder.next_token

    def counted(self, input_ids, cache):
        taken.append(input_ids.shape[0])
        return next_token(self, input_ids, cache)

    monkeypatch.setattr(TinyCapDecoder, "next_token", counted)
    return taken


@lean_steps
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_a_lean_step_gives_the_logits_of_a_whole_one(model, pixel_values, steps, monkeypatch, options):
    asked = {"output_logits": True, "return_dict_in_generate": True, **LONG, **options}
    lean = model.generate(pixel_values, **asked)
    assert len(steps) == 7, "all but the first"
    monkeypatch.setattr(TinyCapDecoder, "serves_next_token", lambda *args: False)
    whole = model.generate(pixel_values, **asked)
    assert len(steps) == 7 and torch.equal(lean.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(lean.logits), torch.stack(whole.logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"output_attentions": True, "return_dict_in_generate": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"input_ids": torch.tensor([[5, 6]] * 5)},
        {"use_cache": False},
        pytest.param({"cache_implementation": "static"}, marks=static_cache),
    ],
    ids=str,
)
def test_what_a_lean_step_cannot_give_takes_whole_ones(model, pixel_values, steps, options):
    model.generate(pixel_values, **LONG, **options)
    assert not steps


def test_memory_of_patches_and_eager_attention_take_whole_steps(pixel_values, steps):
    tiny_model(memory="patches").generate(pixel_values, **LONG)
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    eager.generate(pixel_values, **LONG)
    assert not steps


def test_hooks_on_layers_hear_every_step(model, pixel_values, steps):
    heard = []
    model.decoder.layers[1].self_attn.register_forward_hook(lambda *args: heard.append(1))
    model.generate(pixel_values, **LONG)
    assert len(heard) == 8 and not steps


@lean_steps
def test_projections_that_were_replaced_stay_in_force(model, pixel_values, steps):
    """As adapters and quantisers do it."""
    expected = model.generate(pixel_values, **LONG)
    for layer in model.decoder.layers:
        layer.self_attn.v_proj = nn.Sequential(layer.self_attn.v_proj, nn.Identity())
        layer.mlp = nn.Sequential(layer.mlp)
    assert torch.equal(model.generate(pixel_values, **LONG), expected) and steps


def test_the_position_table_ends_for_lean_steps_too(model, pixel_values):
    with torch.no_grad():
        ids = torch.full((5, 18), 4)
        output = model(pixel_values, decoder_input_ids=ids, use_cache=True)
        encoded = model.get_encoder()(pixel_values)
        step = {"decoder_input_ids": ids[:, :1], "encoder_outputs": encoded, "use_cache": True, "return_dict": True}
        model(**step, **{CACHE: output[CACHE]})
        with pytest.raises(ValueError, match="at most 19 tokens"):
            model(**step, **{CACHE: output[CACHE]})


# --- greedy search ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_searches(monkeypatch) -> list[int]:
    """Grows by one with every search that runs as its arithmetic alone."""
    taken, search = [], modeling_tinycap.greedy_search

    def counted(steps, input_ids, *args):
        taken.append(input_ids.shape[0])
        return search(steps, input_ids, *args)

    monkeypatch.setattr(modeling_tinycap, "greedy_search", counted)
    return taken


def by_generation_mixin(model, *args, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TinyCapForConditionalGeneration, "_is_plain_greedy", lambda *args: False)
        return model.generate(*args, **kwargs)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 18},
        LONG,
        {"max_new_tokens": 1},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "max_new_tokens": 12},
        {"bad_words_ids": [[5], [20]], "max_new_tokens": 12},
        {"eos_token_id": None, "max_new_tokens": 12},
    ],
    ids=str,
)
def test_a_plain_greedy_search_says_what_generation_mixin_says(model, pixel_values, plain_searches, options):
    found = model.generate(pixel_values, **options)
    assert plain_searches == [5]
    assert torch.equal(found, by_generation_mixin(model, pixel_values, **options)) and plain_searches == [5]


def test_rows_of_a_greedy_search_end_by_themselves(model, pixel_values, plain_searches):
    whole = model.generate(pixel_values, max_new_tokens=18, eos_token_id=None)
    # A token that some rows say earlier than others.
    said = [[row.index(token) for row in whole[:, 1:].tolist() if token in row] for token in range(37)]
    ends = {"eos_token_id": max(range(37), key=lambda token: len(set(said[token]))), "max_new_tokens": 18}
    assert len(set(said[ends["eos_token_id"]])) > 1
    found = model.generate(pixel_values, **ends)
    assert torch.equal(found, by_generation_mixin(model, pixel_values, **ends))
    assert len(plain_searches) == 2


def test_a_greedy_search_in_half_precision_is_the_same(model, pixel_values, plain_searches):
    model, pixel_values = model.to(torch.bfloat16), pixel_values.to(torch.bfloat16)
    found = model.generate(pixel_values, **LONG)
    assert torch.equal(found, by_generation_mixin(model, pixel_values, **LONG)) and plain_searches


def test_a_greedy_search_leaves_the_cache_that_generation_mixin_leaves(model, pixel_values, plain_searches):
    mine, its = (EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2))
    model.generate(pixel_values, **{CACHE: mine}, **LONG)
    by_generation_mixin(model, pixel_values, **{CACHE: its}, **LONG)
    assert mine.get_seq_length() == its.get_seq_length() == 8 and mine.is_updated == its.is_updated
    for ours, other in zip(
        (mine.self_attention_cache, mine.cross_attention_cache), (its.self_attention_cache, its.cross_attention_cache)
    ):
        for layer, expected in zip(ours.layers, other.layers):
            torch.testing.assert_close(layer.keys, expected.keys, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(layer.values, expected.values, atol=1e-6, rtol=1e-5)
    assert plain_searches == [5]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"num_beams": 2},
        {"return_dict_in_generate": True},
        {"use_cache": False},
        {"input_ids": torch.tensor([[5, 6]] * 5)},
        {"max_time": 100.0},
        pytest.param({"cache_implementation": "static"}, marks=static_cache),
    ],
    ids=str,
)
def test_everything_but_a_plain_greedy_search_is_generation_mixins(model, pixel_values, plain_searches, options):
    model.generate(pixel_values, **{"max_new_tokens": 4, **options})
    assert not plain_searches


def test_decoders_that_arithmetic_does_not_stand_for_are_called(model, pixel_values, plain_searches):
    expected = model.generate(pixel_values, **LONG)
    assert len(plain_searches) == 1
    tiny_model(memory="patches").generate(pixel_values, **LONG)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(pixel_values, **LONG)
    head = model.lm_head
    model.lm_head = nn.Sequential(head)
    assert torch.equal(model.generate(pixel_values, **LONG), expected)
    model.lm_head = head
    layer = model.decoder.layers[1]
    layer.mlp.fc2 = nn.Sequential(layer.mlp.fc2)
    assert torch.equal(model.generate(pixel_values, **LONG), expected)
    layer.mlp.fc2 = layer.mlp.fc2[0]
    heard = []
    handle = layer.mlp.fc2.register_forward_hook(lambda *args: heard.append(1))
    model.generate(pixel_values, **LONG)
    assert len(heard) == 8
    handle.remove()
    model.train()
    model.generate(pixel_values, **LONG)
    assert len(plain_searches) == 1, "none of them"
    model.eval().generate(pixel_values, **LONG)
    assert len(plain_searches) == 2


def test_a_streamer_and_hooks_on_the_model_hear_every_step_of_a_greedy_search(model, pixel_values, plain_searches):
    class Heard(list):
        def put(self, value):
            self.append(value)

        def end(self):
            self.append("end")

    streamer, steps = Heard(), []
    model.generate(pixel_values[:1], streamer=streamer, **LONG)
    assert len(streamer) == 1 + 8 + 1 and streamer[-1] == "end", "the start token, each token, the end"
    model.register_forward_hook(lambda *args: steps.append(1))
    model.generate(pixel_values, **LONG)
    assert len(steps) == 8 and not plain_searches


def test_a_transposed_head_is_the_same_head(model, pixel_values, tmp_path):
    labels = torch.randint(3, 37, (5, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(pixel_values, labels=labels)
        assert model.store_head_transposed() is model
        found = model(pixel_values, labels=labels)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    weight = model.lm_head.weight
    assert weight.t().is_contiguous() and weight.shape == (37, 16)
    assert weight is model.decoder.embed_tokens.weight, "still tied, and no copy"
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["decoder.embed_tokens.weight"].is_contiguous()
    again = TinyCapForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, weight) and weight is model.decoder.embed_tokens.weight


def test_the_floor_of_the_benchmark_says_what_generate_says(pixel_values):
    model = tiny_model()
    expected = model.generate(pixel_values, **LONG, eos_token_id=36)
    for transpose_head in (True, False):
        assert torch.equal(Floor(model, transpose_head)(pixel_values, 8), expected)
