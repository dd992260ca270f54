# SPDX-License-Identifier: Apache-2.0
"""GRIT (https://huggingface.co/datasets/zzliang/GRIT, MS-PL; Peng et al., 2023, Kosmos-2, arXiv 2306.14824): 20 million captions of images
at addresses on the web, with boxes for their expressions.

GRIT is parquet files, `grit-20m/coyo_*_snappy.parquet`, with a row for each image:

    key           the file's name in a download of COYO-700M. It does not name an image of GRIT: it is repeated, and not read
    id            its number in COYO-700M
    url, caption
    width, height of the image when it was annotated
    noun_chunks   [[start, end, x0, y0, x1, y1, confidence], …]: characters of the caption, a box relative to the sides, offsets as floats
    ref_exps      the same, each chunk expanded to the expression around it ("a dog" to "a dog in a field of flowers"); copies of such
                  have the lists as JSON text
    clip_similarity_vitb32, clip_similarity_vitl14

img2dataset downloads the images ([`agevlm.data.formats.img2dataset`]). With `--save_additional_columns`, as GRIT's card has it, its output
holds the columns too, and is all that is needed. Otherwise GRIT's rows find their images by their addresses.

`ref_exps` are grounded, as in Kosmos-2: an expression says which object is meant, where a chunk ("a man") fits others in the image
that have no box. The paper leaves out expressions within longer ones; the published rows have them, and they stay, since each has its own
box. The confidence is dropped, because `score` belongs to a mask. A phrase of several objects has an entry for each; training joins
their masks.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from .building import DESCRIBE, conversation, phrase_entry, pixel_box, stored_size, upright_box
from .entries import Entries, index_entries
from .img2dataset import Shard, read_table, shard_names
from .source import NOT_DOWNLOADED, BadEntry, BadEntryError, Piece, Source

_DOWNLOAD = (
    "img2dataset downloads them, in an environment of its own (`pip install img2dataset`): `img2dataset --url_list GRIT/grit-20m "
    "--input_format parquet --url_col url --caption_col caption --output_format webdataset --output_folder grit_images "
    "--image_size 512 --resize_mode keep_ratio --resize_only_if_bigger True --skip_reencode True "
    """--save_additional_columns '["id","ref_exps"]'`"""
)
_COLUMNS = ("id", "url", "caption", "ref_exps")
_DOWNLOADED = ("key", "status", "error_message", "original_width", "original_height")
# Rows of a piece: a killed run loses some seconds, and finding the first row of a file's last piece takes about one.
_ROWS = 20_000
# Relative coordinates of boxes may leave the image by this much, a rounding error. More is a mistake, such as pixels.
_TOLERANCE = 1e-3


class Grit(Source):
    """Rows of the [`DESCRIBE`][agevlm.data.formats.building.DESCRIBE] request and a caption, whose expressions have boxes.

    Args:
        path: img2dataset's output with `ref_exps` saved; or, with `images`, a parquet file of GRIT or a folder of them.
        images: img2dataset's output, for the rows in `path`.
    """

    format: ClassVar[str] = "grit"
    levels: ClassVar[int] = 1

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None, split: str | None = None):
        super().__init__(path, images, split)
        self._tables = [] if self.images is None else _grit_tables(self.path)
        if not self.folder.is_dir() or not (names := shard_names(self.folder)):
            raise FileNotFoundError(
                f"{self.folder} is not a folder of images that img2dataset downloaded, with shards 00000.tar or folders 00000; {_DOWNLOAD}"
            )
        self._shards = names
        shards = (Shard(self.folder, name) for name in names)
        columns = next((columns for shard in shards if (columns := shard.columns()) is not None), None)
        if self.images is None and columns is not None and (lacks := _missing(columns, ("caption", "ref_exps"))):
            raise ValueError(
                f"{self.folder} was downloaded without the columns {lacks}; download with `--caption_col caption` and "
                "`--save_additional_columns`, or give the folder of GRIT's parquet files as `path` and this one as `images`"
            )
        if split is not None:
            raise ValueError(f"{self.path}: GRIT has no split {split!r}; leave the split out")

    def files(self) -> Sequence[Path]:
        shards = (self.folder / f"{name}{suffix}" for name in self._shards for suffix in (".parquet", ".tar"))
        return [*self._tables, *(file for file in shards if file.is_file())]

    def pieces(self, work: Path) -> list[Piece]:
        if self.images is None:
            return [Piece(name, Shard(self.folder, name).place.name) for name in self._shards]
        index_entries(_addresses(self.folder, self._shards), work / "addresses.sqlite", {"": "url"})
        pieces = []
        for table in self._tables:
            number = _count(table)
            pieces += [
                Piece(f"{table.stem}-{start:09}", table.name, start, min(start + _ROWS, number), {"path": str(table)})
                for start in range(0, number, _ROWS)
            ]
        return pieces

    def read(self, piece: Piece, work: Path) -> Iterator[dict[str, Any] | BadEntry]:
        if self.images is None:
            shard = Shard(self.folder, piece.name)
            for file, number, entry in shard.entries((*_COLUMNS, *_DOWNLOADED)):
                yield from _read_entry(file, number, entry, functools.partial(_image_of_sample, shard))
            yield from (BadEntry(piece.file, 0, fault.kind, str(fault)) for fault in shard.faults)
            return
        addresses = Entries(work / "addresses.sqlite")
        # Images are in the order of the rows, but for neighbors, so that hardly any shard is opened twice.
        shard_of = functools.lru_cache(4)(functools.partial(Shard, self.folder))
        for number, entry in read_table(
            Path(piece.extra["path"]), (*_COLUMNS, "width", "height"), piece.start, piece.end
        ):
            yield from _read_entry(
                piece.file, number, entry, functools.partial(_image_of_address, addresses, shard_of)
            )


def _grit_tables(path: Path) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet

    tables = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if not tables:
        raise FileNotFoundError(
            f"there is no parquet file {path}, nor one in such a folder; download GRIT's with `hf download zzliang/GRIT --repo-type "
            "dataset --local-dir GRIT`, and give the folder GRIT/grit-20m as `path`"
        )
    for table in tables:
        try:
            columns = pa.parquet.read_schema(table).names
        except pa.ArrowInvalid as error:
            raise ValueError(f"{table} is not a whole parquet file ({error}); download it again") from error
        if lacks := _missing(columns, ("url", "caption", "ref_exps")):
            raise ValueError(
                f"{table} lacks the columns {lacks}, which GRIT has; give the folder of its parquet files as `path`"
            )
    return tables


