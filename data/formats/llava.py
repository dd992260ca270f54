# SPDX-License-Identifier: Apache-2.0
"""Conversations about images in the files of LLaVA (https://github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md).

The file is a list, or has one entry a line:

    {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                    {"from": "gpt", "value": "A dog."}]}

Each `<image>` becomes an image part in its place, and the line breaks beside it are removed. `image` may be a list. An entry
without images has no `image`. No phrase is grounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .building import image_file, stored_size
from .entries import Entries, index_json
from .source import BadEntry, BadEntryError, Piece, Source, cut

_ROLES: dict[Any, str] = {"human": "user", "gpt": "assistant", "system": "system"}
_IMAGE = "<image>"


class Llava(Source):
    """See [`agevlm.data.formats.llava`]; `path` is the file, `images` the folder that the names of images start from."""

    format = "llava"

    def __init__(self, path, images=None, split=None):
        super().__init__(path, images, split)
        if not self.path.is_file():
            raise FileNotFoundError(f"no such file: {self.path}; name the .json or .jsonl file of the conversations")
        if self.images is None:
            self.folder = self.path.parent
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no such folder of images: {self.folder}; unpack the images there")
        if split is not None:
            raise ValueError(f"{self.path}: a file of LLaVA has no split {split!r}; leave the split out")

    def files(self) -> Sequence[Path]:
        return [self.path]

    def pieces(self, work: Path) -> list[Piece]:
        index_json(self.path, work / "entries.sqlite", {"": None})
        return cut(self.path.name, Entries(work / "entries.sqlite").count(""))

    def read(self, piece: Piece, work: Path) -> Iterator[dict[str, Any] | BadEntry]:
        for number, entry in Entries(work / "entries.sqlite").slice("", piece.start, piece.end):
            try:
                row = _row(entry, self.folder)
            except BadEntryError as error:
                yield BadEntry(piece.file, number, error.kind, str(error))
            else:
                yield row | {"file": piece.file, "row": number}


def _row(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    names = entry.get("image") or []
    images = [image_file(folder, name) for name in (names if isinstance(names, list) else [names])]
    for image in images:
        stored_size(image)
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadEntryError(
            "no conversation", 'conversations is missing; write a list of {"from": "human", "value": …}'
        )
    messages = llava_messages(turns)
    shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    if shown != len(images):
        raise BadEntryError(
            "wrong number of images",
            f"conversations has {shown} {_IMAGE}, but `image` has {len(images)}; write {_IMAGE} once for each image",
        )
    name = entry.get("id")
    return {"images": images, "messages": messages, "grounding": [], "id": None if name is None else str(name)}


def llava_messages(turns: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages of LLaVA's `conversations`.

    Raises:
        BadEntryError: if one of them is none.
    """
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(turns):
        value = turn.get("value") if isinstance(turn, dict) else None
        role = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(value, str) or role not in tuple(_ROLES):
            raise BadEntryError(
                "not a message",
                f'conversations[{i}] must be {{"from": …, "value": …}}: one of {", ".join(_ROLES)}, and a text',
            )
        messages.append({"role": _ROLES[role], "content": _content(value)})
    return messages


def _content(value: str) -> list[dict[str, Any]]:
    """Content parts of a text with `<image>` in it, without the line breaks next to an image."""
    content: list[dict[str, Any]] = []
    texts = value.split(_IMAGE)
    for i, text in enumerate(texts):
        if i > 0:
            content.append({"type": "image", "text": None})
            text = text.lstrip("\n")
        if i < len(texts) - 1:
            text = text.rstrip("\n")
        if text:
            content.append({"type": "text", "text": text})
    return content
