# SPDX-License-Identifier: Apache-2.0
"""A model as graphs that run without Transformers: the image encoder, and a decoder that reads a prompt and writes on.

`transformers.exporters` traces both, as a `torch.export` program or for ONNX. What a runtime needs is in one folder: the graphs,
`graphs.json` with the names and shapes of all inputs and outputs, the configuration, and the processor's files.

Shapes: `B` rows of the batch, `S` new text tokens, `P` cached ones, `N` images, `T` visual tokens an image, `V` visual tokens a
row, of which the last `W` are new, `D` width of the text model, `Q` phrases.
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.fx.experimental import _config as shape_settings
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.exporters.base import ExportedModel
from transformers.exporters.utils import get_leaf_tensors

from ..files import new_folder
from ..modeling_agevlm.modeling_agevlm import NEVER, AgeVlmForConditionalGeneration, append_cross_attention_layers
from ..processing.processing_agevlm import AgeVlmProcessor

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
"""Formats, and how the names of their graphs end."""

GRAPHS_FILE = "graphs.json"
"""The file that says how the graphs are called."""


class ImageEncoder(nn.Module):
    """Images to visual tokens: the vision tower and the adapter."""

    def __init__(self, model: AgeVlmForConditionalGeneration):
        super().__init__()
        self.model = model

    # Not `image_sizes`: the exporter makes numbers of an input of that name, which would be constants of the graph.
    def forward(self, pixel_values: torch.Tensor, sizes: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: `(N, 3, H, W)`.
            sizes: int64 `(N, 2)`, the height and the width that each image fills from the top left.

        Returns:
            `visual_tokens` `(N, T, D)`, and bool `visible` `(N, T)`, False where a token covers only padding.
        """
        features = self.model.get_image_features(pixel_values, sizes, return_dict=True)
        tokens = features.pooler_output.to(self.model.dtype)
        return {"visual_tokens": tokens, "visible": features.visual_attention_mask}