def _missing(columns: Sequence[str], needed: Sequence[str]) -> str:
    return ", ".join(name for name in needed if name not in columns)


def _count(table: Path) -> int:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(table).num_rows


def _addresses(output: Path, names: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """The address, shard and key of every image that was downloaded, for `index_entries`."""
    for name in names:
        for _, _, entry in Shard(output, name).entries(("url", "key", "status")):
            if isinstance(entry, dict) and entry.get("status", "success") == "success":
                yield "", {"url": entry.get("url")}, json.dumps({"shard": name, "key": entry.get("key")})


def _image_of_sample(shard: Shard, entry: dict[str, Any]) -> dict[str, Any]:
    if entry.get("status", "success") != "success":
        raise BadEntryError(NOT_DOWNLOADED, f"{entry.get('url')}: {entry.get('error_message')}")
    return shard.image(entry.get("key"))


def _image_of_address(addresses: Entries, shard_of: Callable[[str], Shard], entry: dict[str, Any]) -> dict[str, Any]:
    found = addresses.find("", entry["url"])
    if not found:
        raise BadEntryError(NOT_DOWNLOADED, f"{entry['url']}: there is no image")
    return shard_of(found[0]["shard"]).image(found[0]["key"])


def _read_entry(
    file: str, number: int, entry: dict[str, Any] | BadEntryError, find: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[dict[str, Any] | BadEntry]:
    """The row of an entry and its bad phrases, or a bad entry."""
    wrong: list[BadEntryError] = []
    try:
        if isinstance(entry, BadEntryError):
            raise entry
        row = _row(entry, find(entry), wrong)
    except BadEntryError as error:
        yield BadEntry(file, number, error.kind, str(error))
        return
    yield row | {"file": file, "row": number}
    yield from (BadEntry(file, number, error.kind, str(error), phrase=True) for error in wrong)


def _row(entry: dict[str, Any], image: dict[str, Any], wrong: list[BadEntryError]) -> dict[str, Any]:
    caption = entry.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise BadEntryError("empty caption", f"the caption is {caption!r:.80}; write one or remove the entry")
    phrases = _phrases(entry.get("ref_exps"))
    size, orientation = stored_size(image)
    _check_shape(entry, size)
    grounding: list[dict[str, Any]] = []
    for i, phrase in enumerate(phrases):
        try:
            start, end, box = _phrase(phrase, size)
            box = upright_box(box, size, orientation)
            made = phrase_entry(caption, start, end, message=1, box=box)
            if made in grounding:
                raise BadEntryError("repeated phrase", "has the same span and box as another; remove one of them")
            grounding.append(made)
        except BadEntryError as error:
            wrong.append(BadEntryError(error.kind, f"ref_exps[{i}] {error}"))
    name = entry.get("key") if entry.get("id") is None else entry["id"]
    return {
        "images": [image],
        "messages": conversation(DESCRIBE, caption),
        "grounding": grounding,
        "id": None if name is None else str(name),
    }


def _phrases(phrases: Any) -> Sequence[Any]:
    if isinstance(phrases, str | bytes):
        try:
            phrases = json.loads(phrases)
        except (ValueError, RecursionError) as error:
            raise BadEntryError("ref_exps is not JSON", f"ref_exps is not JSON ({error}): {phrases!r:.200}") from error
    if not isinstance(phrases, list):
        raise BadEntryError(
            "no ref_exps", f"ref_exps is {phrases!r:.200}; write a list of [start, end, x0, y0, x1, y1, confidence]"
        )
    return phrases


def _phrase(phrase: Any, size: tuple[int, int]) -> tuple[float, float, list[float]]:
    """First character, the one after the last, and the box in pixels of the image as it is stored."""
    if not (
        isinstance(phrase, list)
        and len(phrase) in (6, 7)
        and all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in phrase[:6])
    ):
        raise BadEntryError("not a phrase", f"is {phrase!r:.200}; write [start, end, x0, y0, x1, y1, confidence]")
    start, end, *box = phrase[:6]
    if min(box) < -_TOLERANCE or max(box) > 1 + _TOLERANCE:
        raise BadEntryError(
            "box outside the image", f"has the box {box}; write it relative to the image's sides, from 0 to 1"
        )
    return start, end, pixel_box([part * side for part, side in zip(box, (*size, *size), strict=True)], size)


def _check_shape(entry: dict[str, Any], size: tuple[int, int]) -> None:
    """Boxes are relative, so that a resized image has them where they were, but one that was cut, filled up or exchanged has not.

    Where img2dataset was given another `--resize_mode`, `original_width` and `original_height` say so.

    Raises:
        BadEntryError: if the image is of another shape, beyond what rounding to whole pixels makes of it.
    """
    original = "original_" if "original_width" in entry else ""
    width, height = entry.get(f"{original}width"), entry.get(f"{original}height")
    if not (isinstance(width, int) and isinstance(height, int)):
        return
    if abs(size[0] * height - size[1] * width) > width + height:
        raise BadEntryError(
            "image of another shape",
            f"the image has {size[0]} x {size[1]} pixels, but had {width} x {height}: another is at the address now, or img2dataset cut "
            "it; use its `--resize_mode keep_ratio`",
        )
