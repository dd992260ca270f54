# SPDX-License-Identifier: Apache-2.0
"""Resume or refuse: work that was stopped resumes with the settings that it began with, and with no others.

One engine for answers of benchmarks, masks of teachers, cached features, runs of experiments and stages of training.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import new_file

if TYPE_CHECKING:
    import torch
    from torch import nn


def digest(parts: Iterable[Any]) -> str:
    """A short digest (16 hexadecimal digits) of values that JSON can hold."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return sha.hexdigest()[:16]


def fingerprint(model: "nn.Module") -> str:
    """A digest (16 hexadecimal digits) of all weights and buffers of a model: their names, types, shapes and every value.

    It reads all weights once, which takes about a second per gigabyte.
    """
    import torch

    sha = hashlib.sha256()
    for name, tensor in stored_tensors(model):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return sha.hexdigest()[:16]


def stored_tensors(model: "nn.Module") -> "Iterator[tuple[str, torch.Tensor]]":
    """The weights and buffers of a model as they are stored, by name and in the order of names.

    A quantized weight of torchao or quanto is one tensor that wraps several: integers and scales.
    """

    def unwrap(name: str, tensor: "torch.Tensor") -> "Iterator[tuple[str, torch.Tensor]]":
        if not hasattr(tensor, "__tensor_flatten__"):
            yield name, tensor
            return
        for part in tensor.__tensor_flatten__()[0]:
            yield from unwrap(f"{name}.{part}", getattr(tensor, part))

    for name, tensor in sorted(model.state_dict().items()):
        yield from unwrap(name, tensor)


def changed(kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Former and new value of each setting that differs. Nested mappings, and lists of them, are compared key by key, named
    with dots."""
    before, now = (_flatten(json.loads(json.dumps(settings, default=str))) for settings in (kept, wanted))
    keys = sorted(before.keys() | now.keys())
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def differences(kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between two settings, as `seed was 0 and is 1; data.rows was 10 and is 20`; empty where nothing does."""
    return describe(changed(kept, wanted))


def describe(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """What [`changed`] returned, as a text."""
    return "; ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in changes.items())


def resume_or_refuse(file: str | os.PathLike, settings: Mapping[str, Any]) -> bool:
    """Compares `settings` with those that the work beside `file` began with, or begins it.

    Args:
        file: the JSON file of the settings. Where it does not exist, it is written atomically.
        settings: all that the result depends on, and nothing else; values that JSON can hold.

    Returns:
        True where work began with the same settings and can be resumed, False where it begins now.

    Raises:
        FileExistsError: where work began with other settings; names each one and the fix.
        ValueError: where the file is not a file of settings.
    """
    file = Path(file)
    if not file.is_file():
        with new_file(file) as partial:
            text = json.dumps(settings, indent=1, ensure_ascii=False, default=str)
            partial.write_text(text + "\n", encoding="utf-8")
        return False
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(kept, dict):
            raise ValueError("expected a JSON object")
    except ValueError as error:
        raise ValueError(f"{file} is not a file of settings ({error}); {FIX.format(place=file.parent)}") from error
    refuse_changes(kept, settings, file.parent)
    return True


def refuse_changes(kept: Mapping[str, Any], wanted: Mapping[str, Any], place: str | os.PathLike) -> None:
    """
    Args:
        kept: the settings that the work in `place` began with.
        wanted: the settings of this run.
        place: the file or folder that holds the work, for the message.

    Raises:
        FileExistsError: if they differ; names each difference and the fix.
    """
    if changes := differences(kept, wanted):
        raise FileExistsError(f"{place} holds work of other settings ({changes}); {FIX.format(place=place)}")


FIX = "resume it with its own settings, choose another output folder, or delete {place} to start over"
"""What users can do about work of other settings in `place`."""


def _flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(settings, list) and settings and all(isinstance(item, dict) for item in settings):
        settings = {str(number): item for number, item in enumerate(settings)}
    if not isinstance(settings, dict) or (not settings and prefix):
        return {prefix.rstrip("."): settings}
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.")
    return flat
