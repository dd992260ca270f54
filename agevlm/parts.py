# SPDX-License-Identifier: Apache-2.0
"""Which parts a model was assembled from: where a part is found, and digests of its tensors.

[`~agevlm.from_parts`] writes this into the model's configuration, as `parts`. It goes wherever the configuration goes: into every
checkpoint of every stage, and onto the Hub. A folder of [`~agevlm.deltas.save_trained`] has it in `parts.json`. [`read_parts`] reads
both. For `text_model` and `vision_model` it has

    hub_id, revision    the part is a model of the Hub, at this commit
    package_file        the part is a file inside an installed package, as `package:MODULE/FILE`
    by_order            the file has a timm model's tensors under other names, in the same order (`load_timm`)
    dtype               the type that the part was loaded in
    digests             of its tensors, see `digest_tensors`

A part of a local folder or file has neither `hub_id` nor `package_file`: a path would mean nothing elsewhere. Its digests alone say
what it is. Parts are compared by digests in any case.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import PACKAGE_PREFIX

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PART_NAMES = ("text_model", "vision_model")

_TEXT, _VISION, _HEAD = "model.language_model.", "model.vision_tower.", "lm_head.weight"

_FRESH_NAMES = {"multi_modal_projector": "adapter", "cross_attn": "cross_attention"}
_FRESH = re.compile(rf"(?:^|\.)({'|'.join(_FRESH_NAMES)})\.(.+)")

PARTS_FILE = "parts.json"
"""Of a folder that has only what was trained."""

DIGEST = 12
"""Hexadecimal digits of a tensor's digest."""

ROUNDED = ("bfloat16", "float16")
"""Types that a frozen part may be rounded to after it was assembled, because a checkpoint is loaded in one type."""


def read_parts(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """The parts of a model in a folder, whole or only what was trained; empty where its files do not tell them.

    Raises:
        OSError: if the folder has no model.
        ValueError: if the file is damaged.
    """
    file = Path(folder, PARTS_FILE)
    whole = not file.is_file()
    file = Path(folder, "config.json") if whole else file
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        parts = values.get("parts", {}) if whole else values
        if not whole and (missing := [name for name in PART_NAMES if name not in parts]):
            raise ValueError(f"it lacks {missing[0]}")
        if not all(isinstance(parts[name], dict) and isinstance(parts[name]["digests"], dict) for name in parts):
            raise ValueError("a part has no digests")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): replace the file, or name another model.") from error
    return parts


def base_models(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The parts that are models of the Hub, by their ids."""
    return [part["hub_id"] for part in parts.values() if "hub_id" in part]


def unnamed_parts(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The parts that were in local folders or files, so that only their digests are known."""
    return [name for name, part in parts.items() if not {"hub_id", "package_file"} & part.keys()]


def locate_part(name: str, revision: str | None = None, by_order: bool = False) -> dict[str, Any]:
    """Where a part is found that was just loaded by its name: the fields before `dtype`.

    Args:
        name: as [`~agevlm.from_parts`] and [`~agevlm.load_timm`] take it.
        revision: of the Hub, if it was named.
        by_order: as for [`~agevlm.load_timm`].
    """
    ordered = {"by_order": True} if by_order else {}
    if name.startswith(PACKAGE_PREFIX):
        return {"package_file": name, **ordered}
    if is_hub_id(name):
        from huggingface_hub import try_to_load_from_cache

        # The commit is the name of the folder in the cache that it was loaded from.
        if isinstance(file := try_to_load_from_cache(name, "config.json", revision=revision), str):
            return {"hub_id": name, "revision": Path(file).parent.name}
    return ordered


def is_hub_id(name: str) -> bool:
    """Whether a name is that of a Hub repository and not of a local file or folder."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None and not os.path.exists(name)


def part_tensors(model: PreTrainedModel) -> dict[str, dict[str, torch.Tensor]]:
    """The parameters and buffers of each part of an [`~agevlm.AgeVlmForConditionalGeneration`], by their names in it, in the order of
    the names, tied ones once; and as `fresh` those that no part brings: the adapter's and the cross-attention's."""
    found: dict[str, dict[str, torch.Tensor]] = {"text_model": {}, "vision_model": {}, "fresh": {}}
    for name, tensor in sorted(model.state_dict().items()):
        if name == _HEAD and model.config.tie_word_embeddings:
            continue
        if name.startswith(_VISION):
            found["vision_model"][name] = tensor
        elif name.startswith((_TEXT, _HEAD)) and ".cross_attn." not in name:
            found["text_model"][name] = tensor
        else:
            found["fresh"][name] = tensor
    return found


def name_part_tensors(part: str, model: PreTrainedModel, *, tied: bool) -> dict[str, torch.Tensor]:
    """The same of a part by itself, under the names that they have in the whole model.

    Args:
        part: `text_model` or `vision_model`.
        tied: whether the whole model's head is its embedding.
    """
    if part == "vision_model":
        named = {f"{_VISION}{name}": tensor for name, tensor in model.state_dict().items()}
    else:
        named = {f"{_TEXT}{name}": tensor for name, tensor in model.model.state_dict().items()}
        named |= {} if tied else {_HEAD: model.lm_head.weight.detach()}
    return dict(sorted(named.items()))


def fingerprint_trained(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest (16 hexadecimal digits) of trained weights: their names, shapes and all values, rounded to bfloat16, so that a
    checkpoint has one fingerprint whether it is saved or loaded in float32 or bfloat16."""
    import torch

    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tuple(tensor.shape)}\n".encode())
        rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous().reshape(-1)
        sha.update(rounded.view(torch.uint8).numpy().data if rounded.numel() else b"")
    return sha.hexdigest()[:16]


