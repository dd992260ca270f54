# SPDX-License-Identifier: Apache-2.0
"""RefCOCO, RefCOCO+ (Yu et al., 2016, arXiv 1608.00272) and RefCOCOg (Mao et al., 2016, arXiv 1511.02283): expressions that tell an object
of a COCO image from the others.

They were published as pickles, which can run any code. The layout here is that of their conversion on the Hub, parquet files with COCO's
JSON as text: jxu124/refcoco, jxu124/refcocoplus and jxu124/refcocog. An entry is an object with its expressions:

    image_id         581857
    sentences        [{"sent": "the lady with the blue shirt", "raw": "THE LADY WITH THE BLUE SHIRT", "sent_id": 0, …}, …]
    raw_anns         '{"id": 1719310, "image_id": 581857, "bbox": [x, y, width, height], "segmentation": […], "iscrowd": 0, …}'
    raw_image_info   '{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 640, "height": 427, …}'

Their column `file_name` has names that no image has, with the annotation's number (COCO_train2014_000000581857_16.jpg), and is not read.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .building import LINES, answer_of_lines, check_size, image_file, line_of, xywh_box
from .entries import Entries, index_entries
from .segmentation import rle_area, segmentation_to_rle
from .source import BadEntry, BadEntryError, Piece, Source, cut

REFER = "List objects in this image, each on a line of its own, in words that fit no other object."
"""The user's message. Its answer has an expression a line."""

_COLUMNS = ("image_id", "sentences", "raw_anns", "raw_image_info")
_IMAGES_A_PIECE = 500


class RefCoco(Source):
    """The objects of an image with all of their expressions, as one answer of a line each, in which a line is grounded in its object.

    An image with more than [`LINES`][agevlm.data.formats.building.LINES] lines has several rows. An expression stands in an image once, with all objects that have it.

    Args:
        path: a parquet file, or a folder with files `SPLIT-….parquet` in it or in its folder `data`.
        images: the folder of the photographs: COCO's `train2014`, or `train2017`, which has them all under shorter names.
        split: of a folder with several: `train`, `validation`, `test` (in RefCOCO and RefCOCO+ that is testA) or `testB`.
    """

    format = "refcoco"

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None, split: str | None = None):
        super().__init__(path, images, split)
        self._files = _parquet_files(self.path, split)
        if images is None or not Path(images).is_dir():
            raise FileNotFoundError(
                f"There is no folder of images {images}. Give COCO's folder train2014 or train2017 as `images`; it is in "
                "http://images.cocodataset.org/zips/train2014.zip."
            )

    def files(self) -> Sequence[Path]:
        return self._files

    def pieces(self, work: Path) -> list[Piece]:
        place = _index(work)
        index_entries(_read_parquet(self._files), place, {"": "image_id"})
        return cut(self._files[0].name, Entries(place).count_keys(""), _IMAGES_A_PIECE)

    def read(self, piece: Piece, work: Path) -> Iterator[dict[str, Any] | BadEntry]:
        entries = Entries(_index(work))
        for key in entries.keys("", piece.start, piece.end):
            objects = entries.find("", key)
            file, row = objects[0]["file"], objects[0]["row"]
            try:
                image, size = self._image(objects[0])
            except BadEntryError as error:
                yield BadEntry(file, row, error.kind, f"image {objects[0]['image_id']}: {error}")
                continue
            lines: dict[str, dict[str, tuple[list[float], dict[str, Any]]]] = {}  # the objects of each, by mask
            bad: list[BadEntry] = []
            for found in objects:
                try:
                    box, mask = _object(found, size)
                except BadEntryError as error:
                    bad.append(BadEntry(found["file"], found["row"], error.kind, f"its object {error}", phrase=True))
                    continue
                sentences = found["sentences"]
                for sentence in (sentences if isinstance(sentences, list) else []) or [None]:
                    try:
                        line = line_of(sentence.get("sent") if isinstance(sentence, dict) else None)
                    except BadEntryError as error:
                        reason = f"its expression {error}"
                        bad.append(BadEntry(found["file"], found["row"], error.kind, reason, phrase=True))
                        continue
                    lines.setdefault(line, {})[mask["counts"]] = box, mask
            yield from bad if lines else (replace(entry, phrase=False) for entry in bad)
            answers = [(line, named.values()) for line, named in lines.items()]
            for start in range(0, len(answers), LINES):
                answer = answer_of_lines(REFER, answers[start : start + LINES])
                yield {"images": [image], **answer, "id": f"{key}#{start // LINES}", "file": file, "row": row}

    def _image(self, entry: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, int]]:
        """The image of an entry and its size.

        Raises:
            BadEntryError: if it is missing, or is not what was annotated.
        """
        if type(entry["image_id"]) is not int:
            raise BadEntryError("no image", "image_id is not a whole number; write it or remove the entry")
        info = _parsed(entry, "raw_image_info", "id")
        name, short = info.get("file_name"), f"{entry['image_id']:012d}.jpg"
        if not os.path.isfile(self.folder / str(name)) and os.path.isfile(self.folder / short):
            name = short
        image = image_file(self.folder, name)
        return image, check_size(image, info.get("width"), info.get("height"))