class _PastLayer(DynamicLayer):
    """A layer of a cache that may be empty, which no graph needs to ask."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def get_seq_length(self) -> int:
        return self.keys.shape[-2]


class Decoder(nn.Module):
    """The language model with its blocks and its head. It reads a prompt with an empty cache, and one token with a full one."""

    def __init__(self, model: AgeVlmForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        visual_tokens: torch.Tensor,
        visual_positions: torch.Tensor,
        past_key_values: list[dict[str, torch.Tensor]],
        map_queries: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """
        Args:
            input_ids: `(B, S)`.
            attention_mask: int64 `(B, P + S)`, 0 for padding.
            visual_tokens: `(B, W, D)`, those of the images whose image tokens are in `input_ids`.
            visual_positions: int64 `(B, V)`, for each visual token, the cached ones first, the index in `attention_mask` of its
                image's token; [`NEVER`] where it covers only padding, or fills up a row with fewer images.
            past_key_values: `key` and `value` of each layer: of the Llama layers `(B, kv_heads, P, head_dim)`, and behind
                them of the blocks `(B, kv_heads, V - W, head_dim)`.
            map_queries: bool `(B, Q, S)`, which tokens belong to each phrase.

        Returns:
            `logits` `(B, vocabulary)` of the token after the last one; `present`, as `past_key_values`; with `map_queries`
            float32 `maps` `(blocks, B, Q, V)`.
        """
        text_model, config = self.model.model.language_model, self.model.config.text_config
        cache, num_layers = DynamicCache(config=config), config.num_hidden_layers
        cache.layers = [_PastLayer(past["key"], past["value"]) for past in past_key_values[:num_layers]]
        append_cross_attention_layers(cache, config)  # type: ignore[arg-type]
        for layer, past in zip(cache.layers[num_layers:], past_key_values[num_layers:], strict=True):
            layer.lazy_initialization(past["key"], past["value"])
            layer.keys, layer.values = past["key"], past["value"]
            layer.positions = visual_positions[:, :0]  # all positions come anew, so that no graph cuts and joins them
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            cross_attention_states=visual_tokens,
            visual_positions=visual_positions,
            map_queries=map_queries,
            use_cache=True,
        )
        result = {
            "logits": self.model.lm_head(output.last_hidden_state[:, -1]),
            "present": [{"key": layer.keys, "value": layer.values} for layer in cache.layers],
        }
        return result if map_queries is None else {**result, "maps": output.cross_attention_maps}


class _Graph:
    """A part of a model, with examples of its inputs and the sizes of all tensors: a number, or the name of what varies."""

    def __init__(self, module: nn.Module, inputs: dict[str, Any], input_sizes: dict[str, Any], output_sizes: dict):
        self.module, self.inputs = module, inputs
        self.sizes = {"inputs": _flat(input_sizes), "outputs": _flat(output_sizes)}
        self.dynamic_shapes = _map(
            lambda sizes: {i: Dim.AUTO for i, s in enumerate(sizes) if isinstance(s, str)}, input_sizes
        )

    @torch.no_grad()
    def describe(self, file: str) -> dict[str, Any]:
        """What a runtime must know to call the graph."""
        tensors = {"inputs": get_leaf_tensors(self.inputs), "outputs": get_leaf_tensors(self.module(**self.inputs))}
        return {"file": file} | {
            kind: [
                {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": self.sizes[kind][name]}
                for name, tensor in tensors[kind].items()
            ]
            for kind in tensors
        }


def _graphs(model: AgeVlmForConditionalGeneration, size: tuple[int, int], maps: bool) -> dict[str, _Graph]:
    """The graphs of a model by name. No two sizes of the examples are the same, and none is 0 or 1."""
    config = model.config.text_config
    encoder, decoder = ImageEncoder(model), Decoder(model)
    pixels, sizes = torch.zeros(2, 3, *size), torch.tensor([size, size])
    encoder_inputs = {"pixel_values": pixels.to(model.device, model.dtype), "sizes": sizes.to(model.device)}
    with torch.no_grad():
        num_tokens = encoder(**encoder_inputs)["visible"].shape[1]
    width, heads, head_dim = config.hidden_size, config.num_key_value_heads, config.head_dim
    image_encoder = _Graph(
        encoder,
        encoder_inputs,
        {"pixel_values": ["images", 3, *size], "sizes": ["images", 2]},
        {"visual_tokens": ["images", num_tokens, width], "visible": ["images", num_tokens]},
    )

    rows, tokens, past, past_visual, new_visual, phrases = 3, 7, 5, 19, 4, 2
    blocks = len(config.cross_attention_llama_layers)
    numbers = {"past": past, "past_visual": past_visual}
    lengths = ["past"] * config.num_hidden_layers + ["past_visual"] * blocks

    def cache(make: Any, lengths: list) -> list[dict[str, Any]]:
        return [{name: make(length) for name in ("key", "value")} for length in lengths]

    floats = {"device": model.device, "dtype": model.dtype}
    integers = {"device": model.device, "dtype": torch.long}
    inputs = {
        "input_ids": torch.zeros(rows, tokens, **integers),
        "attention_mask": torch.ones(rows, past + tokens, **integers),
        "visual_tokens": torch.zeros(rows, new_visual, width, **floats),
        "visual_positions": torch.zeros(rows, past_visual + new_visual, **integers),
        "past_key_values": cache(lambda n: torch.zeros(rows, heads, numbers[n], head_dim, **floats), lengths),
    }
    input_sizes = {
        "input_ids": ["batch", "tokens"],
        "attention_mask": ["batch", "past + tokens"],
        "visual_tokens": ["batch", "new_visual", width],
        "visual_positions": ["batch", "past_visual + new_visual"],
        "past_key_values": cache(lambda n: ["batch", heads, n, head_dim], lengths),
    }
    grown = {"past": "past + tokens", "past_visual": "past_visual + new_visual"}
    output_sizes = {
        "logits": ["batch", config.vocab_size],
        "present": cache(lambda n: ["batch", heads, grown[n], head_dim], lengths),
    }
    if maps:
        inputs["map_queries"] = torch.ones(rows, phrases, tokens, device=model.device, dtype=torch.bool)
        input_sizes["map_queries"] = ["batch", "phrases", "tokens"]
        output_sizes["maps"] = [blocks, "batch", "phrases", grown["past_visual"]]
    return {"image_encoder": image_encoder, "decoder": _Graph(decoder, inputs, input_sizes, output_sizes)}


def _map(function: Any, sizes: Any) -> Any:
    """Applies a function to all lists of sizes in a nested structure."""
    if isinstance(sizes, dict):
        return {name: _map(function, value) for name, value in sizes.items()}
    if any(isinstance(value, dict) for value in sizes):
        return [_map(function, value) for value in sizes]
    return function(sizes)


def _flat(sizes: Any, prefix: Any = "") -> dict[str, list]:
    """All lists of sizes by the names that exporters give to tensors in nested structures, as `present.0.key`."""
    if isinstance(sizes, list) and not any(isinstance(value, dict) for value in sizes):
        return {prefix: sizes}
    items: Iterable[tuple[Any, Any]] = sizes.items() if isinstance(sizes, dict) else enumerate(sizes)
    return {
        path: value
        for name, part in items
        for path, value in _flat(part, f"{prefix}.{name}" if prefix else name).items()
    }


@contextlib.contextmanager
def _tracing(model: AgeVlmForConditionalGeneration) -> Iterator[None]:
    """Prepares a model for its exporters, without their many lines about their own work."""
    text_model, training = model.model.language_model, model.training
    attention, disabled = text_model.config._attn_implementation, logging.root.manager.disable
    logging.disable(logging.WARNING)
    model.eval()
    # SDPA's own shortcuts ask whether there is one token, and the answer would be part of the graph.
    text_model.set_attn_implementation("eager")
    try:
        # Otherwise the trace takes for granted that no size is 0 or 1.
        with contextlib.redirect_stdout(io.StringIO()), shape_settings.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            yield
    finally:
        text_model.set_attn_implementation(attention)
        model.train(training)
        logging.disable(disabled)


def export_model(
    model: AgeVlmForConditionalGeneration,
    processor: AgeVlmProcessor,
    folder: str | os.PathLike,
    format: str = "onnx",
    *,
    maps: bool = False,
    opset: int | None = None,
) -> None:
    """Writes a model as graphs: `image_encoder` ([`ImageEncoder`]) and `decoder` ([`Decoder`]), in the model's own dtype.

    Beside them are `graphs.json` (names, types and shapes of all inputs and outputs, and the order of the cache's layers), the
    manifest with which `transformers.exporters` loads them, the configuration, the generation settings and the
    processor's files. Sizes of batch, texts, images and cache are free, from 0 on; images have the processor's size.

    Args:
        model: neither quantized nor with adapters.
        processor: of the model.
        folder: must not exist yet, or be empty.
        format: `onnx` or `torch`.
        maps: the decoder also takes `map_queries` and returns attention maps.
        opset: of ONNX; by default the newest that the exporter knows.

    Raises:
        ValueError: for another format, an opset with the format torch, or a model that cannot be exported.
        ImportError: if packages for ONNX are missing.
        OSError: if the folder has content or cannot be written.
    """
    check_format(format, opset)
    _check_exportable(model)

    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    size = processor.image_processor.size
    with new_folder(folder) as partial, _tracing(model):
        processor.save_pretrained(partial)  # first, so that a disk that is full says so at once
        exporter = OnnxExporter() if format == "onnx" else DynamoExporter()
        components, described = {}, {}
        for name, graph in _graphs(model, (size["height"], size["width"]), maps).items():
            settings = {"dynamic": True, "dynamic_shapes": graph.dynamic_shapes}
            config = OnnxConfig(**settings, opset_version=opset) if format == "onnx" else DynamoConfig(**settings)
            exported = exporter.export(graph.module, dict(graph.inputs), config)
            if format == "torch":
                # What the trace took for granted beyond the shapes, as that no batch has one row. It holds for all.
                exported.program._guards_code = []
            components[name] = exported.components["model"]
            described[name] = graph.describe(name + FORMATS[format])
        whole = ExportedModel(components, exporter.export_format, model.config, model.generation_config)
        whole.save_pretrained(partial)
        text_config = model.config.text_config
        graphs = {
            "format": format,
            "image_token_id": model.config.image_token_id,
            "hidden_position": NEVER,
            "cache": [
                *({"layer": layer, "holds": "text"} for layer in range(text_config.num_hidden_layers)),
                *({"before_layer": layer, "holds": "images"} for layer in text_config.cross_attention_llama_layers),
            ],
            "graphs": described,
        }
        (partial / GRAPHS_FILE).write_text(json.dumps(graphs, indent=2) + "\n", encoding="utf-8")


def check_format(format: str, opset: int | None = None) -> None:
    """What [`export_model`] refuses of its settings, for those who want to know it before a model is loaded.

    Raises:
        ValueError: for an unknown format, or an opset with the format torch.
        ImportError: if packages for ONNX are missing.
    """
    if format not in FORMATS:
        raise ValueError(f"the format must be {' or '.join(FORMATS)}, got '{format}'")
    if opset is not None and format != "onnx":
        raise ValueError(f"an opset is a version of ONNX: leave it out, or choose the format onnx instead of {format}")
    if missing := [name for name in ("onnx", "onnxscript") if format == "onnx" and not importlib.util.find_spec(name)]:
        raise ImportError(f"ONNX needs {' and '.join(missing)}, not installed here: pip install 'agevlm[export]'")


def _check_exportable(model: Any) -> None:
    """
    Raises:
        ValueError: for a model that has no graphs; says what to do.
    """
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model has PEFT adapters, which a graph cannot hold: merge them first, with "
            "`PeftModel.from_pretrained(model, adapter).merge_and_unload()`, and save and export what that returns"
        )
    if not isinstance(model, AgeVlmForConditionalGeneration):
        raise ValueError(
            f"{type(model).__name__} is not an AGE-VLM: export it with `export_for_generation` of `transformers.exporters`, which "
            "knows models of Transformers"
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            "the model is quantized, and its weights have no form in a graph: export the model that it was made from, and "
            "quantize the graphs"
        )
