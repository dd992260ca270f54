# SPDX-License-Identifier: Apache-2.0
"""Flickr30k Entities (Plummer et al., 2015, arXiv 1505.04870): five captions an image, whose phrases are tied to boxes.

The layout is that of https://github.com/BryanPlummer/flickr30k_entities. `Sentences` and `Annotations` are in its `annotations.zip`, which need
not be unpacked:

    Sentences/36979.txt     a sentence a line: [/EN#1/people A group] of [/EN#2/people/other friends] stands in [/EN#0/notvisual line] .
    Annotations/36979.xml   <size>, and <object>s that name their chains: with a <bndbox>, or with <scene> and <nobndbox> where there is none
    train.txt, val.txt, test.txt    the images of a split, one a line
    UNRELATED_CAPTIONS      captions that are about something else than their image: the image, and the sentence's number from 1 on
"""

from __future__ import annotations

import itertools
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ...files import new_folder
from .building import DESCRIBE, check_size, conversation, image_file, phrase_entry, pixel_box
from .source import BadEntry, BadEntryError, Piece, Source, cut

_IMAGES_A_PIECE = 500
_PHRASE = re.compile(r"\[/EN#(?P<chain>\d+)(?:/[^\s/\[\]]+)+ (?P<words>[^\[\]]*[^\[\] ]) ?\]")
# Spaces that the captions' tokenizer has put in: before closing marks and parts of words, behind opening marks, in quotation marks.
_ADDED_SPACE = re.compile(r" (?=[.,;:!?)%]+(?: |$)|(?:n't|'(?:s|m|d|re|ve|ll))\b)|(?<=\() ")
_QUOTATION = re.compile(r'(?<!\S)"( )[^"]*[^" ]( )"(?!\S)')


class Flickr30k(Source):
    """The captions, one a row. A phrase has an entry for each box of its chain.

    Phrases of chains without a box are text only: `notvisual` ones, scenes, and those that have no box or no object at all. The image may
    well show what they name.

    Args:
        path: the folder with `annotations.zip`, or `Sentences` and `Annotations`, and the lists of the splits.
        images: the folder of the photographs: `36979.jpg`.
        split: `train`, `val`, `test`, or another list `SPLIT.txt` in the folder.
    """

    format = "flickr30k"

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None, split: str | None = None):
        super().__init__(path, images, split)
        self._archive = None if (self.path / "Sentences").is_dir() else self.path / "annotations.zip"
        if self._archive is not None and not self._archive.is_file():
            raise FileNotFoundError(
                f"There is neither {self._archive} nor a folder Sentences beside it. Get Flickr30k Entities with `git clone "
                "https://github.com/BryanPlummer/flickr30k_entities`, and name its folder as `path`."
            )
        lists = sorted(file.stem for file in self.path.glob("*.txt"))
        if split not in lists:
            raise ValueError(
                f"{path}: `split` is {split}, but must name a list of images in the folder, such as train for train.txt; "
                f"it has: {', '.join(lists) or 'none'}"
            )
        self._list = self.path / f"{split}.txt"
        if images is None or not Path(images).is_dir():
            raise FileNotFoundError(
                f"There is no folder of images {images}. Give the folder of Flickr30k's photographs (flickr30k-images) as `images`."
            )

    def files(self) -> Sequence[Path]:
        files = [self._list, self.path / "UNRELATED_CAPTIONS"]
        if self._archive is not None:
            files.append(self._archive)
        else:
            for _, name in self._listed():
                files += [self.path / "Sentences" / f"{name}.txt", self.path / "Annotations" / f"{name}.xml"]
        return [file for file in files if file.is_file()]

    def pieces(self, work: Path) -> list[Piece]:
        place = self._annotations(work)
        if self._archive is not None and not place.is_dir():
            try:
                with new_folder(place) as partial, zipfile.ZipFile(self._archive) as archive:
                    archive.extractall(partial)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise ValueError(f"{self._archive} cannot be unpacked ({error}); get it again") from error
        return cut(self._list.name, max((number + 1 for number, _ in self._listed()), default=0), _IMAGES_A_PIECE)

    def read(self, piece: Piece, work: Path) -> Iterator[dict[str, Any] | BadEntry]:
        unrelated = self._unrelated()
        for number, name in self._listed(piece.start, piece.end):
            try:
                image, size, boxes, sentences = self._read_image(self._annotations(work), name)
            except BadEntryError as error:
                yield BadEntry(self._list.name, number, error.kind, f"image {name}: {error}")
                continue
            file = f"Sentences/{name}.txt"
            for row, sentence in enumerate(sentences):
                if not sentence.strip() or (name, str(row + 1)) in unrelated:
                    continue
                try:
                    text, phrases = _read_sentence(sentence)
                except BadEntryError as error:
                    yield BadEntry(file, row, error.kind, str(error))
                    continue
                grounding: list[dict[str, Any]] = []
                for chain, start, end in phrases:
                    try:
                        found = [pixel_box(_box(element), size) for element in boxes.get(chain, ())]
                    except BadEntryError as error:
                        reason = f"the phrase {text[start:end]!r} (EN#{chain}) {error}; correct Annotations/{name}.xml"
                        yield BadEntry(file, row, error.kind, reason, phrase=True)
                        continue
                    grounding += [phrase_entry(text, start, end, message=1, box=box) for box in found]
                yield {
                    "images": [image],
                    "messages": conversation(DESCRIBE, text),
                    "grounding": grounding,
                    "id": f"{name}#{row}",
                    "file": file,
                    "row": row,
                }

    def _annotations(self, work: Path) -> Path:
        """The folder of `Sentences` and `Annotations`."""
        return self.path if self._archive is None else work / "annotations"

    def _listed(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, str]]:
        """The images of the split, by the numbers of their lines."""
        with open(self._list, encoding="utf-8", errors="replace") as lines:
            for number, line in itertools.islice(enumerate(lines), start, end):
                if name := line.strip():
                    yield number, name

    def _unrelated(self) -> set[tuple[str, ...]]:
        try:
            lines = (self.path / "UNRELATED_CAPTIONS").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return set()
        return {tuple(line.split()) for line in lines}

    def _read_image(
        self, place: Path, name: str
    ) -> tuple[dict[str, Any], tuple[int, int], dict[str, list[ElementTree.Element]], list[str]]:
        """An image, its size, the elements of the boxes by chain, and its sentences.

        Raises:
            BadEntryError: if one of its files is missing or cannot be read.
        """
        if Path(name).name != name:
            raise BadEntryError("not a name of an image", "is not the name of an image; correct the list of the split")
        sentences = _read_text(place / "Sentences" / f"{name}.txt", "sentences").split("\n")
        root = _read_xml(place / "Annotations" / f"{name}.xml")
        width, height = ((root.findtext(f"size/{side}") or "").strip() for side in ("width", "height"))
        if not all(re.fullmatch(r"\d{1,9}", side) for side in (width, height)):
            raise BadEntryError(
                "no size", f"its annotation has the size {width!r} x {height!r}; write the image's width and height"
            )
        image = image_file(self.folder, f"{name}.jpg")
        size = check_size(image, int(width), int(height))
        boxes: dict[str, list[ElementTree.Element]] = {}
        for found in root.iterfind("object"):
            for chain in found.iterfind("name"):
                boxes.setdefault((chain.text or "").strip(), []).extend(found.iterfind("bndbox"))
        return image, size, boxes, sentences


