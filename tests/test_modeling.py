import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tiny import CACHE, ONE_LAYER, VISION, static_cache, tiny_config, tiny_model
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, Seq2SeqLMOutput
from transformers.modeling_utils import PreTrainedModel

from benchmarks.reference import copy_attention
from tinycap import modeling_tinycap
from tinycap.configuration_tinycap import TinyCapVisionConfig
from tinycap.modeling_tinycap import (
    TinyCapForConditionalGeneration,
    TinyCapVisionModel,
    position_table,
    shift_tokens_right,
)


def logits_of(model, pixel_values, decoder_input_ids, **kwargs):
    with torch.no_grad():
        return model(pixel_values=pixel_values, decoder_input_ids=decoder_input_ids, **kwargs).logits


@pytest.fixture
def tokens(labels):
    return labels.clamp(min=3)


# --- the student ------------------------------------------------------------------------------------------------------


def test_image_embeds_have_unit_norm_and_the_teachers_width(model, pixel_values):
    output = model.vision_model(pixel_values)
    assert output.image_embeds.shape == (5, 14)
    assert output.last_hidden_state.shape == (5, 1 + 9, 12)
    torch.testing.assert_close(output.image_embeds.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(model.get_image_features(pixel_values).pooler_output, output.image_embeds)


def test_image_features_have_the_interface_of_clips(model, pixel_values):
    output = model.get_image_features(pixel_values=pixel_values, output_hidden_states=True, output_attentions=True)
    assert isinstance(output, BaseModelOutputWithPooling)
    assert output.pooler_output.shape == (5, 14) and output.pooler_output is output.image_embeds
    torch.testing.assert_close(output.pooler_output.norm(dim=-1), torch.ones(5))
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    as_tuple = model.get_image_features(pixel_values, return_dict=False)
    assert isinstance(as_tuple, tuple)
    inputs = {"pixel_values": pixel_values, "input_ids": torch.ones(5, 1), "attention_mask": torch.ones(5, 1)}
    torch.testing.assert_close(model.get_image_features(**inputs).pooler_output, output.pooler_output)
    torch.testing.assert_close(as_tuple[1], output.pooler_output)


def test_image_features_are_a_tuple_as_the_captioners_config_says(model, pixel_values):
    model.config.return_dict = False
    assert isinstance(model.get_image_features(pixel_values), tuple)
    assert isinstance(model.get_image_features(pixel_values, return_dict=True), BaseModelOutputWithPooling)


def test_image_features_of_any_norm_are_encoder_outputs(model, pixel_values, tokens):
    features = model.get_image_features(pixel_values)
    expected = logits_of(model, pixel_values, tokens)
    scaled = BaseModelOutputWithPooling(torch.randn(5, 3, 9), 3.7 * features.pooler_output)
    for given in (features, features.to_tuple(), scaled):
        torch.testing.assert_close(logits_of(model, None, tokens, encoder_outputs=given), expected, atol=1e-5, rtol=0)


def test_the_student_equals_an_assembly_of_torchs_own_encoder_layers(model, pixel_values):
    student, config = model.vision_model, model.config.vision_config
    layers = []
    for layer in student.layers:
        theirs = nn.TransformerEncoderLayer(
            12, 3, 20, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        copy_attention(layer.self_attn, theirs.self_attn)
        copy_linear({layer.mlp.fc1: theirs.linear1, layer.mlp.fc2: theirs.linear2})
        copy_linear({layer.layer_norm1: theirs.norm1, layer.layer_norm2: theirs.norm2})
        layers.append(theirs.eval())
    with torch.no_grad():
        patches = F.unfold(pixel_values, config.patch_size, stride=config.patch_size).transpose(1, 2)
        kernel = student.embeddings.patch_embedding
        patches = patches @ kernel.weight.flatten(1).t() + kernel.bias
        states = torch.cat([student.embeddings.cls_token.expand(5, -1, -1), patches], dim=1)
        states = states + student.embeddings.position_embeddings
        for layer in layers:
            states = layer(states)
        states = student.final_layer_norm(states)
        embeds = student.projection(states[:, 0])
        output = student(pixel_values)
    torch.testing.assert_close(output.last_hidden_state, states, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.image_embeds, embeds / embeds.norm(dim=-1, keepdim=True), atol=1e-4, rtol=0)


def test_another_image_size_needs_interpolated_positions(model):
    larger = torch.randn(2, 3, 32, 40)
    with pytest.raises(ValueError, match="expected 24x24 pixels, got 32x40"):
        model.get_image_features(larger)
    assert model.vision_model(larger, interpolate_pos_encoding=True).last_hidden_state.shape == (2, 1 + 4 * 5, 12)


def test_positions_interpolated_to_their_own_size_are_the_table(model, pixel_values):
    plain = model.get_image_features(pixel_values).pooler_output
    torch.testing.assert_close(
        model.get_image_features(pixel_values, interpolate_pos_encoding=True).pooler_output, plain
    )


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 1, 24, 24), (2, 3, 24, 16)])
def test_pixel_values_of_another_shape_are_an_error_that_names_it(model, shape):
    with pytest.raises(ValueError, match="pixel_values: expected .*24|pixel_values: expected .*3, height"):
        model.get_image_features(torch.zeros(shape))