def _parquet_files(path: Path, split: str | None) -> list[Path]:
    """The files of a split, in the order of their names.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if the split does not exist, or is not given where there are several.
    """
    if path.is_file():
        if split is not None:
            raise ValueError(f"{path} is one file, which is read as a whole; leave out `split`, which is {split}")
        return [path]
    splits: dict[str, list[Path]] = {}
    for file in sorted(itertools.chain(path.glob("*.parquet"), path.glob("data/*.parquet"))):
        splits.setdefault(file.name.partition("-")[0].removesuffix(".parquet"), []).append(file)
    if not splits:
        raise FileNotFoundError(
            f"There is no parquet file {path}, nor one in such a folder. Get RefCOCO with `hf download jxu124/refcoco --repo-type "
            "dataset --local-dir refcoco`, RefCOCO+ from jxu124/refcocoplus and RefCOCOg from jxu124/refcocog."
        )
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        raise ValueError(f"{path}: `split` is {split}, but must be one of {', '.join(splits)}")
    return splits[split]


def _index(work: Path) -> Path:
    return work / "images.sqlite"


def _read_parquet(files: Sequence[Path]) -> Iterator[tuple[str, Any, str]]:
    """The entries of the files, for `index_entries`: by image. One without an image has a key of its own.

    Raises:
        ValueError: if a file is not parquet, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet

    for file in files:
        try:
            with pa.parquet.ParquetFile(file) as table:
                if missing := set(_COLUMNS) - set(table.schema_arrow.names):
                    raise ValueError(
                        f"{file} has no column {', '.join(sorted(missing))}; the format refcoco is that of jxu124/refcoco on the Hub"
                    )
                batches = table.iter_batches(batch_size=1000, columns=list(_COLUMNS))
                for row, entry in enumerate(entry for batch in batches for entry in batch.to_pylist()):
                    key = entry["image_id"] if type(entry["image_id"]) is int else f"{file.name} {row}"
                    yield "", {"image_id": key}, json.dumps({**entry, "file": file.name, "row": row})
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file} is not a whole parquet file ({error}); download it again") from error


def _parsed(entry: dict[str, Any], column: str, key: str) -> dict[str, Any]:
    """The object in a column of JSON texts, of which `key` is the number of the image.

    Raises:
        BadEntryError: if it is no object, or that of another image.
    """
    try:
        value = json.loads(entry[column])
        number = value[key]
    except (TypeError, ValueError, KeyError, RecursionError):
        raise BadEntryError(
            "not JSON", f"has the {column} {entry[column]!r:.200}, which is not a JSON object with {key}; correct it"
        ) from None
    if number != entry["image_id"]:
        raise BadEntryError(
            "data of another image",
            f"has the {column} of image {number!r:.50}, but image_id is {entry['image_id']}; correct one of them",
        )
    return value


def _object(entry: dict[str, Any], size: tuple[int, int]) -> tuple[list[float], dict[str, Any]]:
    """The box and the mask of an entry's object.

    Raises:
        BadEntryError: if the box or the mask cannot be read, or nothing of them lies in the image.
    """
    annotation = _parsed(entry, "raw_anns", "image_id")
    mask = segmentation_to_rle(annotation.get("segmentation"), size[1], size[0])
    if not rle_area(mask):  # it would say that the image does not show the object
        raise BadEntryError(
            "empty mask", "has a segmentation without a pixel in the image; correct it or remove the entry"
        )
    return xywh_box(annotation.get("bbox"), size), mask