def _read_text(file: Path, kind: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadEntryError(f"missing {kind}", f"there is no {file}; get annotations.zip again") from None
    except (OSError, ValueError) as error:
        raise BadEntryError(
            f"unreadable {kind}", f"{file} cannot be read ({error}); get annotations.zip again"
        ) from error


def _read_xml(file: Path) -> ElementTree.Element:
    """The root of an annotation.

    A DTD could define entities that expand to gigabytes or name other files. Entities cannot be defined without one, so a text that has
    one is not parsed at all. As the text is decoded before, no other encoding hides it.
    """
    text = _read_text(file, "annotation")
    if "<!DOCTYPE" in text:
        raise BadEntryError("unreadable annotation", f"{file} has a document type declaration; remove it")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise BadEntryError(
            "unreadable annotation", f"{file} is not XML ({error}); get annotations.zip again"
        ) from error


def _box(element: ElementTree.Element) -> list[float]:
    """The box `[x0, y0, x1, y1]` of a `<bndbox>`, whose sides are pixels that belong to it, counted from 1."""
    sides = [element.findtext(side) for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x0, y0, x1, y1 = (float(side or "") for side in sides)
    except ValueError:
        raise BadEntryError(
            "not a box", f"has the box {sides}; write four numbers, xmin, ymin, xmax and ymax"
        ) from None
    return [x0 - 1, y0 - 1, x1, y1]


def _read_sentence(sentence: str) -> tuple[str, list[tuple[str, int, int]]]:
    """The text of a sentence as people write it, and its phrases: chain, start, end.

    Raises:
        BadEntryError: if the markup cannot be read.
    """
    sentence = " ".join(sentence.split())
    text, phrases, done = "", [], 0
    for match in _PHRASE.finditer(sentence):
        text += sentence[done : match.start()]
        phrases.append((match["chain"], len(text), len(text) + len(match["words"])))
        text += match["words"]
        done = match.end()
    text += sentence[done:]
    if "/EN#" in text:
        raise BadEntryError(
            "broken markup",
            f"the sentence has markup that cannot be read, {text!r:.300}; write [/EN#1/people a man], or remove it",
        )
    added = {match.start() for match in _ADDED_SPACE.finditer(text)}
    added |= {match.start(group) for match in _QUOTATION.finditer(text) for group in (1, 2)}
    before = list(itertools.accumulate((at in added for at in range(len(text))), initial=0))
    tidy = "".join(character for at, character in enumerate(text) if at not in added)
    return tidy, [(chain, start - before[start], end - before[end]) for chain, start, end in phrases]
