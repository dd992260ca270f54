# SPDX-License-Identifier: Apache-2.0
"""What one step of training costs on one device, counted before any weights are loaded: FLOPs and memory.

The model of a stage goes forward and backward with tensors that have shapes and types but no values (`FakeTensorMode`), so that the
count includes what the stage freezes, what autocast copies and what gradient checkpointing computes again. No GPU is used, and no
memory to speak of.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from .optimizer import MUON, MuonOptions, optimizer_groups
from .stages import freeze

if TYPE_CHECKING:
    from ..modeling_agevlm.configuration_agevlm import AgeVlmConfig
    from .arguments import AgeVlmTrainingArguments

GPU_TFLOPS = 989.0
"""Dense bfloat16 TFLOPs a second of an H100 (SXM), from NVIDIA's data sheet."""

UTILIZATION = 0.2
"""The share of [`GPU_TFLOPS`] that training reached where it was measured, rounded down; see docs/training.md."""

# Attention on the CPU, which PyTorch's counter does not know. It is called with shapes.
_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **__: (
        sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


@dataclass(frozen=True)
class BatchShape:
    """A batch of one device.

    Args:
        rows: in it.
        tokens: text tokens of its longest row, to which all are padded.
        learned: positions at which the head runs: those at which some row learns a token.
        images: of all rows together.
    """

    rows: int
    tokens: int
    learned: int
    images: int


@dataclass
class StepCost:
    """What forward and backward of one batch cost one device.

    Args:
        flops: floating point operations; a multiplication and an addition are two.
        weights: bytes of weights and buffers by type.
        gradients: bytes of the gradients of what trains.
        optimizer: bytes of the optimizer's states.
        activations: most bytes that are alive beside these at any time: what backward needs, the logits, and intermediate
            results. Without what the allocator and the kernels of a GPU keep for themselves.
        buckets: bytes of DDP's buckets, which hold the gradients once more on several devices.
        visual_tokens: of an image.
    """

    flops: int
    weights: dict[str, int] = field(default_factory=dict)
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    buckets: int = 0
    visual_tokens: int = 0

    @property
    def memory(self) -> int:
        """Bytes of all of these."""
        return sum(self.weights.values()) + self.gradients + self.optimizer + self.activations + self.buckets


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made in its block and alive, and the most of them at any time."""

    def __init__(self):
        super().__init__()
        self.alive = self.most = 0
        self._known: Any = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known and storage not in given:
                    self._known.add(storage)
                    self.alive += (size := storage.nbytes())
                    self.most = max(self.most, self.alive)
                    weakref.finalize(storage, self._free, size)
        return result

    def _free(self, size: int) -> None:
        self.alive -= size


def estimate_step(
    config: AgeVlmConfig,
    args: AgeVlmTrainingArguments,
    batch: BatchShape,
    *,
    image_size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    stored_features: bool = False,
    devices: int = 1,
) -> StepCost:
    """Counts a step of a stage. The attention maps of guidance are left out, which add 1 to 2 % of memory (benchmarks/README.md).

    Args:
        config: of the model.
        args: of the stage.
        batch: how large it is.
        image_size: height and width of `pixel_values`.
        dtype: of what is frozen.
        stored_features: whether the tower's features are read from disk, so that it does not run.
        devices: that train together with DDP.

    Raises:
        ValueError: if the stage does not fit the model.
    """
    model = _shapes_of(config, dtype)
    freeze(model, args.stage or ())
    if args.activation_checkpointing:
        model.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
    with FakeTensorMode():
        replaced: dict[int, torch.Tensor] = {}  # by id: a tied weight stays one
        model._apply(lambda t: replaced.setdefault(id(t), torch.empty(t.shape, dtype=t.dtype)))
        model.tie_weights()
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        cost = StepCost(0, _bytes_by_type(model), optimizer=_optimizer_bytes(model, args))
        for parameter in trained:  # there from the start, as where batches are accumulated
            parameter.grad = torch.empty_like(parameter)
            cost.gradients += parameter.grad.nbytes
        cost.buckets = cost.gradients if devices > 1 else 0
        with torch.no_grad():
            cost.visual_tokens = model.model.get_vision_tokens(torch.empty(1, 3, *image_size))[0].shape[1]
        inputs = _inputs(model, batch, image_size, stored_features)
        half = torch.bfloat16 if args.bf16 or args.fp16 else None
        live = _LiveBytes()
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as flops, live:
            with torch.autocast("cpu", half, enabled=half is not None):
                loss = _loss(model, batch, **inputs)
            loss.backward()
        cost.flops, cost.activations = flops.get_total_flops(), live.most + sum(t.nbytes for t in inputs.values())
    return cost


def _shapes_of(config: AgeVlmConfig, dtype: torch.dtype) -> AgeVlmForConditionalGeneration:
    """A model without values. It is made on the meta device, because towers read values of their own while they are made."""
    with torch.device("meta"):
        return AgeVlmForConditionalGeneration._from_config(config, dtype=dtype)


def _bytes_by_type(model: nn.Module) -> dict[str, int]:
    found: Counter[str] = Counter()
    for tensor in (*model.parameters(), *model.buffers()):
        found[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return dict(found)


def _optimizer_bytes(model: nn.Module, args: AgeVlmTrainingArguments) -> int:
    """AdamW has two states of each number that trains, Muon one of each number of its matrices. Other optimizers count as AdamW."""
    groups = optimizer_groups(model, 0.0, muon=MuonOptions() if args.optim == MUON else None)
    states = [(1 if group.get("use_muon") else 2, parameter) for group in groups for parameter in group["params"]]
    return sum(number * parameter.nbytes for number, parameter in states)


def _inputs(
    model: AgeVlmForConditionalGeneration, batch: BatchShape, image_size: tuple[int, int], stored_features: bool
) -> dict[str, torch.Tensor]:
    """What the data loader brings for the images: pixels, or the tower's features."""
    if not batch.images:
        return {}
    pixels = torch.empty(batch.images, 3, *image_size)
    if not stored_features:
        return {"pixels": pixels}
    with torch.no_grad():
        return {"features": model.model.get_vision_tokens(pixels)[0].detach()}


def _loss(
    model: AgeVlmForConditionalGeneration,
    batch: BatchShape,
    pixels: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss, through the model's parts: which image belongs to which row depends on values, and there are none."""
    inner, rows = model.model, batch.rows
    ids = torch.empty(rows, batch.tokens, dtype=torch.long)
    if pixels is not None:
        features, _, _ = inner.get_vision_tokens(pixels)
    if features is None:
        states, _ = inner._blank_image(rows, ids.device)
    else:
        projected = inner.project_vision_tokens(features, (features.shape[1], 1))
        slots = -(-batch.images // rows)
        places = torch.empty(batch.images, dtype=torch.long)
        states = projected.new_zeros(rows * slots, *projected.shape[1:]).index_put((places,), projected)
        states = states.reshape(rows, -1, projected.shape[-1])
    embeddings = model.get_input_embeddings()(ids)
    outputs = inner.language_model(
        inputs_embeds=embeddings,
        # A mask, because batches are padded.
        attention_mask=torch.ones(rows, 1, batch.tokens, batch.tokens, dtype=torch.bool),
        cross_attention_states=states.to(embeddings.dtype),
        visual_positions=torch.empty(states.shape[:2], dtype=torch.long),
        use_cache=False,
    )
    logits = model.lm_head(outputs.last_hidden_state[:, : batch.learned])
    labels = torch.empty(logits.shape[:2], dtype=torch.long)
    return model.loss_function(
        logits=logits, labels=None, shift_labels=labels, vocab_size=model.config.text_config.vocab_size
    )
