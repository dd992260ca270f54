# SPDX-License-Identifier: Apache-2.0
"""Where models are loaded from: a folder here, or a repository of the Hugging Face Hub; what is said when that fails; and which
files of a folder travel."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["model", "data set"]
T = TypeVar("T")

PICKLES = ("*.bin", "*.pt", "*.pt2", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib")
"""Files of these names stay here: they can run code where they are loaded, and Transformers reads safetensors."""

LEFT_OUT = {
    "a checkpoint of training, for resuming it": ("checkpoint-[0-9]*/*", "*/checkpoint-[0-9]*/*"),
    "a pickle, which can run code where it is loaded": PICKLES,
    "a log of training, which can show your data": ("runs/*", "*.tfevents.*", "wandb/*", "trackio/*", "mlruns/*"),
    "hidden": (".*", "*/.*", "__pycache__/*", "*/__pycache__/*"),
}
"""What stays where it is when a folder travels, by reason: patterns of paths."""

MODEL_TYPE = "agevlm"
"""Of an AGE-VLM's configuration."""

PATIENCE = 8.0
"""Seconds in which the Hub must answer whether it has a repository."""

ANSWER_LASTS = 60.0
"""Seconds in which the Hub is not asked again for the same: a model is loaded in several blocks of [`loading`]."""

_answers: dict[tuple[str, Kind], tuple[float, Exception | None]] = {}

# Names that begin like paths, and names of files.
_PATH = re.compile(r"[./~\\]|.*\.(jsonl?|ya?ml|parquet|arrow|csv|txt|safetensors|bin|pth?|ckpt|gguf|zip|tar|gz)$")
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")