def test_patch_dropout_shortens_sequences_in_training_only(pixel_values):
    model = tiny_model(vision_config={"patch_dropout": 0.5})
    assert model.vision_model.train()(pixel_values).last_hidden_state.shape == (5, 1 + 4, 12)
    whole = model.vision_model.eval()(pixel_values)
    assert whole.last_hidden_state.shape == (5, 1 + 9, 12)


# --- the decoder ------------------------------------------------------------------------------------------------------


def copy_linear(pairs: dict) -> None:
    for ours, theirs in pairs.items():
        theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("memory", ["embedding", "patches"])
def test_the_decoder_equals_an_assembly_of_torchs_own_decoder_layers(memory, pixel_values, tokens):
    model = tiny_model(memory=memory)
    decoder = model.decoder
    with torch.no_grad():
        encoded = model.vision_model(pixel_values)
        if memory == "embedding":
            states = encoded.image_embeds[:, None] * 14**0.5
        else:
            states = encoded.last_hidden_state
        memory_states = decoder.memory_projection(states)
        states = decoder.embed_tokens(tokens) + decoder.embed_positions.weight[:7]
        for layer in decoder.layers:
            theirs = nn.TransformerDecoderLayer(
                16, 2, 28, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            ).eval()
            copy_attention(layer.self_attn, theirs.self_attn)
            copy_attention(layer.cross_attn, theirs.multihead_attn)
            copy_linear({layer.mlp.fc1: theirs.linear1, layer.mlp.fc2: theirs.linear2})
            norms = {layer.layer_norm1: theirs.norm1, layer.layer_norm2: theirs.norm2, layer.layer_norm3: theirs.norm3}
            copy_linear(norms)
            mask = nn.Transformer.generate_square_subsequent_mask(7)
            states = theirs(states, memory_states, tgt_mask=mask, tgt_is_causal=True)
        expected = decoder.final_layer_norm(states) @ decoder.embed_tokens.weight.t()
    torch.testing.assert_close(logits_of(model, pixel_values, tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_later_token_never_changes_an_earlier_logit(model, pixel_values, tokens, implementation):
    model.set_attn_implementation(implementation)
    before = logits_of(model, pixel_values, tokens)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 37
    after = logits_of(model, pixel_values, changed)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:], atol=1e-3)


def test_the_attention_of_all_parts_can_be_changed_after_loading(model):
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        parts = (model, model.vision_model, model.decoder, model.decoder.layers[0].self_attn)
        assert [part.config._attn_implementation for part in parts] == [implementation] * 4


@pytest.mark.parametrize("memory", ["embedding", "patches"])
def test_eager_attention_equals_sdpa(memory, pixel_values, tokens):
    model = tiny_model(memory=memory)
    model.set_attn_implementation("sdpa")
    sdpa = logits_of(model, pixel_values, tokens)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(model, pixel_values, tokens), sdpa, atol=1e-5, rtol=0)