def read_fingerprint(folder: str | os.PathLike) -> str | None:
    """The fingerprint of what was trained in a folder, read from its safetensors without loading a model: of the adapter and the
    cross-attention, which every training changes, and in a whole checkpoint as in its delta; of a PEFT adapter all of it.

    Returns:
        None where the folder has neither.

    Raises:
        ValueError: if a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    if file.name.startswith("adapter_model"):
                        found[name] = opened.get_tensor(name)
                    elif match := _FRESH.search(name):
                        found[f"{_FRESH_NAMES[match[1]]} {match[2]}"] = opened.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): replace the file.") from error
    return fingerprint_trained(found) if found else None


def describe_parts(model: PreTrainedModel, places: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a freshly assembled model's configuration says of its parts; nothing of one on the meta device, which has no values.

    Args:
        places: by part what [`locate_part`] returned.
    """
    tensors = part_tensors(model)
    if model.device.type == "meta":
        return {}
    described = {}
    for part in PART_NAMES:
        digests = {"exact": digest_tensors(tensors[part].values())}
        for dtype in ROUNDED:
            if (rounded := digest_tensors(tensors[part].values(), dtype)) != digests["exact"]:
                digests[dtype] = rounded
        dtypes = [str(tensor.dtype) for tensor in tensors[part].values() if tensor.is_floating_point()]
        described[part] = {**places[part], "dtype": dtypes[0].removeprefix("torch."), "digests": digests}
    return described


def digest_tensors(tensors: Iterable[torch.Tensor], dtype: str | None = None) -> str:
    """A digest of [`DIGEST`] digits for each tensor, one behind the other.

    It is of the shape and of all values in float32, so that it does not depend on the type that holds them. A tensor of integers
    is digested as it is, and one of float64 whose values float32 cannot hold equals no other.

    Args:
        dtype: what the values are rounded to before.
    """
    # Threads, because hashing sets the interpreter free: of a model with 1 billion parameters it takes seconds.
    with ThreadPoolExecutor() as threads:
        return "".join(threads.map(lambda tensor: _digest(tensor, dtype), tensors))


def _digest(tensor: torch.Tensor, dtype: str | None) -> str:
    import torch

    values = tensor.detach().cpu()
    if values.is_floating_point():
        values = values if dtype is None else values.to(getattr(torch, dtype))
        single = values.float()
        values = single if values.dtype != torch.float64 or torch.equal(single.double(), values) else values
    flat = values.contiguous().reshape(-1)
    sha = hashlib.sha256(f"{tuple(values.shape)}".encode())
    sha.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return sha.hexdigest()[:DIGEST]
