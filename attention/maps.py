# SPDX-License-Identifier: Apache-2.0
"""Attention maps of chosen tokens from any image-text-to-text model of Transformers, differentiable, beside SDPA.

SDPA returns no attention probabilities, and eager attention computes those of all tokens. [`attention_maps`] computes those of a few:
the text model's attention function is SDPA's, and beside its output the rows that were asked for are computed in float32.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .image_tokens import ImageKeys, has_cross_attention, image_tokens

SDPA_WITH_MAPS = "sdpa_with_maps"
"""The name of SDPA's attention that also computes maps, in Transformers' interfaces of attention functions and masks."""

WITHOUT_ATTENTION = ("linear_attention", "conv", "moe")
"""Kinds of layers in `layer_types` that have no attention weights."""

NAMES_SDPA = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b)[^\n]*[\"']sdpa[\"']")
"""How the source of a model looks that compares the name of its attention with "sdpa"."""

Over = Literal["image", "all"]


@dataclass
class AttentionMaps:
    """What [`attention_maps`] gives, after the forward inside it.

    Attributes:
        layers: the layers of the text model that the maps are of, by their numbers there.
        keys: bool `(batch, keys)`, which of the keys show the image: tokens of the sequence, or visual tokens of a model with
            cross-attention. The image tokens of a row are those keys in order.
    """

    layers: list[int]
    keys: torch.Tensor | None = None
    _found: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def maps(self) -> torch.Tensor:
        """float32 `(layers, batch, phrases, image tokens)`, or `(layers, batch, heads, phrases, image tokens)` by head. Rows with
        fewer image tokens than others have zeros behind them; so have phrases without a token, or before their image."""
        return self._stack(0)

    @property
    def share(self) -> torch.Tensor:
        """float32 `(layers, batch, phrases)`, or `(layers, batch, heads, phrases)`: the part of all attention that is on the image."""
        return self._stack(1)

    def _stack(self, which: int) -> torch.Tensor:
        if not self._found:
            raise RuntimeError(
                "There are no maps yet: call the model inside `with attention_maps(...)`, then read them."
            )
        if missing := [layer for layer in self.layers if layer not in self._found]:
            raise RuntimeError(
                f"Layers {missing} have computed no map: their attention does not use Transformers' AttentionInterface, or does not "
                "hand on its keyword arguments. Choose other `layers`."
            )
        found = [self._found[layer][which] for layer in self.layers]
        return torch.stack([of_layer.to(found[0].device) for of_layer in found])


@contextlib.contextmanager
def attention_maps(
    model: nn.Module,
    queries: torch.Tensor,
    keys: torch.Tensor | None = None,
    *,
    layers: Sequence[int] | None = None,
    over: Over = "image",
    per_head: bool = False,
) -> Iterator[AttentionMaps]:
    """Records where phrases attend in the image, in the first forward of a model inside the block.

        with attention_maps(model, queries) as found:
            outputs = model(**inputs)
        loss = outputs.loss + my_loss(found.maps)

    The model's outputs are those of SDPA, to the last bit. The maps have gradients where the model's outputs have, also with gradient
    checkpointing that is not reentrant. The text model stays switched to the attention [`SDPA_WITH_MAPS`], because a backward with
    checkpointing comes after the block; it does what "sdpa" does, and is not saved with the model. A compiled model runs eagerly inside
    the block, as compiled code may skip what records the maps. Under DDP and FSDP2 add the loss on
    maps to one on the model's outputs: their backward begins at the outputs, and without it the processes do not share gradients.

    Args:
        model: an image-text-to-text model of Transformers whose text model uses SDPA, alone or inside PEFT, DDP or FSDP2; or an
            AGE-VLM, whose keys are its visual tokens and its sink.
        queries: bool `(batch, phrases, sequence)`, the tokens of each phrase. A phrase's map is the mean over its tokens.
        keys: bool `(batch, keys)`, the keys that show the image; by default [`image_tokens`] finds them.
        layers: numbers of layers of the text model; by default all that attend to the image.
        over: what the attention of a token sums to 1 over: "image", the keys that show the image alone, which does not depend on what
            attention goes elsewhere, or "all" keys.
        per_head: keep the heads apart, which are averaged otherwise.

    Raises:
        ValueError: if the model has other attention than SDPA, or a kind that the maps would not be those of, on entry; if `queries` or
            `keys` have other sizes than the inputs, or gradient checkpointing is reentrant, in the forward. It says why.
    """
    inner = find_model(model)
    if "map_queries" in inspect.signature(inner.base_model.forward).parameters:
        if per_head or keys is not None:
            raise ValueError(
                f"{type(inner).__name__} computes its maps itself, of all visual tokens and averaged over heads: leave out `keys` and "
                "`per_head`."
            )
        recording = _record_own_maps(inner, queries, layers, over)
    else:
        recording = _record_layers(inner, queries, keys, layers, over, per_head)
    with torch.compiler.set_stance("force_eager"), recording as found:
        yield found


@contextlib.contextmanager
def _record_layers(
    model: PreTrainedModel,
    queries: torch.Tensor,
    keys: torch.Tensor | None,
    layers: Sequence[int] | None,
    over: Over,
    per_head: bool,
) -> Iterator[AttentionMaps]:
    """Asks the layers of a text model for maps, through their attention function."""
    chosen = _choose_layers(model, layers)
    _switch(model)
    request = _Request(queries, over, per_head, AttentionMaps(list(chosen)))

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if request.state == "new":
            inputs = _arguments(module, args, kwargs)
            _check_inputs(inputs, queries, keys)
            request.begin(ImageKeys(keys) if keys is not None else image_tokens(model, inputs))

    def ask(layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        # As an argument, so that checkpointing replays it when the block has ended.
        return (args, {**kwargs, "map_request": (request, layer)}) if request.state == "running" else None

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        request.state = "done"

    base = model.base_model
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(base.register_forward_pre_hook(begin, with_kwargs=True))
        hooks.enter_context(base.register_forward_hook(end))
        for layer, module in chosen.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(ask, layer), with_kwargs=True))
        yield request.result


@contextlib.contextmanager
def _record_own_maps(
    model: PreTrainedModel, queries: torch.Tensor, layers: Sequence[int] | None, over: Over
) -> Iterator[AttentionMaps]:
    """Asks a model that computes maps itself, as an AGE-VLM does: it takes `map_queries` and gives `cross_attention_maps`."""
    own = list(model.config.get_text_config().cross_attention_layers)
    chosen = own if layers is None else list(layers)
    _check_layers(chosen, own)
    result = AttentionMaps(chosen)

    def ask(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        return None if result._found else (args, {**kwargs, "map_queries": queries})

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        maps = output.cross_attention_maps
        if result._found or maps is None:  # None without an image
            return
        share = maps.sum(-1)
        if over == "image":  # without the attention on the sink
            maps = maps / share[..., None].clamp(min=torch.finfo(maps.dtype).tiny)
        result.keys = torch.ones(maps.shape[1], maps.shape[-1], dtype=torch.bool, device=maps.device)
        result._found.update({layer: (maps[own.index(layer)], share[own.index(layer)]) for layer in chosen})

    base = model.base_model
    with base.register_forward_pre_hook(ask, with_kwargs=True), base.register_forward_hook(keep):
        yield result


# --- what is asked ---


@dataclass
class _Request:
    """What one forward is asked for. `rows` `(batch, rows)` are the tokens of all phrases of a row of the batch, `members`
    `(batch, phrases, rows)` the weight of each in each phrase; `columns` `(batch, image tokens)` the keys, and `shown` whether there are as many."""

    queries: torch.Tensor
    over: Over
    per_head: bool
    result: AttentionMaps
    state: Literal["new", "running", "done"] = "new"
    differentiable: bool = field(init=False)
    rows: torch.Tensor = field(init=False)
    members: torch.Tensor = field(init=False)
    columns: torch.Tensor = field(init=False)
    shown: torch.Tensor = field(init=False)

    def begin(self, image: ImageKeys) -> None:
        keys = image.keys
        queries = self.queries.to(keys.device)
        self.rows, asked = _positions(queries.any(1))
        weights = queries.float() / queries.sum(-1, keepdim=True).clamp(min=1)
        members = weights.gather(2, self.rows[:, None].expand(-1, weights.shape[1], -1)) * asked[:, None]
        if image.readers is not None:
            members = members * image.readers.gather(1, self.rows)[:, None]
        self.members = members
        self.columns, self.shown = _positions(keys)
        self.result.keys = keys
        self.differentiable = torch.is_grad_enabled()
        self.state = "running"

    def record(
        self,
        layer: int,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        is_causal: bool,
    ) -> None:
        if self.differentiable and not torch.is_grad_enabled():
            raise ValueError(
                "Gradient checkpointing is reentrant, so attention maps would come without a gradient: enable it with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        name = type(module).__name__
        if self.state == "running" and layer in self.result._found:
            raise ValueError(f"Layer {layer} attends twice, so it is not known which of its maps is asked for.")
        if query.shape[2] != self.queries.shape[2]:
            raise ValueError(
                f"{name} of layer {layer} computes {query.shape[2]} of the {self.queries.shape[2]} tokens of the sequence, so it is not known "
                "which: choose other `layers`."
            )
        if self.result.keys.shape[1] > key.shape[2]:
            raise ValueError(
                f"{name} of layer {layer} has {key.shape[2]} keys and `keys` {self.result.keys.shape[1]}: call the model without a cache."
            )
        with torch.autocast(query.device.type, enabled=False):
            found = self._compute(query, key, mask, scaling, is_causal)
        self.result._found.setdefault(layer, found)  # a recomputation comes later

    def _compute(
        self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float | None, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The maps and the share of one layer, from its queries `(batch, heads, sequence, width)` and keys `(batch, groups, keys, width)`."""
        batch, heads, _, width = query.shape
        groups, num_keys, num_rows = key.shape[1], key.shape[2], self.rows.shape[1]
        # Layers may lie on several devices.
        rows, members, columns, shown = (
            x.to(query.device) for x in (self.rows, self.members, self.columns, self.shown)
        )
        rows, columns = rows[:, None, :, None], columns[:, None, None].expand(-1, heads, num_rows, -1)
        asked = query.gather(2, rows.expand(-1, heads, -1, width)).float()
        # The heads of a group share their keys. They become rows, so that the keys need not be repeated.
        asked = asked.reshape(batch, groups, -1, width)
        scores = asked @ key.float().transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
        scores = scores.view(batch, heads, num_rows, num_keys)
        if mask is None:
            allowed = torch.ones(1, 1, 1, num_keys, dtype=torch.bool, device=key.device)
            if is_causal:
                allowed = torch.arange(num_keys, device=key.device) <= rows
        else:
            mask = mask.expand(batch, *mask.shape[1:])
            mask = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[-1]))[..., :num_keys]
            if mask.dtype == torch.bool:
                allowed = mask
            else:
                allowed = mask > torch.finfo(mask.dtype).min
                scores = scores + mask.float()
        # The lowest finite number rather than -inf: a row that sees nothing has the map 0 and the gradient 0, not NaN.
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        seen = allowed.expand(batch, heads, num_rows, -1).gather(3, columns) & shown[:, None, None]
        on_image = scores.gather(3, columns).masked_fill(~seen, torch.finfo(scores.dtype).min)
        total, image = scores.logsumexp(-1, keepdim=True), on_image.logsumexp(-1, keepdim=True)
        maps = (on_image - (image if self.over == "image" else total)).exp().masked_fill(~seen, 0.0)
        share = (image - total).exp().masked_fill(~seen.any(-1, keepdim=True), 0.0)
        if self.per_head:
            members = members[:, None]
        else:
            maps, share = maps.mean(1), share.mean(1)
        return members @ maps, (members @ share).squeeze(-1)