@pytest.mark.parametrize("memory", ["embedding", "patches"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cached_decoding_equals_uncached(memory, implementation, pixel_values, tokens):
    model = tiny_model(memory=memory)
    model.set_attn_implementation(implementation)
    whole = logits_of(model, pixel_values, tokens)
    cache, pieces = None, []
    with torch.no_grad():
        encoded = model.vision_model(pixel_values)
        for piece in (tokens[:, :1], tokens[:, 1:2], tokens[:, 2:5], tokens[:, 5:]):
            output = model(encoder_outputs=encoded, decoder_input_ids=piece, cache=cache, use_cache=True)
            cache = output[CACHE]
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=0)


@static_cache
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_empty_slots_of_a_static_cache_are_not_looked_at(model, pixel_values, tokens, implementation):
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    for given in (None, mask):
        cache = EncoderDecoderCache(StaticCache(config=model.config.text_config, max_cache_len=12), DynamicCache())
        pieces = [
            logits_of(
                model,
                pixel_values,
                tokens[:, start:end],
                decoder_attention_mask=None if given is None else given[:, :end],
                cache=cache,
            )
            for start, end in ((0, 3), (3, 4), (4, 7))
        ]
        whole = logits_of(model, pixel_values, tokens, decoder_attention_mask=given)
        torch.testing.assert_close(torch.cat(pieces, dim=1)[mask == 1], whole[mask == 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_taken_under_the_name_of_either_transformers(model, pixel_values, tokens, name):
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    whole = logits_of(model, pixel_values, tokens)
    logits_of(model, pixel_values, tokens[:, :4], **{name: cache})
    assert cache.get_seq_length() == 4
    torch.testing.assert_close(logits_of(model, pixel_values, tokens[:, 4:], **{name: cache}), whole[:, 4:])


@pytest.mark.parametrize("memory", ["embedding", "patches"])
def test_a_batch_equals_its_members_one_by_one(memory, pixel_values, tokens):
    model = tiny_model(memory=memory)
    batch = logits_of(model, pixel_values, tokens)
    alone = [logits_of(model, pixel_values[i : i + 1], tokens[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), batch, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_a_batch_changes_nothing(model, pixel_values, tokens, side, implementation):
    model.set_attn_implementation(implementation)
    plain = logits_of(model, pixel_values, tokens)
    pads = (3, 0) if side == "left" else (0, 3)
    mask = F.pad(torch.ones_like(tokens), pads)
    padded = logits_of(model, pixel_values, F.pad(tokens, pads), decoder_attention_mask=mask)
    real = padded[:, 3:] if side == "left" else padded[:, :7]
    torch.testing.assert_close(real, plain, atol=1e-5, rtol=0)


def test_padding_stays_without_effect_in_cached_steps(model, pixel_values, tokens):
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    with torch.no_grad():
        encoded = model.vision_model(pixel_values)
        first = model(
            encoder_outputs=encoded, decoder_input_ids=tokens[:, :5], decoder_attention_mask=mask[:, :5], use_cache=True
        )
        second = model(
            encoder_outputs=encoded,
            decoder_input_ids=tokens[:, 5:],
            decoder_attention_mask=mask,
            cache=first[CACHE],
        )
    alone = logits_of(model, pixel_values[1:2], tokens[1:2, 3:])
    torch.testing.assert_close(second.logits[1:2], alone[:, 2:], atol=1e-5, rtol=0)


# --- one memory token -------------------------------------------------------------------------------------------------


def test_the_one_token_shortcut_equals_full_cross_attention(model, pixel_values, tokens):
    shortcut = logits_of(model, pixel_values, tokens)
    full = model(pixel_values=pixel_values, decoder_input_ids=tokens, use_cache=False).logits
    assert full.requires_grad, "with gradients the general path is taken"
    torch.testing.assert_close(shortcut, full, atol=1e-5, rtol=0)


def test_the_shortcut_asks_neither_queries_nor_keys(model, pixel_values, tokens):
    before = logits_of(model, pixel_values, tokens)
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.cross_attn.q_proj.weight.fill_(float("nan"))
            layer.cross_attn.k_proj.weight.fill_(float("nan"))
    torch.testing.assert_close(logits_of(model, pixel_values, tokens), before, atol=0, rtol=0)


def test_the_constant_is_computed_once_per_image_and_layer(model, pixel_values, tokens):
    calls = []
    for layer in model.decoder.layers:
        layer.cross_attn.v_proj.register_forward_hook(lambda *_: calls.append(1))
    model.generate(pixel_values, max_new_tokens=6, min_new_tokens=6)
    assert len(calls) == len(model.decoder.layers)


def test_a_cache_filled_with_gradients_serves_a_step_without_them(model, pixel_values, tokens):
    whole = logits_of(model, pixel_values, tokens)
    encoded = model.vision_model(pixel_values)
    first = model(encoder_outputs=encoded, decoder_input_ids=tokens[:, :3], use_cache=True)
    with torch.no_grad():
        second = model(encoder_outputs=encoded, decoder_input_ids=tokens[:, 3:], cache=first[CACHE])
    torch.testing.assert_close(second.logits, whole[:, 3:], atol=1e-5, rtol=0)


def test_cross_attention_weights_of_one_token_are_ones(model, pixel_values, tokens):
    with torch.no_grad():
        output = model(pixel_values=pixel_values, decoder_input_ids=tokens, output_attentions=True)
    assert [weights.shape for weights in output.cross_attentions] == [(5, 2, 7, 1)] * 3
    assert all((weights == 1).all() for weights in output.cross_attentions)


def test_a_unit_norm_embedding_enters_at_the_size_of_token_embeddings():
    """Unscaled, a 768-vector of norm 1 would change the first logits 28 times less."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 224, 224)
    effect = {}
    for scale in (None, 1.0):
        torch.manual_seed(1)
        config = tiny_config(
            memory_scale=scale, vision_config={"image_size": 224, "patch_size": 32, "projection_dim": 768}
        )
        fresh = TinyCapForConditionalGeneration(config).eval()
        with torch.no_grad():
            memory = fresh.decoder.project_memory(fresh.get_image_features(images).pooler_output[:, None])
        effect[scale] = memory.std().item()
    assert effect[None] / effect[1.0] == pytest.approx(768**0.5, rel=1e-3)
    assert 0.2 < effect[None] < 2.0


def test_the_patch_memory_comes_from_a_layer_norm_and_is_not_scaled():
    assert tiny_model(memory="patches").decoder.memory_scale == 1.0
    assert tiny_model(memory="patches", memory_scale=0.5).decoder.memory_scale == 0.5


# --- the objective ----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_of_its_named_parts(pixel_values, labels):
    model = tiny_model(distill_weight=0.25)
    teacher = torch.randn(5, 14)
    output = model(pixel_values, labels=labels, teacher_embeds=teacher)
    expected = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.caption_loss, expected)
    cosine = (output.image_embeds * F.normalize(teacher, dim=-1)).sum(dim=-1)
    torch.testing.assert_close(output.distill_loss, (1 - cosine).mean())
    torch.testing.assert_close(output.loss, output.caption_loss + 0.25 * output.distill_loss)
    assert model(pixel_values, labels=labels).distill_loss is None
    torch.testing.assert_close(model(pixel_values, teacher_embeds=teacher).loss, 0.25 * output.distill_loss)


@pytest.mark.parametrize("replaced", [False, True])
def test_pictures_without_captions_train_the_student_by_the_teacher_alone(pixel_values, labels, replaced):
    model = tiny_model(distill_weight=0.25)
    if replaced:
        # A head that is called as a module, like adapters.
        model.lm_head.register_forward_hook(lambda module, inputs, output: output)
    teacher = torch.randn(5, 14)
    output = model(pixel_values, labels=torch.full_like(labels, -100), teacher_embeds=teacher, skip_logits=True)
    assert output.caption_loss.item() == 0
    torch.testing.assert_close(output.loss, 0.25 * output.distill_loss)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert any(name.startswith("vision_model") and gradient.abs().max() > 0 for name, gradient in gradients.items())
    assert all(gradient.abs().max() == 0 for name, gradient in gradients.items() if name.startswith("decoder"))


def test_labels_are_shifted_right_behind_the_start_token(model, pixel_values, labels):
    shifted = shift_tokens_right(labels, 1, 0)
    assert (shifted[:, 0] == 1).all() and torch.equal(shifted[0, 1:], labels[0, :-1])
    assert torch.equal(shifted[2, 1:5], labels[2, :4]) and (shifted[2, 5:] == 0).all()
    given = model(pixel_values, decoder_input_ids=shifted, labels=labels)
    torch.testing.assert_close(model(pixel_values, labels=labels).loss, given.loss)


def test_padding_of_labels_changes_no_loss(model, pixel_values, labels):
    padded = F.pad(labels, (0, 4), value=-100)
    torch.testing.assert_close(model(pixel_values, labels=padded).loss, model(pixel_values, labels=labels).loss)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_without_logits_equals_the_loss_with_them(pixel_values, labels, smoothing, monkeypatch):
    monkeypatch.setattr("tinycap.modeling_tinycap.LOSS_CHUNK", 4)
    model = tiny_model(label_smoothing=smoothing).train()
    gradients = []
    for skip_logits in (False, True):
        model.zero_grad()
        output = model(pixel_values, labels=labels, skip_logits=skip_logits)
        output.loss.backward()
        assert (output.logits is None) == skip_logits
        gradients.append((output.loss, [parameter.grad.clone() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_memory_noise_moves_what_the_decoder_sees_in_training_only(pixel_values, labels):
    noisy, plain = tiny_model(memory_noise=0.75), tiny_model()
    calls = {"pixel_values": pixel_values, "labels": labels}
    assert torch.equal(noisy(**calls).logits, plain(**calls).logits)
    torch.manual_seed(0)
    first, second = (noisy.train()(**calls) for _ in range(2))
    assert not torch.equal(first.logits, second.logits), "another noise each time"
    assert torch.equal(first.image_embeds, second.image_embeds), "which the teacher never sees"


def test_memory_noise_has_the_length_that_the_config_says():
    model = tiny_model(memory_noise=0.75, vision_config={"projection_dim": 1001})
    memory = F.normalize(torch.randn(50, 1, 1001, generator=torch.Generator().manual_seed(0)), dim=-1)
    moved = model.add_noise(memory)
    torch.testing.assert_close(moved.norm(dim=-1), torch.ones(50, 1))
    # Orthogonal to the embedding, like almost any random direction in so many dimensions.
    cosines = (moved * memory).sum(dim=-1)
    assert cosines.mean().item() == pytest.approx((1 + 0.75**2) ** -0.5, abs=0.02) and cosines.std() > 0


def test_label_smoothing_counts_in_training_only(pixel_values, labels):
    smooth, plain = tiny_model(label_smoothing=0.2), tiny_model()
    torch.testing.assert_close(smooth(pixel_values, labels=labels).loss, plain(pixel_values, labels=labels).loss)
    assert smooth.train()(pixel_values, labels=labels).loss != plain.train()(pixel_values, labels=labels).loss


def test_several_captions_of_an_image_share_its_one_encoding(model, pixel_values, labels):
    many = torch.cat([labels, labels.flip(0), labels]).unflatten(0, (3, 5)).transpose(0, 1).flatten(0, 1)
    encoded = []
    model.vision_model.register_forward_hook(lambda module, args, output: encoded.append(output.image_embeds.shape))
    shared = model(pixel_values, labels=many)
    assert encoded == [(5, 14)]
    repeated = model(pixel_values.repeat_interleave(3, dim=0), labels=many)
    torch.testing.assert_close(shared.logits, repeated.logits)
    torch.testing.assert_close(shared.loss, repeated.loss)


def test_captions_that_do_not_divide_among_the_images_are_an_error(model, pixel_values, labels):
    with pytest.raises(ValueError, match="each of 5 images, got 4 captions"):
        model(pixel_values, labels=labels[:4])


def test_gradients_reach_every_parameter(pixel_values, labels):
    """With one memory token, queries and keys of the cross-attention get gradients of zero."""
    for memory in ("embedding", "patches"):
        model = tiny_model(memory=memory).train()
        model(pixel_values, labels=labels, teacher_embeds=torch.randn(5, 14)).loss.backward()
        silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not silent, silent
        zero = {name for name, parameter in model.named_parameters() if parameter.grad.abs().max() < 1e-8}
        # A softmax is invariant to a shift of all scores: key biases have no gradient.
        zero = {name for name in zero if not name.endswith("k_proj.bias")}
        if memory == "embedding":
            expected = {n for n, _ in model.named_parameters() if "cross_attn.q_" in n or "cross_attn.k_proj.w" in n}
            expected |= {name for name, _ in model.named_parameters() if ".layer_norm2." in name and "decoder" in name}
            # These captions don't reach the last positions, but the table as a whole has gradients.
            assert zero == expected
        else:
            assert not zero


def test_the_caption_loss_alone_trains_the_student_too(model, pixel_values, labels):
    model.train()(pixel_values, labels=labels).loss.backward()
    assert model.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_the_teachers_embeddings_get_no_gradient(model, pixel_values, labels):
    teacher = torch.randn(5, 14)
    model.train()(pixel_values, labels=labels, teacher_embeds=teacher).loss.backward()
    assert teacher.grad is None and not teacher.requires_grad


def test_teacher_embeddings_of_another_width_are_an_error_that_names_both(model, pixel_values, labels):
    with pytest.raises(ValueError, match=r"\(5, 14\), got \(5, 13\)"):
        model(pixel_values, labels=labels, teacher_embeds=torch.randn(5, 13))


# --- interfaces of transformers ---------------------------------------------------------------------------------------


def test_without_a_loss_the_output_has_the_fields_of_transformers_own(model, pixel_values, labels):
    fields = {field.name for field in dataclasses.fields(Seq2SeqLMOutput)}
    assert set(model(pixel_values, output_attentions=True, output_hidden_states=True)) <= fields
    assert set(model(pixel_values, labels=labels)) - fields == {"image_embeds", "caption_loss"}


def test_attentions_and_hidden_states_come_layer_by_layer(model, pixel_values, tokens):
    output = model(
        pixel_values=pixel_values, decoder_input_ids=tokens, output_attentions=True, output_hidden_states=True
    )
    assert [a.shape for a in output.encoder_attentions] == [(5, 3, 10, 10)] * 2
    assert [a.shape for a in output.decoder_attentions] == [(5, 2, 7, 7)] * 3
    assert [h.shape for h in output.encoder_hidden_states] == [(5, 10, 12)] * 3
    assert [h.shape for h in output.decoder_hidden_states] == [(5, 7, 16)] * 4
    torch.testing.assert_close(output.decoder_attentions[0].sum(-1), torch.ones(5, 2, 7))


def test_return_dict_false_gives_a_tuple_that_begins_with_the_loss(model, pixel_values, labels):
    as_dict = model(pixel_values, labels=labels)
    as_tuple = model(pixel_values, labels=labels, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[:2], (as_dict.loss, as_dict.logits))


def test_gradient_checkpointing_changes_no_gradient(pixel_values, labels):
    gradients = []
    for enabled in (False, True):
        model = tiny_model().train()
        if enabled:
            model.gradient_checkpointing_enable()
        model(pixel_values, labels=labels).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gradient_checkpointing_keeps_no_cache(model, pixel_values, tokens):
    model.gradient_checkpointing_enable()
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    output = model.train()(pixel_values, decoder_input_ids=tokens, cache=cache, use_cache=True)
    output.logits.sum().backward()
    assert output.get(CACHE) is None and cache.get_seq_length() == 0
    logits_of(model, pixel_values, tokens[:, :4], cache=cache)
    with pytest.raises(ValueError, match="expected an empty one .*got 4 tokens"):
        model(pixel_values, decoder_input_ids=tokens[:, 4:], cache=cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same_logits(model, pixel_values, tokens, dtype):
    expected = logits_of(model, pixel_values, tokens)
    half = logits_of(copy.deepcopy(model).to(dtype), pixel_values, tokens)
    assert half.dtype == dtype
    assert (half.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_only_the_wanted_positions_reach_the_head(model, pixel_values, tokens):
    whole = logits_of(model, pixel_values, tokens)
    torch.testing.assert_close(logits_of(model, pixel_values, tokens, logits_to_keep=2), whole[:, -2:])


def test_more_tokens_than_positions_are_an_error_before_any_lookup(model, pixel_values):
    with pytest.raises(ValueError, match="at most 19 tokens .*got 20"):
        logits_of(model, pixel_values, torch.ones(5, 20, dtype=torch.long))


def test_text_under_a_processors_names_is_the_decoders(model, pixel_values, tokens):
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    expected = logits_of(model, pixel_values, tokens, decoder_attention_mask=mask)
    with torch.no_grad():
        given = model(pixel_values=pixel_values, input_ids=tokens, attention_mask=mask)
        embedded = model(pixel_values, attention_mask=mask, inputs_embeds=model.get_input_embeddings()(tokens))
    assert torch.equal(given.logits, expected) and torch.equal(embedded.logits, expected)
    # Called as by peft.
    nothing = {"input_ids": None, "attention_mask": None, "inputs_embeds": None, "decoder_inputs_embeds": None}
    loss = model(pixel_values=pixel_values, labels=tokens, **nothing).loss
    torch.testing.assert_close(loss, model(pixel_values, labels=tokens).loss)


def test_input_ids_as_their_own_labels_are_an_error(model, pixel_values, tokens, labels):
    with pytest.raises(ValueError, match="expected the tokens that follow input_ids, got input_ids"):
        model(pixel_values, input_ids=tokens, labels=tokens)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_input_ids_that_labels_follow_give_the_same_loss(pixel_values, tokens, compiled):
    model = tiny_model(**ONE_LAYER)
    following = shift_tokens_right(tokens, 1, 0)
    called = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    torch.testing.assert_close(
        called(pixel_values, input_ids=following, labels=tokens).loss, model(pixel_values, labels=tokens).loss
    )


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.slow
def test_a_forward_with_a_mask_is_one_graph(pixel_values, tokens, use_cache):
    model = tiny_model(**ONE_LAYER)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    options = {"decoder_attention_mask": mask, "use_cache": use_cache}
    expected = logits_of(model, pixel_values, tokens, **options)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits_of(compiled, pixel_values, tokens, **options), expected)


def test_a_mask_or_a_static_cache_beyond_the_positions_is_an_error(model, pixel_values, tokens):
    with pytest.raises(ValueError, match="at most 19 tokens .*got 20, padding included"):
        logits_of(model, pixel_values, tokens, decoder_attention_mask=torch.ones(5, 20))
    cache = EncoderDecoderCache(StaticCache(config=model.config.text_config, max_cache_len=20), DynamicCache())
    with pytest.raises(ValueError, match="got 20 slots of a static cache"):
        logits_of(model, pixel_values, tokens, cache=cache)


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.3.1"])
def test_a_static_cache_of_an_older_transformers_is_an_error(model, pixel_values, version, monkeypatch):
    monkeypatch.setattr(modeling_tinycap, "TRANSFORMERS_VERSION", version)
    with pytest.raises(ValueError, match=f"needs transformers 5.4 or newer, got {version}"):
        model.generate(pixel_values, cache_implementation="static")
    with pytest.raises(ValueError, match="needs transformers 5.4 or newer"):
        model.generate(pixel_values[:1], input_ids=torch.tensor([[5, 6]]), cache_implementation="static")
    cache = EncoderDecoderCache(StaticCache(config=model.config.text_config, max_cache_len=12), DynamicCache())
    with pytest.raises(ValueError, match="needs transformers 5.4 or newer"):
        logits_of(model, pixel_values, torch.full((5, 2), 4), cache=cache)


# --- quantised weights ------------------------------------------------------------------------------------------------


class StoredAsInt8(nn.Module):
    """A linear layer whose weight has another dtype than its inputs, like bitsandbytes'."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale, self.bias = scale, linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, self.weight * self.scale.to(states.dtype), self.bias)


def quantise_linear_layers(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is nn.Linear and name != "lm_head":
            setattr(module, name, StoredAsInt8(child))
        else:
            quantise_linear_layers(child)


def check_quantised(model, plain, pixel_values):
    embeds = model.get_image_features(pixel_values).pooler_output
    assert F.cosine_similarity(embeds, plain.get_image_features(pixel_values).pooler_output).min() > 0.98
    captions = model.generate(pixel_values, max_new_tokens=8, min_new_tokens=8)
    assert len({tuple(row) for row in captions.tolist()}) > 1, "not one caption for all images"
    logits = logits_of(model, pixel_values, captions)
    assert F.cosine_similarity(logits.flatten(), logits_of(plain, pixel_values, captions).flatten(), dim=0) > 0.95


def test_weights_stored_in_another_dtype_keep_their_captions(model, pixel_values):
    quantised = copy.deepcopy(model)
    quantise_linear_layers(quantised)
    assert quantised.decoder.memory_projection.weight.dtype == torch.int8
    check_quantised(quantised, model, pixel_values)


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_of_torch_works(model, pixel_values):
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    check_quantised(quantised, model, pixel_values)


@pytest.mark.filterwarnings("ignore")
def test_torchao_quantises_while_loading_and_after(model, pixel_values, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    settings = quantization.Int8WeightOnlyConfig()
    model.save_pretrained(tmp_path)
    loaded = TinyCapForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=transformers.TorchAoConfig(settings)
    )
    later = copy.deepcopy(model)
    quantization.quantize_(later, settings)
    for quantised in (loaded, later):
        assert type(quantised.decoder.memory_projection.weight) is not nn.Parameter
        check_quantised(quantised, model, pixel_values)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_quantises_saves_and_reloads(pixel_values, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    # Its smallest blocks have 64 values.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    model = tiny_model(vision_config={**sizes, "projection_dim": 64}, text_config=sizes)
    model.save_pretrained(tmp_path / "float")
    settings = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    quantised = TinyCapForConditionalGeneration.from_pretrained(tmp_path / "float", quantization_config=settings)
    quantised.save_pretrained(tmp_path / "quantised")
    for each in (quantised, TinyCapForConditionalGeneration.from_pretrained(tmp_path / "quantised")):
        assert not each.decoder.memory_projection.weight.is_floating_point()
        captions = each.generate(pixel_values, max_new_tokens=8, min_new_tokens=8)
        assert len({tuple(row) for row in captions.tolist()}) > 1


def test_a_lora_trains_saves_and_reloads(model, pixel_values, labels, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plain = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, settings).train()
    adapted(pixel_values=pixel_values, labels=labels).loss.backward()
    silent = [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent
    torch.optim.SGD(adapted.parameters(), lr=0.1).step()
    adapted.eval().save_pretrained(tmp_path)
    captions = adapted.generate(pixel_values=pixel_values, max_new_tokens=8, eos_token_id=None)
    assert not torch.equal(captions, plain.generate(pixel_values, max_new_tokens=8, eos_token_id=None))
    again = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(again.generate(pixel_values=pixel_values, max_new_tokens=8, eos_token_id=None), captions)


def test_a_head_that_the_library_left_untied_is_tied_after_loading(model, pixel_values, tmp_path, monkeypatch):
    """transformers 5.3 doesn't tie it."""
    model.save_pretrained(tmp_path)
    load = PreTrainedModel.from_pretrained.__func__

    def untied(cls, *args, **kwargs):
        loaded, report = load(cls, *args, **kwargs)
        loaded.lm_head.weight = nn.Parameter(torch.randn_like(loaded.lm_head.weight))
        return loaded, report

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(untied))
    loaded = TinyCapForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.decoder.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_an_untied_head_is_loaded_as_it_was_saved(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded = TinyCapForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is not loaded.decoder.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_cache_of_another_kind_is_an_error(model, pixel_values, tokens):
    with pytest.raises(ValueError, match="EncoderDecoderCache, got DynamicCache"):
        logits_of(model, pixel_values, tokens, cache=DynamicCache())


def test_bare_embeddings_of_another_width_are_an_error(model, tokens):
    with pytest.raises(ValueError, match=r"\(B, 1, 14\).*\(5, 1, 13\)"):
        model(encoder_outputs=BaseModelOutput(last_hidden_state=torch.randn(5, 1, 13)), decoder_input_ids=tokens)


def test_patch_memory_cannot_come_from_a_bare_embedding(tokens):
    with pytest.raises(ValueError, match="memory='patches'"):
        tiny_model(memory="patches")(
            encoder_outputs=BaseModelOutput(last_hidden_state=torch.randn(5, 1, 14)), decoder_input_ids=tokens
        )


def test_resizing_the_vocabulary_keeps_head_and_embedding_tied(model, pixel_values):
    model.resize_token_embeddings(41)
    assert model.lm_head.weight is model.decoder.embed_tokens.weight
    assert model(pixel_values).logits.shape[-1] == 41 == model.config.text_config.vocab_size


def test_the_student_alone_loads_from_the_whole_models_folder(model, pixel_values, tmp_path):
    model.save_pretrained(tmp_path)
    student, report = TinyCapVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    torch.testing.assert_close(student(pixel_values).image_embeds, model.get_image_features(pixel_values).pooler_output)


def test_a_captioner_begins_from_the_folder_of_a_student_alone(model, pixel_values, tmp_path):
    model.vision_model.save_pretrained(tmp_path)
    captioner, report = TinyCapForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} <= {"decoder", "lm_head"}
    torch.testing.assert_close(
        captioner.get_image_features(pixel_values).pooler_output, model.get_image_features(pixel_values).pooler_output
    )


def test_positions_begin_apart_from_each_other_and_as_loud_as_patches():
    """With a std of 0.02 they would be negligible beside the patch embeddings, and locations wouldn't be learned."""
    embeddings = TinyCapVisionModel(TinyCapVisionConfig(**VISION)).embeddings
    positions = embeddings.position_embeddings[0, 1:].detach()
    apart = torch.cdist(positions, positions) + 9 * torch.eye(len(positions))
    assert apart.min() > 1 and 0.3 < positions.std(dim=0).mean() < 1
    patches = embeddings.patch_embedding(torch.randn(5, 3, 24, 24))
    assert 0.1 < positions.std(dim=0).mean() / patches.std() < 10


def test_loaded_positions_stay_when_another_weight_is_missing(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["vision_model.embeddings.cls_token"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # Without output_loading_info, a missing weight is an error.
    loaded, _ = TinyCapForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    loaded = loaded.vision_model.embeddings
    assert torch.equal(loaded.position_embeddings, model.vision_model.embeddings.position_embeddings)
    assert not torch.equal(loaded.cls_token, model.vision_model.embeddings.cls_token)


@pytest.mark.parametrize("side, width", [(1, 3), (3, 12), (4, 18), (14, 192)])
def test_every_side_and_width_has_a_position_table(side, width):
    table = position_table(side, width)
    assert table.shape == (1 + side * side, width) and table.abs().max() <= 1 and not table[0].any()
    assert len(table[1:].round(decimals=4).unique(dim=0)) == side * side


def test_initial_weights_are_small_and_layer_norms_neutral():
    fresh = TinyCapForConditionalGeneration(tiny_config())
    for name, parameter in fresh.named_parameters():
        if "norm" in name:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        else:
            limit = 1 if name == "vision_model.embeddings.position_embeddings" else 0.12
            assert parameter.abs().max() <= limit, name
            assert name.endswith("bias") or parameter.std() > 0.01, name


# --- the loss in chunks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("rows", [1, 8, 11])
def test_the_loss_in_chunks_has_the_plain_value_and_gradients(rows, smoothing, monkeypatch):
    monkeypatch.setattr(modeling_tinycap, "LOSS_CHUNK", 4)
    model = tiny_model(label_smoothing=smoothing).train()
    labels = torch.randint(0, 37, (1, rows), generator=torch.Generator().manual_seed(0))
    states = torch.randn(1, rows, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for in_chunks in (True, False):
        given = states.clone().requires_grad_()
        loss = model.caption_loss(given, labels, None if in_chunks else model.lm_head(given))
        found.append((loss, *torch.autograd.grad(3 * loss, (given, model.lm_head.weight))))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)
    plain = F.cross_entropy(model.lm_head(states).flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(found[0][0], plain)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_half_precision_keeps_the_heads_negative_gradients(model, skip_logits):
    """The gradient of a wrong token of probability 1e-7 is representable in float16 only with loss scaling."""
    states, labels = torch.zeros(1, 20, 16), torch.full((1, 20), 5)
    states[..., 0] = 4.0
    with torch.no_grad():
        model.lm_head.weight.zero_()[5, 0] = 4.0
    (65536 * model.caption_loss(states, labels)).backward()
    expected = model.lm_head.weight.grad
    assert (expected[torch.arange(37) != 5, 0] > 0).all()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model.caption_loss(states, labels, None if skip_logits else model.lm_head(states))
    (65536 * loss).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(model.lm_head.weight.grad, expected, atol=0, rtol=0.01)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_labels_that_are_all_ignored_give_a_loss_of_0(model, pixel_values, labels, skip_logits):
    output = model.train()(pixel_values, labels=torch.full_like(labels, -100), skip_logits=skip_logits)
    assert output.loss.item() == 0
    output.loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_an_adapter_in_the_heads_place_takes_part_in_the_loss(model, pixel_values, labels):
    before = model(pixel_values=pixel_values, labels=labels, skip_logits=True).loss
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    after = model(pixel_values=pixel_values, labels=labels, skip_logits=True).loss
    plain = model(pixel_values=pixel_values, labels=labels).loss
    assert abs(after - before) > 1e-3
    torch.testing.assert_close(after, plain, atol=1e-5, rtol=0)
