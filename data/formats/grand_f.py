# SPDX-License-Identifier: Apache-2.0
"""GranD-f (Rasheed et al., 2023, arXiv 2311.03356): captions in which each phrase has masks, 1,000 of them written by people.

The layout is that of `GranDf_HA_GCG_train.json` (captions by people, photographs of SA-1B) and `OpenPsgGCG_train.json` (captions by GPT-4 from
the labels of OpenPSG, photographs of COCO's train2017) in MBZUAI/GranD-f on the Hub:

    [{"file_name": "sa_1.jpg", "caption": …,
      "groundings": {"a dog": {"token_positives": [start, end], "rle_masks": [{"size": [height, width], "counts": …}, …]}, …}, …}, …]

Its two other files have other layouts. They are made of RefCOCOg and Flickr30k Entities, which have formats here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from .building import DESCRIBE, conversation, image_file, phrase_entry, upright_size
from .entries import Entries, index_json
from .grand import caption_text, phrase_span, whole_mask
from .segmentation import rle_box
from .source import BadEntry, BadEntryError, Piece, Source, cut


class GrandF(Source):
    """A row for each caption. Each phrase is grounded in each of its masks, and in the box around it.

    Args:
        path: the JSON file.
        images: the folder of its images.
    """

    format: ClassVar[str] = "grand_f"

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None, split: str | None = None):
        super().__init__(path, images, split)
        if split is not None:
            raise ValueError(f"{path}: a file of GranD-f has no splits; leave out `split`, which is {split!r}")
        if not self.path.is_file():
            raise FileNotFoundError(
                f"There is no {path}. Get it with `hf download MBZUAI/GranD-f train/GranDf_HA_GCG_train.json --repo-type dataset "
                "--local-dir grand_f`."
            )
        if images is None or not Path(images).is_dir():
            raise FileNotFoundError(
                f"There is no folder of images {images}. Give that of GranDf_HA_images (its address is in docs/datasets.md of "
                "https://github.com/mbzuai-oryx/groundingLMM), or COCO's train2017, as `images`."
            )

    def files(self) -> Sequence[Path]:
        return [self.path]

    def pieces(self, work: Path) -> list[Piece]:
        index_json(self.path, _place(work), {"": None})
        return cut(self.path.name, Entries(_place(work)).count(""))

    def read(self, piece: Piece, work: Path) -> Iterator[dict[str, Any] | BadEntry]:
        for number, entry in Entries(_place(work)).slice("", piece.start, piece.end):
            try:
                text = caption_text(entry).strip('"').strip()
                groundings = _groundings(entry)
                image = image_file(self.folder, entry.get("file_name"))
                size = upright_size(image)
            except BadEntryError as error:
                yield BadEntry(piece.file, number, error.kind, str(error))
                continue
            grounding: list[dict[str, Any]] = []
            for phrase, found in groundings.items():
                try:
                    grounding += _phrase(text, phrase, found, size)
                except BadEntryError as error:
                    reason = f"the phrase {phrase!r:.200} {error}"
                    yield BadEntry(piece.file, number, error.kind, reason, phrase=True)
            yield {
                "images": [image],
                "messages": conversation(DESCRIBE, text),
                "grounding": grounding,
                "id": f"{entry['file_name']}#{number}",
                "file": piece.file,
                "row": number,
            }


def _place(work: Path) -> Path:
    return work / "entries.sqlite"


def _groundings(entry: dict[str, Any]) -> dict[str, Any]:
    groundings = entry.get("groundings")
    if not isinstance(groundings, dict):
        raise BadEntryError(
            "not of this layout",
            'has no `groundings`, {"phrase": {"token_positives": …, "rle_masks": …}}; the format grand_f is that of '
            "GranDf_HA_GCG_train.json and OpenPsgGCG_train.json",
        )
    return groundings


def _phrase(text: str, phrase: str, found: Any, size: tuple[int, int]) -> list[dict[str, Any]]:
    """The entries of a phrase, one for each of its masks.

    Raises:
        BadEntryError: if the text does not have it, or one of its masks cannot be read.
    """
    masks = found.get("rle_masks") if isinstance(found, dict) else None
    if not isinstance(masks, list) or not masks:
        raise BadEntryError("no mask", "has no rle_masks; write a list of masks or remove the phrase")
    start, end = phrase_span(text, phrase, found.get("token_positives"))
    entries = []
    for item in masks:
        mask = whole_mask(item, size)
        entries.append(phrase_entry(text, start, end, message=1, box=rle_box(mask), mask=mask))
    return entries
