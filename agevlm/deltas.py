# SPDX-License-Identifier: Apache-2.0
"""Deltas: folders that have what was trained, and name the parts that all else comes from.

A delta of [`save_trained`] has

    trained.safetensors    the adapter, the cross-attention, and those tensors of the parts that training has changed
    parts.json             the parts, as [`agevlm.parts`] describes them; of each also
        trained            the names of its tensors that are in trained.safetensors
        rounded            the type that its other tensors were rounded to after it was assembled, if they were
    config.json, generation_config.json and the processor's files

[`load_trained`] loads the parts, puts in what was trained, and gives the model that a whole checkpoint would give, to the last bit.
"""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from .build import load_llama, load_timm, load_vision
from .files import new_folder, resolve_package_file
from .hub import adapter_base, check_loaded, load_pretrained, load_processor, loading, shorten, traveling_files
from .modeling_agevlm.configuration_agevlm import AgeVlmConfig
from .modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration, remove_pooling_head
from .parts import DIGEST, PART_NAMES, PARTS_FILE, digest_tensors, name_part_tensors, part_tensors, read_parts
from .provenance import identify, model_provenance, write_provenance

TRAINED_FILE = "trained.safetensors"

_TITLES = {"text_model": "text model", "vision_model": "vision model"}


# --- saving ---


