# SPDX-License-Identifier: Apache-2.0
"""Regions of Visual Genome (Krishna et al., 2016, arXiv 1602.07332): some fifty short descriptions an image, each with a box.

The layout is that of https://homes.cs.washington.edu/~ranjay/visualgenome/api_readme.html, version 1.2:

    region_descriptions.json  [{"id": 1, "regions": [{"region_id": 1382, "image_id": 1, "phrase": "the clock is green in colour",
                                                      "x": 421, "y": 57, "width": 82, "height": 139}, …]}, …]
    image_data.json           [{"image_id": 1, "width": 800, "height": 600, "url": …, "coco_id": null, "flickr_id": null}, …]
    VG_100K/1.jpg             in images.zip and images2.zip, which have the folders VG_100K and VG_100K_2

Boxes are in pixels, from the upper left corner. An entry's `id` is its image's (`image_id` in that page's example).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from .building import LINES, answer_of_lines, check_size, image_file, line_of, xywh_box
from .entries import Entries, index_json
from .source import BadEntry, BadEntryError, Piece, Source, cut

REGIONS = "Describe the regions of this image, each on a line of its own."
"""The user's message. Its answer has a region a line."""

_FOLDERS = ("VG_100K", "VG_100K_2", "")


class VisualGenome(Source):
    """The regions of an image as an answer of a line each, in which a line is grounded in its box, from the largest box to the smallest.

    An image with more than [`LINES`][agevlm.data.formats.building.LINES] lines has several rows, and the lines are dealt to them like cards:
    each row goes through the image from large to small. Regions whose phrases differ in nothing but case, white space and final punctuation
    are one line, the largest one's, which is grounded in all of their boxes. There are no masks.

    Args:
        path: `region_descriptions.json`, or its folder. `image_data.json` is in the same folder.
        images: the folder of `VG_100K` and `VG_100K_2`, or of all images; by default that of `path`.
    """

    format: ClassVar[str] = "visual_genome"

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None, split: str | None = None):
        super().__init__(path, images, split)
        if split is not None:
            raise ValueError(f"{path}: Visual Genome has no splits; leave out `split`, which is {split!r}")
        self._regions = self.path / "region_descriptions.json" if self.path.is_dir() else self.path
        self._sizes = self._regions.with_name("image_data.json")
        for file in (self._regions, self._sizes):
            if not file.is_file():
                raise FileNotFoundError(
                    f"There is no {file}. Get https://homes.cs.washington.edu/~ranjay/visualgenome/data/dataset/{file.name}.zip "
                    "and unpack it there."
                )
        if self.images is None:
            self.folder = self._regions.parent
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"There is no folder of images {self.folder}. Unpack both https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip "
                "and images2.zip there."
            )

    def files(self) -> Sequence[Path]:
        return [self._regions, self._sizes]

    def pieces(self, work: Path) -> list[Piece]:
        index_json(self._regions, _regions_index(work), {"": None})
        index_json(self._sizes, _sizes_index(work), {"": "image_id"})
        return cut(self._regions.name, Entries(_regions_index(work)).count(""))

    def read(self, piece: Piece, work: Path) -> Iterator[dict[str, Any] | BadEntry]:
        sizes = Entries(_sizes_index(work))
        for number, entry in Entries(_regions_index(work)).slice("", piece.start, piece.end):
            key = entry.get("id", entry.get("image_id"))
            try:
                image, size = self._image(key, sizes)
                regions = _regions(entry)
            except BadEntryError as error:
                yield BadEntry(piece.file, number, error.kind, f"image {key!r:.50}: {error}")
                continue
            found: list[tuple[str, list[float]]] = []
            bad: list[BadEntry] = []
            for i, region in enumerate(regions):
                try:
                    found.append(_region(region, key, size))
                except BadEntryError as error:
                    reason = f"image {key}: region {i} {error}"
                    bad.append(BadEntry(piece.file, number, error.kind, reason, phrase=True))
            yield from bad if found else (replace(error, phrase=False) for error in bad)
            lines = _lines(found)
            rows = -(-len(lines) // LINES)
            for row in range(rows):
                yield {
                    "images": [image],
                    **answer_of_lines(REGIONS, lines[row::rows]),
                    "id": f"{key}#{row}",
                    "file": piece.file,
                    "row": number,
                }

    def _image(self, key: Any, sizes: Entries) -> tuple[dict[str, Any], tuple[int, int]]:
        """The image with a number, and its size.

        Raises:
            BadEntryError: if it is missing, or is not what was annotated.
        """
        if type(key) is not int:
            raise BadEntryError(
                "no image", "the entry has no `id`, the number of its image; write it or remove the entry"
            )
        if not (data := sizes.find("", key)):
            raise BadEntryError(
                "no image data", f"{self._sizes.name} has no image {key}; take both files from the same version"
            )
        names = [os.path.join(folder, f"{key}.jpg") for folder in _FOLDERS]
        image = image_file(self.folder, next((name for name in names if (self.folder / name).is_file()), names[0]))
        return image, check_size(image, data[0].get("width"), data[0].get("height"))


def _regions_index(work: Path) -> Path:
    return work / "regions.sqlite"


def _sizes_index(work: Path) -> Path:
    return work / "sizes.sqlite"


def _regions(entry: dict[str, Any]) -> list[Any]:
    regions = entry.get("regions")
    if not isinstance(regions, list) or not regions:
        raise BadEntryError("no regions", "the entry has no regions; write a list of them or remove the entry")
    return regions


def _region(region: Any, key: Any, size: tuple[int, int]) -> tuple[str, list[float]]:
    """The line and the box of a region.

    Raises:
        BadEntryError: if it has none, or is another image's.
    """
    if not isinstance(region, dict):
        raise BadEntryError("not a region", f"is {region!r:.200}; write an object with phrase, x, y, width and height")
    if region.get("image_id", key) != key:
        raise BadEntryError(
            "region of another image", f"has the image_id {region['image_id']!r:.50}; correct it or remove the region"
        )
    return line_of(region.get("phrase")), xywh_box([region.get(side) for side in ("x", "y", "width", "height")], size)


def _lines(regions: list[tuple[str, list[float]]]) -> list[tuple[str, list[tuple[list[float], None]]]]:
    """The lines of an image and the boxes of each, both from the largest to the smallest; there are no masks."""
    lines: dict[str, tuple[str, list[tuple[list[float], None]]]] = {}
    for text, box in sorted(
        regions, key=lambda region: -(region[1][2] - region[1][0]) * (region[1][3] - region[1][1])
    ):
        _, boxes = lines.setdefault(text.rstrip(" .,;:!").casefold(), (text, []))
        if (box, None) not in boxes:
            boxes.append((box, None))
    return list(lines.values())