def _positions(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of the true values of each row of `(batch, length)`, in order, as `(batch, most)`, and which of them there are."""
    most = int(chosen.sum(-1).max()) if chosen.numel() else 0
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)[:, :most]
    return order, chosen.gather(1, order)


def sdpa_with_maps(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    map_request: tuple[_Request, int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA's attention, and the maps that `map_request` asks for."""
    if map_request is not None:
        request, layer = map_request
        for name, what in (("s_aux", "sinks among its logits"), ("position_bias", "a bias of positions")):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{type(module).__name__} has {what}, so the maps would not be those of its attention."
                )
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # As SDPA's function decides it.
        causal = causal and attention_mask is None and query.shape[2] > 1
        request.record(layer, module, query, key, attention_mask, scaling, causal)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
    )


AttentionInterface.register(SDPA_WITH_MAPS, sdpa_with_maps)
AttentionMaskInterface.register(SDPA_WITH_MAPS, sdpa_mask)


# --- the model ---


def find_model(model: nn.Module) -> PreTrainedModel:
    """The model of Transformers inside whatever wraps it, as PEFT and DDP do.

    Raises:
        ValueError: if there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"{type(model).__name__} is no model of Transformers and has none inside.")


def _find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The text model, without a head."""
    decoder = model.get_decoder()
    if decoder is model:  # also where the text model has a head of its own
        decoder = getattr(model, "model", model)
    return decoder if decoder is model or not isinstance(decoder, PreTrainedModel) else _find_decoder(decoder)


