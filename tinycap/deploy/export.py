"""Exports a TinyCap as ONNX graphs, in float32 and int8, which don't need PyTorch.

    onnx/encoder_model.onnx          pixel_values -> last_hidden_state, image_embeds
    onnx/decoder_model_merged.onnx   input_ids, encoder_hidden_states, past_key_values.* -> logits, present.*
    onnx/text_model.onnx             input_ids, attention_mask -> text_embeds, of a checkpoint with a text encoder

Optimum and transformers.js load the folder by its names and `config.json`; the int8 graphs end in `_quantized`. What is
the encoder's `last_hidden_state` here is all that the decoder's cross-attention ever reads of an image, already
projected: with one memory vector the constant that each layer adds, (B, 1, layers * hidden_size); with patches the keys
and values of each layer, (B, tokens, layers * 2 * hidden_size). One decoder serves the first step, with a cache of
length 0, and all others.
"""

import json
import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.utils import cached_file

from tinycap.confidence_tinycap import CONFIDENCE_NAME
from tinycap.deploy.captioners import VISUAL_PROJECTION, extra_missing
from tinycap.deploy.outputs import filling
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training.repository import load_repository


# Files beside the graphs that a captioner reads.
COMPANIONS = (
    *("config.json", "generation_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json"),
)
# Maximum difference between outputs of an exported graph and the model, due to the order of summation.
TOLERANCE = 1e-3
# Weights that share a scale, where they are quantized in blocks.
DECODER_BLOCK, ENCODER_BLOCK = 32, 64