def trained_tensors(
    model: PreTrainedModel, trains: Collection[str] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """What a model has beyond its parts: the adapter, the cross-attention, and the parameters and buffers whose digests are no longer
    those of the part. Tied weights count once.

    A part may have been rounded to another type since it was assembled. That is no training, as long as it holds for all of its
    other tensors.

    Args:
        trains: names of parameters that count even if they are still as in the part.

    Returns:
        The tensors by name, and the content of `parts.json`.

    Raises:
        ValueError: if the model does not know its parts, has layers that they do not have (LoRA), or is quantized.
    """
    check_knows_parts(model)
    tensors = part_tensors(model)
    trained, parts = dict(tensors["fresh"]), copy.deepcopy(model.config.parts)
    for part, entry in parts.items():
        own = tensors[part]
        now = _split(digest_tensors(own.values()))
        forms = {form: _split(digests) for form, digests in entry["digests"].items()}
        if len(now) != len(forms["exact"]):
            raise ValueError(
                f"The {_TITLES[part]} has {len(now)} tensors and was assembled with {len(forms['exact'])}: its layers are others, so "
                "that what was trained cannot be told. Save the whole model with save_pretrained."
            )
        changed = {
            form: [name for name, a, b in zip(own, now, digests, strict=True) if a != b or name in trains]
            for form, digests in forms.items()
        }
        form = min(changed, key=lambda form: len(changed[form]))  # `exact` is the first, and so of equals
        entry["trained"] = changed[form]
        if form != "exact":
            entry["rounded"] = form
        trained.update({name: own[name] for name in changed[form]})
    return trained, parts


def check_knows_parts(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: if [`trained_tensors`] cannot tell what was trained in a model; says why, and what to do.
    """
    if hasattr(model, "get_base_model") or any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError(
            "This is a PEFT model, whose own save_pretrained writes only what was trained. To save it as a delta, merge it first: "
            "model = model.merge_and_unload()."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("A quantized model has other weights than its parts: save it with save_pretrained.")
    if not isinstance(model, AgeVlmForConditionalGeneration):
        raise ValueError(f"Only an AgeVlmForConditionalGeneration has parts, got {type(model).__name__}.")
    if not getattr(model.config, "parts", None):
        raise ValueError(
            "The model's configuration does not say which parts it was assembled from. `agevlm build` and from_parts write that; a "
            "model without it is saved as a whole, with save_pretrained."
        )


def save_trained(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    processor: Any = None,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Saves what was trained, and the names and digests of the parts, in a folder for [`load_trained`].

    Args:
        model: assembled by [`~agevlm.from_parts`] or `agevlm build`, and trained since.
        folder: does not exist yet, or is empty; it appears complete or not at all.
        processor: saved with it, so that the folder is a model that every command takes.
        dtype: what trained tensors are rounded to, for a smaller file; by default they keep their types.
        metadata: of the safetensors file.

    Raises:
        ValueError: as [`trained_tensors`], or if trained values are not finite.
        OSError: if the folder has content, or cannot be written.
    """
    with new_folder(folder) as partial:
        write_trained(model, partial, dtype=dtype, metadata=metadata)
        if provenance := model_provenance(model.name_or_path):
            write_provenance(partial, {**provenance, "untrained": False})
        if processor is not None:
            processor.save_pretrained(partial)


def write_trained(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    trains: Collection[str] = (),
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the model's files of [`save_trained`] into a folder that exists.

    Args:
        trains: parameters that are written even if they are still as in the part.
    """
    trained, parts = trained_tensors(model, trains)
    tensors = {}
    for name, tensor in trained.items():
        value = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        _check_finite(name, value)
        tensors[name] = value
    folder = Path(folder)
    save_file(tensors, folder / TRAINED_FILE, {"format": "pt", **(metadata or {})})
    (folder / PARTS_FILE).write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = model.dtype, ["AgeVlmForConditionalGeneration"]
    del config.parts
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _split(digests: str) -> list[str]:
    return [digests[start : start + DIGEST] for start in range(0, len(digests), DIGEST)]


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{name} has values that are not finite: its training has diverged.")


# --- loading ---


def is_delta(name: str | os.PathLike, revision: str | None = None) -> bool:
    """Whether a folder or a model of the Hub is a delta.

    Raises:
        OSError: if there is no such model.
    """
    with loading(name, revision) as place:
        if os.path.isdir(place):
            return Path(place, PARTS_FILE).is_file()
        return (
            cached_file(place, PARTS_FILE, revision=revision, _raise_exceptions_for_missing_entries=False) is not None
        )


def identify_adapted(name: str | os.PathLike) -> dict[str, Any]:
    """What to call the model that an adapter is put on in public ([`~agevlm.provenance.identify`]), and `delta` where it is one."""
    with contextlib.suppress(OSError, ValueError):
        if is_delta(name):
            return {**identify(name), "delta": True}
    return identify(name)


def load_checkpoint(
    model_class: Any,
    name: str | os.PathLike,
    *,
    text_model: str | PreTrainedModel | None = None,
    vision_model: str | PreTrainedModel | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """[`~agevlm.hub.load_pretrained`] of a whole checkpoint, [`load_trained`] of a delta, and of a PEFT adapter for a delta."""
    revision = kwargs.get("revision")
    if is_delta(name, revision):
        return load_trained(name, text_model, vision_model, **kwargs)
    if (base := adapter_base(name, revision)) is None or not is_delta(base):
        return load_pretrained(model_class, name, **kwargs)
    model = load_trained(base, text_model, vision_model, **{**kwargs, "revision": None})
    with loading(name, revision) as place:
        found = model.load_adapter(place, adapter_kwargs={"revision": revision})
    check_loaded(model, found.to_dict(), name)
    return model


def load_trained(
    name: str | os.PathLike,
    text_model: str | os.PathLike | PreTrainedModel | None = None,
    vision_model: str | os.PathLike | PreTrainedModel | None = None,
    *,
    dtype: torch.dtype | str | None = "auto",
    revision: str | None = None,
    **kwargs: Any,
) -> AgeVlmForConditionalGeneration:
    """The model of a delta: its parts, with what was trained in their place.

    Every tensor of a part must be the one that the model was assembled from: shapes and all values, as they are in the type that the
    part was loaded in then, are compared by their digests. The model equals that of a whole checkpoint in the same `dtype`, to the
    last bit.

    Args:
        name: folder, or id of a model on the Hub.
        text_model: the Llama that it was assembled from, as for [`~agevlm.from_parts`]. By default the model of the Hub or the file of a
            package that `parts.json` names.
        vision_model: the vision backbone, as for [`~agevlm.from_parts`], or the weight file of a timm model.
        dtype: as for `from_pretrained`.
        revision: of the delta on the Hub; `parts.json` has those of the parts.
        kwargs: for `from_pretrained` (`device_map`, `attn_implementation`, ...).

    Raises:
        OSError: if there is no such delta, a file of it or a part is missing, or the Hub cannot be reached.
        ValueError: if it is no delta, a file is damaged, a part is another one or must be named, or a trained tensor is missing,
            unexpected, of another shape or not finite.
    """
    with loading(name, revision) as place:
        folder = Path(place if os.path.isdir(place) else snapshot_download(place, revision=revision))
    _check_delta(folder, name)
    parts = read_parts(folder)
    tensors = read_trained(folder)
    with loading(folder):
        config = AgeVlmConfig.from_pretrained(folder)
    _check_names(folder, parts, tensors)
    state = {}
    for part, given in zip(PART_NAMES, (text_model, vision_model), strict=True):
        entry = parts[part]
        source = entry.get("hub_id") or entry.get("package_file") if given is None else given
        source = os.fspath(source) if isinstance(source, os.PathLike) else source
        if source is None:
            raise ValueError(
                f"{name} knows its {_TITLES[part]} by digests alone, because it was in a local folder or file: name it with {part}=, or "
                f"make a whole checkpoint with `agevlm build --delta {name} --{part.removesuffix('_model')} PART --out FOLDER`."
            )
        model = _load_part(part, source, entry, config, entry.get("revision") if given is None else None)
        if part == "vision_model":
            remove_pooling_head(model)
        found = name_part_tensors(part, model, tied=bool(config.tie_word_embeddings))
        _check_part(found, part, source, entry, name)
        rounded = getattr(torch, entry["rounded"]) if "rounded" in entry else None
        if others := sorted(found.keys() & tensors.keys() - set(entry["trained"])):
            raise ValueError(
                f"{folder / TRAINED_FILE} has {shorten(others)}, which {PARTS_FILE} does not name: copy both files again."
            )
        for key in found.keys() - tensors.keys():
            state[key] = found[key].to(rounded) if found[key].is_floating_point() else found[key]
    config.name_or_path = os.fspath(name)
    model, info = AgeVlmForConditionalGeneration.from_pretrained(
        None, config=config, state_dict={**state, **tensors}, dtype=dtype, output_loading_info=True,
        ignore_mismatched_sizes=True, **kwargs,
    )  # fmt: skip
    check_loaded(model, info, name)
    if (folder / "generation_config.json").is_file():
        with loading(folder):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = model.config.name_or_path = os.fspath(name)
    model.config.parts = {
        part: {key: value for key, value in entry.items() if key not in ("trained", "rounded")}
        for part, entry in parts.items()
    }
    return model


@torch.no_grad()
def load_trained_into(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Puts what a delta has into a model of the same parts.

    Raises:
        ValueError: if the model has other parts, or differs from them where the delta does not, or as [`load_trained`].
    """
    parts, tensors = read_parts(folder), read_trained(folder)
    changed, own = trained_tensors(model)
    for part, entry in parts.items():
        if own[part]["digests"] != entry["digests"]:
            raise ValueError(f"{folder} has another {_TITLES[part]} than the model that it is put into.")
    if missing := sorted(changed.keys() - tensors.keys()):
        raise ValueError(f"{folder} lacks {shorten(missing)}, in which the model differs from its parts.")
    model.load_state_dict(tensors, strict=False)


def write_whole(
    name: str | os.PathLike,
    output_dir: str | os.PathLike,
    text_model: str | None = None,
    vision_model: str | None = None,
    *,
    dtype: torch.dtype | str = "auto",
) -> AgeVlmForConditionalGeneration:
    """Makes a whole checkpoint of a delta, which loads without `agevlm` and without the parts: the delta's other files, and all
    weights in place of what was trained.

    Args:
        output_dir: does not exist yet, or is empty.

    Raises:
        FileExistsError: if `output_dir` holds something already.
        OSError, ValueError: as [`load_trained`].
    """
    with new_folder(output_dir) as partial:
        model = load_trained(name, text_model, vision_model, dtype=dtype)
        with loading(name) as place:
            folder = Path(place if os.path.isdir(place) else snapshot_download(place))
        _copy_others(folder, partial)
        model.save_pretrained(partial)
        load_processor(name).save_pretrained(partial)
        if provenance := model_provenance(name):
            write_provenance(partial, provenance)
    return model


def write_as_delta(folder: str | os.PathLike, output_dir: str | os.PathLike) -> None:
    """Makes a delta of a whole checkpoint: its other files, and what [`save_trained`] writes in place of its weights.

    Args:
        output_dir: does not exist yet.

    Raises:
        ValueError: as [`save_trained`].
        OSError: if there is no model in the folder.
    """
    model = load_pretrained(AgeVlmForConditionalGeneration, folder)
    _copy_others(Path(folder), Path(output_dir))
    write_trained(model, output_dir)


def _copy_others(folder: Path, output_dir: Path) -> None:
    """Copies what travels of a model's folder beside its weights, such as a calibration and results: they are of the same model
    in its other form."""
    for path, file in traveling_files(folder)[0].items():
        if path != PARTS_FILE and not fnmatch(path, "*.safetensors*"):
            (output_dir / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, output_dir / path)


def read_trained(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a delta.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is damaged, or values are not finite.
    """
    file = Path(folder, TRAINED_FILE)
    if not file.is_file():
        raise FileNotFoundError(f"{folder} lacks {TRAINED_FILE}, the tensors that were trained: copy it again.")
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): replace the file.") from error
    for name, tensor in tensors.items():
        with _naming(file):
            _check_finite(name, tensor)
    return tensors


@contextlib.contextmanager
def _naming(file: Path):
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _check_delta(folder: Path, name: str | os.PathLike) -> None:
    if (folder / PARTS_FILE).is_file():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{name} lacks config.json: copy it again.")
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{name} is a PEFT adapter and no delta: load it with from_pretrained, as its base model.")
    raise ValueError(f"{name} is no delta: it has no {PARTS_FILE}. A whole checkpoint is loaded with from_pretrained.")


def _check_names(folder: Path, parts: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Raises:
        ValueError: if the file lacks tensors of the parts that were trained, or has others.
    """
    named = {name for entry in parts.values() for name in entry["trained"]}
    if missing := sorted(named - tensors.keys()):
        raise ValueError(
            f"{folder / TRAINED_FILE} lacks {shorten(missing)}, which {PARTS_FILE} names: copy both files again."
        )


def _load_part(
    part: str, source: str | PreTrainedModel, entry: Mapping[str, Any], config: AgeVlmConfig, revision: str | None
) -> PreTrainedModel:
    if not isinstance(source, str):
        return source
    if part == "text_model":
        return load_llama(source, entry["dtype"], revision)
    if not os.path.isfile(file := resolve_package_file(source)):
        return load_vision(source, entry["dtype"], revision)
    vision = config.vision_config
    if vision.model_type != "timm_wrapper":
        raise ValueError(f"{source} is a file, and the vision model is no timm model: name its folder.")
    model = load_timm(vision.architecture, file, by_order=entry.get("by_order", False), **(vision.model_args or {}))
    return model.to(getattr(torch, entry["dtype"]))


def _check_part(
    found: Mapping[str, torch.Tensor], part: str, source: Any, entry: Mapping[str, Any], name: str | os.PathLike
) -> None:
    """
    Raises:
        ValueError: if a part is another one than the model was assembled from.
    """
    now, then = _split(digest_tensors(found.values())), _split(entry["digests"]["exact"])
    if now == then:
        return
    others = [key for key, a, b in zip(found, now, then, strict=False) if a != b]
    reason = (
        f"{len(others)} of its {len(now)} tensors have other values or shapes, such as {others[0]}"
        if len(now) == len(then)
        else f"it has {len(now)} tensors and not {len(then)}"
    )
    wanted = f"{entry['hub_id']} at revision {entry['revision']}" if "hub_id" in entry else entry.get("package_file")
    raise ValueError(
        f"{source if isinstance(source, str) else 'The given model'} is not the {_TITLES[part]} that {name} was trained on: {reason}. "
        + (f"Give {part}={wanted}." if wanted else f"Give the one that the model was assembled from as {part}=.")
    )