def ask_hub(name: str, kind: Kind) -> Exception | None:
    """Whether the Hub has a repository, found out within [`PATIENCE`].

    Returns:
        None if it has, else why this could not be found out: the Hub does not answer, or must not be asked (HF_HUB_OFFLINE).

    Raises:
        FileNotFoundError: if it has none, or the name is none of a repository but a path.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        is_path = True
    else:
        is_path = _PATH.match(name) is not None
    if is_path:
        raise FileNotFoundError(f"{_missing(name, kind)}: name one that exists, or a {kind} of the Hub as OWNER/NAME.")

    asked, error = _answers.get((name, kind), (-math.inf, None))
    if time.monotonic() - asked < ANSWER_LASTS:
        return error
    error = None
    try:
        within_patience(lambda: HfApi().repo_info(name, repo_type=kind.replace(" ", ""), timeout=PATIENCE))
    except Exception as failure:
        error = failure
    if isinstance(error, RepositoryNotFoundError):
        raise FileNotFoundError(
            f"{_missing(name, kind)}, and the Hub has no {kind} of this name: correct the name, or log in with `hf auth login` if it is private."
        ) from error
    _answers[name, kind] = time.monotonic(), error
    return error


def within_patience(ask: Callable[[], T]) -> T:
    """What a question to the Hub returns, or raises; a `TimeoutError` where it takes longer than [`PATIENCE`]."""
    answers: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue()

    def answer() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    # In a thread, because a name server that does not answer knows no time limit.
    threading.Thread(target=answer, daemon=True).start()
    try:
        found, error = answers.get(timeout=PATIENCE)
    except queue.Empty:
        raise TimeoutError(f"no answer in {PATIENCE:g} seconds") from None
    if error is not None:
        raise error
    return cast(T, found)


def unreachable(name: str, kind: Kind, error: Exception) -> FileNotFoundError:
    """What to raise where neither a folder, nor the cache, nor the Hub has what is named."""
    reason = str(error).split("\n")[0] or type(error).__name__
    return FileNotFoundError(
        f"{_missing(name, kind)}, and the Hub cannot be asked for a {kind} of this name ({reason}): correct the name, or "
        "connect to the Hub."
    )


def _missing(name: str, kind: Kind) -> str:
    return f"there is no folder {name}" if kind == "model" else f"no such file or folder: {name}"


def find_model(name: str | os.PathLike, revision: str | None = None) -> str:
    """What to load a model or a processor from, for `from_pretrained`.

    Args:
        name: a folder, or the id of a model on the Hub.
        revision: of the Hub.

    Returns:
        The name itself, or the folder in the cache that has the model where the Hub does not answer.

    Raises:
        FileNotFoundError: if there is neither a folder nor a model on the Hub of this name.
        ValueError: if it is a file, or a folder whose weights are all pickled.
    """
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = os.fspath(name)
    if os.path.isdir(name):
        _refuse_pickles(Path(name))
        return name
    if os.path.exists(name):
        raise ValueError(f"{name} is a file: name the folder of a model, or a model of the Hub as OWNER/NAME.")
    if (error := ask_hub(name, "model")) is None:
        return name
    try:
        cached = snapshot_download(name, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        raise unreachable(name, "model", error) from error
    return name if is_offline_mode() else cached  # by its name, each file would be asked for several times


def _refuse_pickles(folder: Path) -> None:
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    pickled = [name for name in files if name.endswith(_WEIGHTS) and name.startswith(("pytorch_model", "model"))]
    if pickled and not any(name.endswith((".safetensors", ".gguf")) for name in files):
        raise ValueError(
            f"{folder / pickled[0]}: weights in this format are not read, because such files can run code. If you trust "
            "its source, convert the model: load it with Transformers, and save it with `save_pretrained`, which writes "
            "safetensors."
        )


@contextlib.contextmanager
def loading(name: str | os.PathLike, revision: str | None = None) -> Iterator[str]:
    """Finds a model ([`find_model`]), and makes one error of all that can go wrong while it is loaded in the block.

    Raises:
        OSError: if there is no such model, or it lacks a file.
        ValueError: if one of its files is damaged, or does not fit the others; names the file where it can be found out.
    """
    place = find_model(name, revision)
    try:
        yield place
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # readers raise errors of many types for damaged files
        if type(error).__name__ == "OutOfMemoryError":  # of torch, which need not be loaded
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            message = f"there is no {message}"
        message = message if len(message) < 600 else f"{message[:600]} …"
        damaged = damaged_file(Path(place)) if os.path.isdir(place) else None
        if damaged is not None:
            raise ValueError(f"{damaged}: replace the file, or name another model.") from error
        if isinstance(error, OSError):
            raise OSError(f"{name} cannot be loaded: {message}") from error
        raise ValueError(f"{name} cannot be loaded: {message}") from error


def load_pretrained(
    model_class: Any,
    name: str | os.PathLike,
    *,
    prepare: Callable[[PreTrainedModel], None] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """`from_pretrained` of a model, which refuses a checkpoint that lacks weights.

    Transformers gives random values to weights that a checkpoint lacks, and only warns of it.

    Args:
        model_class: a model class or an Auto class.
        name: folder or Hub id of a model, or of a PEFT adapter.
        prepare: called with the model before it is compared with its checkpoint, to remove what is not used.
        kwargs: for `from_pretrained`.

    Raises:
        OSError: if there is no such model, or it lacks a file.
        ValueError: if one of its files is damaged, the checkpoint lacks weights of the model or has them in other shapes, or it
            has weights that an AGE-VLM does not have.
    """
    revision = kwargs.get("revision")
    if (
        base := adapter_base(name, revision)
    ) is not None:  # by itself, because Transformers tells of the adapter's weights only
        load_pretrained(model_class, base, prepare=prepare, **kwargs)
    with loading(name, revision) as place:
        model, found = model_class.from_pretrained(
            place, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    if prepare is not None:
        prepare(model)
    check_loaded(model, found, name)
    return model


def adapter_base(name: str | os.PathLike, revision: str | None = None) -> str | None:
    """The model that a PEFT adapter was trained on; None for what is no adapter.

    Raises:
        OSError: if there is no such model.
        ValueError: if the adapter's configuration is damaged.
    """
    from transformers.utils import cached_file

    with loading(name, revision) as place:
        adapter = cached_file(
            place, "adapter_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
        )
        if adapter is None or os.path.isfile(os.path.join(place, "config.json")):
            return None
        return json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]


def check_loaded(model: PreTrainedModel, found: dict[str, Any], name: str | os.PathLike) -> None:
    """
    Args:
        found: what `from_pretrained` gave as its loading info.

    Raises:
        ValueError: if the model has weights that it did not find, or found in other shapes, or an AGE-VLM found others.
    """
    from .modeling_agevlm.modeling_agevlm import AgeVlmPreTrainedModel

    missing = sorted(found["missing_keys"] & model.state_dict().keys())
    shapes = [
        f"{key} has the shape {tuple(there)}, and {tuple(here)} in the model"
        for key, there, here in sorted(found["mismatched_keys"])
    ]
    unexpected = sorted(found["unexpected_keys"]) if isinstance(model, AgeVlmPreTrainedModel) else []
    problems = [
        *([f"it lacks {shorten(missing)}, which would be random"] if missing else []),
        *([shorten(shapes, "; ")] if shapes else []),
        *([f"it has {shorten(unexpected)}, which the model does not have"] if unexpected else []),
    ]
    if problems:
        raise ValueError(
            f"{name} does not have the weights of its {type(model).__name__}: {'; '.join(problems)}. Copy or save it again, or "
            "name another model."
        )


def shorten(names: Sequence[str], separator: str = ", ") -> str:
    return separator.join(names[:5]) + (f"{separator}and {len(names) - 5} more" if len(names) > 5 else "")


def load_processor(name: str | os.PathLike) -> Any:
    """The processor of a model, whose tokenizer reads a text and whose chat template works, if it has them.

    Raises:
        OSError: if there is no such model, or it has no processor.
        ValueError: if one of its files is damaged, or its chat template fails.
    """
    from transformers import AutoProcessor, ProcessorMixin

    with loading(name) as place:
        processor = AutoProcessor.from_pretrained(place)
        if (tokenizer := getattr(processor, "tokenizer", None)) is not None:
            tokenizer("text", truncation=True)  # settings of wrong types fail here only
    if isinstance(processor, ProcessorMixin) and processor.chat_template is not None:
        check_chat_template(processor, name)
    return processor


def check_chat_template(processor: Any, name: str | os.PathLike) -> str:
    """Renders a question about an image, so that a template that is no Jinja, or fails, is refused before any work.

    Returns:
        The rendered question, "What is this?".

    Raises:
        ValueError: if it fails; names the model.
    """
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    try:
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template is a program, which can fail in any way
        raise ValueError(
            f"the chat template of {name} fails ({type(error).__name__}: {error}): correct its chat_template.jinja, or name "
            "another model"
        ) from error


def traveling_files(folder: str | os.PathLike) -> tuple[dict[str, Path], dict[str, str]]:
    """The files of a folder that travel with it, to the Hub and into another form of the same model; and the reasons why the
    others do not. By path in the folder."""
    files, left_out = {}, {}
    for file in sorted(Path(folder).rglob("*")):
        path = file.relative_to(folder).as_posix()
        if not file.is_file():
            continue
        why = next(
            (why for why, patterns in LEFT_OUT.items() if any(fnmatch(path.lower(), p) for p in patterns)), None
        )
        if why is None or (why == "hidden" and fnmatch(path, ".eval_results/*.yaml")):
            files[path] = file
        else:
            left_out[path] = why
    return files, left_out


def damaged_file(folder: Path) -> str | None:
    """The first file of a model's folder that cannot be read at all, and why."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.iterdir()):
        try:
            if file.suffix == ".json":
                if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict | list):
                    return f"{file} is damaged (it is not a JSON object)"
            elif file.suffix == ".jinja":
                file.read_text(encoding="utf-8")
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
        except OSError as error:
            return f"{file} cannot be read ({error.strerror or error})"
        except (ValueError, SafetensorError, RecursionError) as error:
            size = f"{file.stat().st_size} bytes"
            return f"{file} is damaged ({size}; {' '.join(str(error).split()) or type(error).__name__})"
    return None