class EncoderGraph(nn.Module):
    """Student, memory, and the part of cross-attention that depends on the image alone."""

    def __init__(self, model: TinyCapForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = self.model.get_encoder()(pixel_values, return_dict=True)
        memory = self.model.decoder.project_memory(self.model.get_memory(encoded)[0])
        states = []
        for layer in self.model.decoder.layers:
            keys, values = layer.cross_attn.memory_states(memory, memory.shape[1], None)
            # With a single memory vector, `keys` is the constant that the layer adds, and the values are unused.
            states += [keys] if memory.shape[1] == 1 else [keys, values]
        return torch.cat([state.transpose(1, 2).flatten(2) for state in states], dim=-1), encoded.image_embeds


class DecoderGraph(nn.Module):
    """The decoder over the tokens that aren't in the cache yet, and the head for the last one."""

    def __init__(self, model: TinyCapForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor, past_key_values: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        layers = self.model.decoder.layers
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        states = encoder_hidden_states.chunk(encoder_hidden_states.shape[-1] // layers[0].mlp.fc1.in_features, dim=-1)
        a_layer = len(states) // len(layers)
        for index, layer in enumerate(layers):
            cache.self_attention_cache.update(past_key_values[2 * index], past_key_values[2 * index + 1], index)
            split = [layer.cross_attn.split_heads(state) for state in states[a_layer * index : a_layer * (index + 1)]]
            cache.cross_attention_cache.update(split[0], split[-1], index)
            cache.is_updated[index] = True
        # Only the length of the memory is still used.
        hidden_states = self.model.decoder(input_ids, encoder_hidden_states, cache=cache).last_hidden_state
        logits = self.model.lm_head(hidden_states[:, -1:])
        present = [tensor for layer in cache.self_attention_cache.layers for tensor in (layer.keys, layer.values)]
        return logits, *present


class TextGraph(nn.Module):
    """The text encoder with the token embedding."""

    def __init__(self, model: TinyCapForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model.get_text_features(input_ids, attention_mask, return_dict=True).text_embeds,)


def export_onnx(
    model_name_or_path: str | Path, output_dir: str | Path, quantize: bool = True, float_activations: bool = False
) -> dict[str, Path]:
    """Writes the ONNX graphs of a checkpoint, and copies its configs and tokenizer.

    Args:
        output_dir: gets `onnx/` and the small files; may be the repository itself, whose config stays as it is.
        quantize: write the int8 graphs too.
        float_activations: quantize only weights; see `quantize_graph`.

    Returns:
        The graphs written, by name: `encoder_model`, `decoder_model_merged`, with a text encoder `text_model`, and
        each with `_quantized`.

    Raises:
        ValueError: the checkpoint isn't a TinyCap's.
        ImportError: one of the packages of `tinycap[export]` is missing.
        RuntimeError: an exported graph's outputs differ from the model's.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise extra_missing("exporting needs onnx, onnxscript and onnxruntime", "export", error) from error
    model = load_repository(str(model_name_or_path), "--model")[0].float()
    output_dir, written = Path(output_dir), []
    with filling(output_dir) as aside:
        (aside / "onnx").mkdir()
        graphs = {"encoder_model": _export_encoder, "decoder_model_merged": _export_decoder}
        if model.config.text_encoder_config is not None:
            graphs["text_model"] = _export_text
        for name, export in graphs.items():
            path, quantized_path = (aside / "onnx" / f"{name}{suffix}.onnx" for suffix in ("", "_quantized"))
            export(model, path)
            if quantize:
                quantize_graph(path, quantized_path, export is not _export_encoder, float_activations)
            written += [path, quantized_path][: 1 + quantize]
        for name in (*COMPANIONS, CONFIDENCE_NAME):
            # Only the calibration is optional.
            source = cached_file(model_name_or_path, name, _raise_exceptions_for_missing_entries=name in COMPANIONS)
            if source is None:
                (output_dir / name).unlink(missing_ok=True)
            elif Path(source).resolve() != (output_dir / name).resolve():
                shutil.copyfile(source, aside / name)
        if (aside / "config.json").exists():
            # Not in the repository itself, which stays a TinyCap.
            (aside / "config.json").write_text(
                json.dumps(stock_config(model.config), indent=2) + "\n", encoding="utf-8"
            )
    return {path.stem: output_dir / "onnx" / path.name for path in written}


def stock_config(config) -> dict:
    """The graphs' `config.json`: sizes and token ids by the names of stock models of transformers.js and Optimum."""
    from tinycap.deploy.onnx_captioner import EXPORTED_TYPE, OWN_PARTS, PART_TYPES, SIZES

    content = {"model_type": EXPORTED_TYPE, "is_encoder_decoder": True}
    for part, names in SIZES.items():
        own = getattr(config, OWN_PARTS[part])
        content[part] = {
            "model_type": PART_TYPES[part],
            **{theirs: getattr(own, name) for name, theirs in names.items()},
        }
    if config.text_encoder_config is not None:
        name = "max_position_embeddings"
        content["text_encoder_config"] = {name: getattr(config.text_encoder_config, name)}
    ids = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
    return {**content, **{name: getattr(config, name) for name in ids}}


def quantize_graph(path: Path, quantized_path: Path, has_token_table: bool, float_activations: bool = False) -> None:
    """Quantizes weights of linear layers to int8, and activations at run time; docs/on_the_device.md compares variants.

    The encoder has a scale for each output channel, and seven bits, since processors without VNNI add two products of
    bytes in 16 bits. The decoder, whose small errors change words, has a scale for every 32 weights, and its token
    embeddings are float16.

    With `float_activations` only weights are quantized, the encoder's in blocks too. Quantized activations amplify
    differences of rounding: between WebAssembly and x86, one caption in ten differs.
    """
    # The quantizer's import configures logging unless it is already; every node would be logged.
    logging.basicConfig()
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = quantized_path.with_name(f".{quantized_path.name}")
    try:
        # Folds constants, including the transposed weight of the head, which is otherwise not quantized.
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        if has_token_table or float_activations:
            model = ONNXModel(onnx.load(prepared))
            # Both ways skip Gemm.
            model.replace_gemm_with_matmul()
            if has_token_table and float_activations:
                store_as_int8(model.model, DECODER_BLOCK)
                model.clean_initializers()
            else:
                # Level 4 also quantizes activations, each block of a row separately.
                options = {"bits": 8, "is_symmetric": True, "accuracy_level": 4 if has_token_table else 0}
                options["block_size"] = DECODER_BLOCK if has_token_table else ENCODER_BLOCK
                quantizer = MatMulNBitsQuantizer(model.model, algo_config=DefaultWeightOnlyQuantConfig(**options))
                quantizer.process()
                model = quantizer.model
            if has_token_table:
                _halve_table(model.model)
            onnx.save(model.model, quantized_path)
        else:
            options = {"per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8}
            quantize_dynamic(prepared, quantized_path, op_types_to_quantize=["MatMul", "Gemm"], **options)
    finally:
        prepared.unlink(missing_ok=True)


def store_as_int8(model, block_size: int) -> None:
    """Stores the weights of linear layers in int8, with a scale for each block of a column.

    onnxruntime folds the constants when it loads the graph, and computes in float32. In WebAssembly `MatMulNBits` takes
    several times as long for a few rows, such as those of a decoding step, and less for an encoder's many.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    linear = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in linear and len(tensor.dims) == 2]:
        name, table = tensor.name, numpy_helper.to_array(tensor)
        rows, columns = table.shape
        blocks = table.reshape(-1, rows if rows % block_size else block_size, columns)
        # No division by 0 where a block's weights are all 0.
        scales = np.abs(blocks).max(axis=1, keepdims=True).clip(1e-12) / 127
        stored = {"int8": np.rint(blocks / scales).astype(np.int8), "scales": scales, "shape": np.array(table.shape)}
        graph.initializer.extend(numpy_helper.from_array(value, f"{name}.{key}") for key, value in stored.items())
        graph.initializer.remove(tensor)
        nodes = (
            helper.make_node("Cast", [f"{name}.int8"], [f"{name}.cast"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}.cast", f"{name}.scales"], [f"{name}.blocks"]),
            helper.make_node("Reshape", [f"{name}.blocks", f"{name}.shape"], [name]),
        )
        for place, node in enumerate(nodes):
            graph.node.insert(place, node)


def _halve_table(model) -> None:
    """Stores the token embeddings as float16 and casts the rows of `input_ids` to float32."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    gather = next(node for node in graph.node if node.op_type == "Gather" and node.input[1] == "input_ids")
    table = weights[gather.input[0]]
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table).astype("float16"), table.name))
    wide, narrow = gather.output[0], f"{gather.output[0]}_half"
    gather.output[0] = narrow
    cast = helper.make_node("Cast", [narrow], [wide], to=TensorProto.FLOAT)
    graph.node.insert(list(graph.node).index(gather) + 1, cast)


def _export_encoder(model: TinyCapForConditionalGeneration, path: Path) -> None:
    vision = model.config.vision_config
    inputs = {"pixel_values": torch.randn(2, vision.num_channels, vision.image_size, vision.image_size)}
    shapes = {"pixel_values": {0: torch.export.Dim("batch_size")}}
    _export(EncoderGraph(model), inputs, path, list(inputs), ["last_hidden_state", "image_embeds"], shapes)


def _export_decoder(model: TinyCapForConditionalGeneration, path: Path) -> None:
    text, layers = model.config.text_config, model.decoder.layers
    patches = model.vision_model.embeddings.num_patches
    length, a_layer = (1, 1) if model.config.memory == "embedding" else (1 + patches, 2)
    states = torch.randn(2, length, len(layers) * a_layer * text.hidden_size)
    heads, head_dim = text.num_attention_heads, text.hidden_size // text.num_attention_heads
    # Sizes other than 0 and 1, which the exporter would specialise on.
    past = [torch.randn(2, heads, 3, head_dim) for _ in range(2 * len(layers))]
    names = [f"{index}.decoder.{part}" for index in range(len(layers)) for part in ("key", "value")]
    batch, new, before = (torch.export.Dim(name) for name in ("batch_size", "sequence_length", "past_sequence_length"))
    inputs = {"input_ids": torch.tensor([[1, 2], [2, 1]]), "encoder_hidden_states": states, "past_key_values": past}
    shapes = {
        "input_ids": {0: batch, 1: new},
        "encoder_hidden_states": {0: batch},
        "past_key_values": [{0: batch, 2: before}] * len(past),
    }
    input_names = ["input_ids", "encoder_hidden_states", *(f"past_key_values.{name}" for name in names)]
    output_names = ["logits", *(f"present.{name}" for name in names)]
    _export(DecoderGraph(model), inputs, path, input_names, output_names, shapes)


def _export_text(model: TinyCapForConditionalGeneration, path: Path) -> None:
    if hasattr(model, "visual_projection"):
        np.save(path.with_name(VISUAL_PROJECTION), model.visual_projection.weight.detach().numpy())
    inputs = {"input_ids": torch.tensor([[1, 2, 1], [2, 1, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    batch, length = torch.export.Dim("batch_size"), torch.export.Dim("sequence_length")
    shapes = dict.fromkeys(inputs, {0: batch, 1: length})
    _export(TextGraph(model), inputs, path, list(inputs), ["text_embeds"], shapes)


@torch.no_grad()
def _export(
    module: nn.Module, inputs: dict, path: Path, input_names: list[str], output_names: list[str], shapes: dict
) -> None:
    """Exports a module; `RuntimeError` if the graph's outputs for the example inputs differ from the module's."""
    import onnx
    import onnxruntime

    names = {"input_names": input_names, "output_names": output_names, "dynamic_shapes": shapes}
    with warnings.catch_warnings():
        # Inputs share axes intentionally.
        warnings.filterwarnings("ignore", message="# The axis name")
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = torch.onnx.export(module.eval(), kwargs=inputs, **names, dynamo=True, verbose=False).model_proto
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        # The exporter's metadata about source files contains paths of this machine.
        del part.metadata_props[:]
    onnx.save(model, path)
    flat = [tensor for value in inputs.values() for tensor in (value if isinstance(value, list) else [value])]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(output_names, {name: tensor.numpy() for name, tensor in zip(input_names, flat)})
    for name, output, expected in zip(output_names, outputs, module(**inputs)):
        difference = (torch.from_numpy(output) - expected).abs().max().item()
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{path.name}: expected the model's {name}, got one that differs by {difference:.2g}")
