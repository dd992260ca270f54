# SPDX-License-Identifier: Apache-2.0
"""GranD, the Grounding-anything Dataset (Rasheed et al., 2023, arXiv 2311.03356): captions of SA-1B's photographs, made by models, with
boxes and masks of what their phrases name.

The layout is that of MBZUAI/GranD on the Hub, as the authors' scripts write it (https://github.com/mbzuai-oryx/groundingLMM, GranD/utils).
Each photograph has a JSON file of its own:

    {"sa_1.jpg": {"objects":          [{"id": 0, "bbox": [x0, y0, x1, y1], "labels": […], "attributes": […],
                                        "segmentation": {"size": [height, width], "counts": …}, "segmentation_source": "SAM"}, …],
                  "floating_objects": […, the same],
                  "dense_caption":    {"caption": …, "details": [{"phrase": …, "tokens_positive": [start, end], "ids": [0, 3], …}, …]},
                  "short_captions":   [{"caption": …, "details": [{"phrase": …, "tokens_positive": [start, end], "id": 0, …}, …]}, …], …}}

The spans of dense captions are those of the caption before its punctuation was removed, or null. Of objects whose `segmentation_source` is
HQ_SAM the scripts have taken [x0, y0, x1, y1] for [x, y, width, height], so that some masks are of something else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ...processing.rows import is_unicode, mask_from_rle
from .building import DESCRIBE, conversation, image_file, phrase_entry, pixel_box, upright_size
from .entries import Entries, index_entries
from .segmentation import rle_area, segmentation_to_rle
from .source import BadEntry, BadEntryError, Piece, Source, cut

_CAPTIONS = ("dense_caption", "short_captions")


class Grand(Source):
    """A row for each caption. Each phrase is grounded in the box and the mask of its object; of each of them where it names several.

    Args:
        path: the folder of the JSON files, which may be in folders of it.
        images: the folder of SA-1B's archives, `sa_000000.tar` and so on, or of its photographs, in folders or not.
        split: `dense_caption` (default): some sentences about each photograph. `short_captions`: several of one sentence each.
    """

    format: ClassVar[str] = "grand"
    levels: ClassVar[int] = 1

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None, split: str | None = None):
        super().__init__(path, images, split)
        self.split = self._kind = split or _CAPTIONS[0]
        if self._kind not in _CAPTIONS:
            raise ValueError(f"{path}: `split` is {split!r}, but must be {' or '.join(_CAPTIONS)}")
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"There is no folder {path} of GranD's JSON files. Get a part with `hf download MBZUAI/GranD --repo-type dataset --include "
                "'part_1/*' --local-dir grand` and unpack it."
            )
        if images is None or not Path(images).is_dir():
            raise FileNotFoundError(
                f"There is no folder of images {images}. Give the folder of SA-1B's archives, sa_000000.tar and so on, as `images`; their "
                "addresses are at https://ai.meta.com/datasets/segment-anything-downloads/."
            )

    @cached_property
    def _files(self) -> list[Path]:
        folders = [self.path, *(Path(file.path) for file in _scan(self.path) if file.is_dir())]
        return [*sorted(folders), *sorted(Path(file.path) for file in _scan(self.folder) if _is_archive(file))]

    def files(self) -> Sequence[Path]:
        """The folders of the JSON files, which may be millions, and the archives of images."""
        return self._files

    def pieces(self, work: Path) -> list[Piece]:
        index_entries(self._index(), _place(work), {"annotations": "file", "images": "name"})
        return cut(self.path.name, Entries(_place(work)).count("annotations"))

    def _index(self) -> Iterator[tuple[str, Any, str]]:
        """The JSON files and the photographs, for `index_entries`. What is in a folder is never listed as a whole."""
        for file in _scan(self.path):
            if file.name.endswith(".json"):
                yield _indexed("annotations", file=os.path.relpath(file.path, self.path))
        for file in _scan(self.folder):
            place = os.path.relpath(file.path, self.folder)
            if file.name.endswith(".jpg"):
                yield _indexed("images", name=file.name, file=place)
            elif _is_archive(file):
                for member in _members(file.path):
                    where = {"start": member.offset_data, "size": member.size}
                    yield _indexed("images", name=os.path.basename(member.name), file=place, **where)

    def read(self, piece: Piece, work: Path) -> Iterator[dict[str, Any] | BadEntry]:
        index = Entries(_place(work))
        for file in index.keys("annotations", piece.start, piece.end):
            try:
                name, content = _content(self.path / file)
                captions = _captions(content, self._kind)
                image = self._image(name, index)
                size = upright_size(image)
            except BadEntryError as error:
                yield BadEntry(file, 0, error.kind, str(error))
                continue
            objects = _objects(content)
            for number, caption in enumerate(captions):
                try:
                    text = caption_text(caption)
                    details = _details(caption)
                except BadEntryError as error:
                    yield BadEntry(file, number, error.kind, f"{self._kind}, caption {number}: {error}")
                    continue
                grounding: list[dict[str, Any]] = []
                for detail in details:
                    try:
                        grounding += _phrase(text, detail, objects, size)
                    except BadEntryError as error:
                        phrase = detail.get("phrase") if isinstance(detail, dict) else detail
                        reason = f"{self._kind}, caption {number}: the phrase {phrase!r:.200} {error}"
                        yield BadEntry(file, number, error.kind, reason, phrase=True)
                yield {
                    "images": [image],
                    "messages": conversation(DESCRIBE, text),
                    "grounding": grounding,
                    "id": f"{name.removesuffix('.jpg')}#{number}",
                    "file": file,
                    "row": number,
                }

    def _image(self, name: str, index: Entries) -> dict[str, Any]:
        """A photograph, from its folder or its archive.

        Raises:
            BadEntryError: if it is missing.
        """
        found = index.find("images", name)
        if not found:
            raise BadEntryError(
                "missing image",
                f"there is no image {name!r:.200} in {self.folder}; add its archive or remove the entry",
            )
        if "start" not in found[0]:
            return image_file(self.folder, found[0]["file"])
        with open(self.folder / found[0]["file"], "rb") as archive:
            archive.seek(found[0]["start"])
            return {"path": name, "bytes": archive.read(found[0]["size"])}


def _place(work: Path) -> Path:
    return work / "files.sqlite"


def _indexed(table: str, **entry: Any) -> tuple[str, Any, str]:
    return table, entry, json.dumps(entry)


def _scan(folder: Path | str) -> Iterator[os.DirEntry]:
    """What is in a folder and in its folders, in no order. Links to folders are not followed."""
    with os.scandir(folder) as files:
        for file in files:
            yield file
            if file.is_dir(follow_symlinks=False):
                yield from _scan(file.path)


def _is_archive(file: os.DirEntry) -> bool:
    return file.name.endswith(".tar") and file.is_file()


def _members(archive: str) -> Iterator[tarfile.TarInfo]:
    """The photographs of an archive.

    Raises:
        ValueError: if it is not a whole tar file.
    """
    try:
        with tarfile.open(archive, "r:") as opened:
            for member in opened:
                if member.isfile() and member.name.endswith(".jpg"):
                    yield member
    except tarfile.TarError as error:
        raise ValueError(f"{archive} is not a whole tar file ({error}); download it again") from error


def _content(file: Path) -> tuple[str, dict[str, Any]]:
    """The name of a photograph and what is known about it."""
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BadEntryError(
            "not JSON", f"cannot be read ({error}); unpack the archive again or remove the file"
        ) from error
    name, content = next(iter(data.items()), (None, None)) if isinstance(data, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(content, dict):
        raise BadEntryError(
            "not of this layout",
            'must be {"sa_1.jpg": {"objects": …, "dense_caption": …}}; correct it or remove the file',
        )
    return name, content


def _captions(content: dict[str, Any], kind: str) -> list[Any]:
    captions = content.get(kind)
    if isinstance(captions, dict) and kind == "dense_caption":
        captions = [captions]
    if not isinstance(captions, list) or not captions:
        raise BadEntryError("no caption", f"has no {kind}; write it or remove the file")
    return captions


def caption_text(caption: Any) -> str:
    """The text of `{"caption": str, …}`, without white space at its ends.

    Raises:
        BadEntryError: if it has none.
    """
    text = caption.get("caption") if isinstance(caption, dict) else None
    if not isinstance(text, str) or not text.strip() or not is_unicode(text):
        raise BadEntryError("not a text", f"`caption` is {text!a:.200}; write a text or remove the entry")
    return text.strip()


def _details(caption: dict[str, Any]) -> list[Any]:
    details = caption.get("details")
    if not isinstance(details, list):
        raise BadEntryError("no details", "has no details; write the list of its phrases, which may be empty")
    return details


def _objects(content: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """All objects of a photograph by their numbers."""
    lists = (content.get(name) for name in ("objects", "floating_objects"))
    found = [item for items in lists if isinstance(items, list) for item in items if isinstance(item, dict)]
    return {item["id"]: item for item in reversed(found) if type(item.get("id")) is int}


def _phrase(text: str, detail: Any, objects: dict[int, dict[str, Any]], size: tuple[int, int]) -> list[dict[str, Any]]:
    """The entries of a phrase, one for each of its objects: with some of them only, the others would count as background.

    Raises:
        BadEntryError: if the text does not have it, or one of its objects is not there.
    """
    if not isinstance(detail, dict):
        raise BadEntryError("not a phrase", "must be an object with phrase, tokens_positive and ids; correct it")
    start, end = phrase_span(text, detail.get("phrase"), detail.get("tokens_positive"))
    ids = detail.get("ids", [detail.get("id")])
    if not isinstance(ids, list) or not ids:
        raise BadEntryError("no object", f"has the objects {ids!r:.200}; write a list of their numbers")
    entries = []
    for number in ids:
        if type(number) is not int or number not in objects:
            raise BadEntryError("no object", f"names the object {number!r:.50}, which the file does not have")
        box, mask = _box_and_mask(objects[number], size)
        entries.append(phrase_entry(text, start, end, message=1, box=box, mask=mask))
    return entries


def phrase_span(text: str, phrase: Any, span: Any) -> tuple[int, int]:
    """Where a text has a phrase as whole words: the place closest to a span, whatever that is.

    Case and white space may differ: the authors have put white space between words and around punctuation, and then removed some of it.

    Raises:
        BadEntryError: if it does not have it.
    """
    words = phrase.split() if isinstance(phrase, str) else []
    if not words:
        raise BadEntryError("not a phrase", "is not a text; write one or remove the phrase")
    phrase = r"\s*".join(map(re.escape, words))
    start, end = r"(?<!\w)" * words[0][0].isalnum(), r"(?!\w)" * words[-1][-1].isalnum()
    pattern = f"(?=({start}{phrase}{end}))"  # looks ahead, so that places may overlap
    places = [match.span(1) for match in re.finditer(pattern, text, re.IGNORECASE)]
    if not places:
        raise BadEntryError("phrase not in the text", "is not in the text; correct one of them or remove the phrase")
    with contextlib.suppress(TypeError, KeyError, IndexError):  # no span, or none of numbers
        return min(places, key=lambda place: abs(place[0] - span[0]))
    return places[0]


def _box_and_mask(item: dict[str, Any], size: tuple[int, int]) -> tuple[list[float], dict[str, Any] | None]:
    """The box of an object and its mask, None where it has none.

    Raises:
        BadEntryError: if one of them cannot be read, or they do not belong together.
    """
    box = pixel_box(item.get("bbox"), size)
    if item.get("segmentation") is None:
        return box, None
    mask = whole_mask(item["segmentation"], size)
    x0, y0, x1, y1 = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    if 2 * mask_from_rle(mask)[y0:y1, x0:x1].sum() < rle_area(mask):
        raise BadEntryError(
            "mask outside its box",
            f"has a mask of which more than half lies outside of its box {box}; correct one of them",
        )
    return box, mask


def whole_mask(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """A mask in COCO's layout that has pixels, of an image of a size.

    Raises:
        BadEntryError: if it is none.
    """
    if isinstance(segmentation, dict) and segmentation.get("size") != [size[1], size[0]]:
        raise BadEntryError(
            "mask of another size",
            f"has a mask of the size {segmentation.get('size')!r:.100} (height, width), but its image has {[size[1], size[0]]}; use the "
            "original image",
        )
    mask = segmentation_to_rle(segmentation, size[1], size[0])
    if not rle_area(mask):  # it would say that the image does not show the object
        raise BadEntryError("empty mask", "has a mask without a pixel; correct it or remove the phrase")
    return mask
