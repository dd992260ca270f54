# SPDX-License-Identifier: Apache-2.0
"""How options of several commands are read."""

import json
from pathlib import Path
from typing import Any

import typer

FIGURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")


def parse_json(text: str | None, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{option} is not JSON ({error}): write for example '{{\"features_only\": true}}'."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{option} must be a JSON object, got {text}.")
    return value


def check_folder(option: typer.CallbackParam, file: Path | None) -> Path | None:
    """The callback of an option for a file to write: its folder must exist before work begins."""
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"{option.opts[0]} {file}: there is no folder {file.absolute().parent}; create it")
    return file


def check_figure(option: typer.CallbackParam, file: Path | None) -> Path | None:
    """The callback of an option for a figure to write: its folder and its format are checked before work begins."""
    if file is not None and file.suffix.lower() not in FIGURE_SUFFIXES:
        raise ValueError(f"{option.opts[0]} {file}: the name of a figure must end with {', '.join(FIGURE_SUFFIXES)}")
    return check_folder(option, file)


def check_text(text: str, what: str) -> str:
    """The text, which a tokenizer must be able to read: the shell may hand over bytes that are no characters."""
    from ..processing.rows import is_unicode

    if not is_unicode(text):
        raise ValueError(f"{what} is not UTF-8: {text!a:.80}. Write it in the encoding of your terminal.")
    return text


def check_maps(model: str) -> None:
    """Refuses a model without cross-attention maps before its weights are loaded."""
    from transformers import AutoConfig

    from ..hub import loading
    from ..inference.attention import check_cross_attention

    with loading(model) as place:
        config = AutoConfig.from_pretrained(place)
    check_cross_attention(config, model)


def parse_names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def parse_numbers(text: str | None, option: str, kind: type) -> list | None:
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} must be numbers with commas between them, got '{text}'.") from error
