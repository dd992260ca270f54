# SPDX-License-Identifier: Apache-2.0
"""Data sets in the files that their authors publish: one format a module, each a [`~agevlm.data.formats.source.Source`]."""

from __future__ import annotations

import importlib
import os

from .source import Source

SOURCES = {
    "refcoco": "refcoco:RefCoco",
    "flickr30k": "flickr30k:Flickr30k",
    "grit": "grit:Grit",
    "llava": "llava:Llava",
    "visual_genome": "visual_genome:VisualGenome",
    "grand": "grand:Grand",
    "grand_f": "grand_f:GrandF",
    "coco": "coco:Coco",
    "coco_questions": "coco:CocoQuestions",
}
"""By the name of a format its module and class."""


def open_source(
    format: str,
    path: str | os.PathLike,
    images: str | os.PathLike | None = None,
    split: str | None = None,
) -> Source:
    """The data set of a format, path, images and split, as a recipe names them.

    Raises:
        FileNotFoundError: if something is missing; says how to get it.
        ValueError: if there is no such format, or something that it needs was not given.
        ImportError: if a library that it needs is not installed.
    """
    if format not in SOURCES:
        raise ValueError(f"no format {format!r}; choose one of: {', '.join(SOURCES)}")
    module, _, name = SOURCES[format].partition(":")
    return getattr(importlib.import_module(f".{module}", __name__), name)(path, images, split)