def text_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The layers of the text model that attend to the image, by their numbers.

    Raises:
        ValueError: if the model has no list of layers.
    """
    decoder = _find_decoder(model)
    if model.config.is_encoder_decoder or decoder.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} has an encoder and a decoder: the image is not among the tokens that its text attends to by their order."
        )
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(decoder).__name__} has no list `layers`, so its attention cannot be found.")
    text = model.config.get_text_config()
    if has_cross_attention(model):
        return {number: layers[number] for number in text.cross_attention_layers}
    kinds = getattr(text, "layer_types", None) or [""] * len(layers)
    return {number: layer for number, layer in enumerate(layers) if kinds[number] not in WITHOUT_ATTENTION}


def _choose_layers(model: PreTrainedModel, wanted: Sequence[int] | None) -> dict[int, nn.Module]:
    found = text_layers(model)
    if wanted is not None:
        _check_layers(wanted, list(found))
        found = {layer: found[layer] for layer in wanted}
    for layer, module in found.items():
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values()):
            raise ValueError(
                f"Layer {layer}, a {type(module).__name__}, takes no further keyword arguments, so it cannot be asked for a map."
            )
    return found


def _check_layers(wanted: Sequence[int], there: Sequence[int]) -> None:
    if unknown := [layer for layer in wanted if layer not in there]:
        raise ValueError(f"`layers` has {unknown}, but the layers that attend to the image are {list(there)}.")


def _switch(model: PreTrainedModel) -> None:
    """Switches the text model to [`SDPA_WITH_MAPS`].

    Raises:
        ValueError: if it does not use SDPA, or does something else where its attention is named so.
    """
    text = model.config.get_text_config()
    decoder = _find_decoder(model)
    name, now = type(decoder).__name__, decoder.config._attn_implementation
    if now == SDPA_WITH_MAPS:
        return
    if not decoder._supports_sdpa:
        raise ValueError(
            f"{name} does not support SDPA, which cannot compute what its attention does (a soft cap, a sink or a bias, for example). Maps are "
            "computed beside SDPA, so there are none."
        )
    if now != "sdpa":
        raise ValueError(
            f"{name} uses the attention '{now}', and maps are computed beside SDPA: load the model with attn_implementation='sdpa'."
        )
    if _depends_on_name(decoder):
        raise ValueError(
            f"{name} does something of its own where its attention is named 'sdpa', so it cannot have another name."
        )
    key = next((key for key in model.config.sub_configs if getattr(model.config, key, None) is text), None)
    model.set_attn_implementation(SDPA_WITH_MAPS if key is None else {key: SDPA_WITH_MAPS})
    if decoder.config._attn_implementation != SDPA_WITH_MAPS:
        raise ValueError(f"{name} cannot change its attention: it does not use Transformers' AttentionInterface.")


def _depends_on_name(decoder: nn.Module) -> bool:
    """Whether the files of a text model's parts compare the name of their attention with "sdpa"."""
    files = {sys.modules[type(part).__module__] for part in decoder.modules()}
    return any(NAMES_SDPA.search(inspect.getsource(file)) for file in files if hasattr(file, "__file__"))


def _check_inputs(inputs: dict[str, Any], queries: torch.Tensor, keys: torch.Tensor | None) -> None:
    """
    Raises:
        ValueError: if queries or keys do not fit the inputs.
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    batch, length = (embeds if ids is None else ids).shape[:2]
    if (queries.shape[0], queries.shape[2]) != (batch, length):
        raise ValueError(
            f"`queries` has the shape {tuple(queries.shape)}, that is (batch, phrases, sequence), but the model was called with "
            f"{batch} rows of {length} tokens."
        )
    if keys is not None and len(keys) != batch:
        raise ValueError(f"`keys` has the shape {tuple(keys.shape)}, but the model was called with {batch} rows.")
    cache = inputs.get("cache", inputs.get("past_key_values"))
    if keys is None and cache is not None and (past := int(cache.get_seq_length())):
        raise ValueError(
            f"The cache has {past} tokens before these, and which of them show the image is not known: call the model with all tokens and "
            "without a cache."
        )


def _arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    names = [name for name in inspect.signature(module.forward).parameters if name not in kwargs]
    return {**dict(zip(names, args, strict=False)), **kwargs}
