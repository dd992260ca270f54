# SPDX-License-Identifier: Apache-2.0
"""COCO's instances and captions (https://cocodataset.org/#format-data), in the files that the authors publish.

    annotations/instances_train2017.json    {"images": [{"id", "file_name", "width", "height", …}],
                                             "categories": [{"id", "name", …}],
                                             "annotations": [{"image_id", "category_id", "segmentation", "iscrowd", …}]}
    annotations/captions_train2017.json     {"annotations": [{"id", "image_id", "caption"}], …}
    train2017/000000000009.jpg

`coco` has a row for each caption, its words that name categories grounded in the image's instances. `coco_questions` asks whether
objects are there, as POPE does (Li et al., 2023, arXiv 2305.10355, https://github.com/AoiDragon/POPE).
"""

from __future__ import annotations

import abc
import functools
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...files import new_file
from ...processing.rows import mask_to_rle
from .building import DESCRIBE, check_size, conversation, image_file, line_of, phrase_entry
from .category_words import CategoryWords, Naming
from .entries import Entries, index_json
from .segmentation import join_rle, rle_area, rle_box, segmentation_to_rle
from .source import BadEntry, BadEntryError, Piece, Source, cut

QUESTION = "Is there {} {} in the image?"
"""POPE's question; with an article and the name of a category."""

KINDS = ("random", "popular", "adversarial")
"""How POPE chooses the objects that are not there."""

IMAGES = 1000
"""The images of a piece."""

_ASKED = 3  # objects that are there, and as many that are not, for each image and kind


class _Coco(Source):
    """Files of instances and captions, and what both formats check in them.

    Args:
        path: `instances_NAME.json`. `captions_NAME.json` lies beside it.
        images: the folder of the images, or the one that holds the folder NAME of the images. By default the latter is that of the
            annotations, or the one around it, as COCO's archives unpack.
    """

    def __init__(self, path, images=None, split=None):
        super().__init__(path, images, split)
        name = re.fullmatch(r"instances_(.+)\.json", self.path.name)
        if name is None:
            raise ValueError(
                f"{self.path}: name the file instances_NAME.json of COCO's annotations, such as instances_train2017.json"
            )
        self.captions = self.path.with_name(f"captions_{name[1]}.json")
        for file in (self.path, self.captions):
            if not file.is_file():
                raise FileNotFoundError(
                    f"no such file: {file}; {self.format} reads {self.path.name} and {self.captions.name} beside it, both of COCO's "
                    "annotations_trainval2017.zip or annotations_trainval2014.zip"
                )
        if split is not None:
            raise ValueError(
                f"{self.path} has no split {split!r}; name the file of that split and leave the split out"
            )
        places = list(self.path.absolute().parents[:2]) if self.images is None else [self.images]
        folders = [place / name[1] for place in places] + ([] if self.images is None else places)
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is None:
            raise FileNotFoundError(
                f"no such folder of images: {folders[-1]}; unpack {name[1]}.zip and name its folder as `images`"
            )
        self.folder = folder

    def files(self) -> Sequence[Path]:
        return [self.path, self.captions]

    def pieces(self, work: Path) -> list[Piece]:
        index_json(
            self.path, work / "instances.sqlite", {"images": "id", "annotations": "image_id", "categories": "id"}
        )
        index_json(self.captions, work / "captions.sqlite", {"annotations": "image_id"})
        index = _Index(self, work)
        return [
            *cut(self.path.name, index.instances.count("images"), IMAGES),
            *_orphan_pieces("instances", self.path, index.instances.count("annotations")),
            *_orphan_pieces("captions", self.captions, index.captions.count("annotations")),
        ]

    def read(self, piece: Piece, work: Path) -> Iterator[dict[str, Any] | BadEntry]:
        index = _Index(self, work)
        if piece.extra:
            yield from index.orphans(getattr(index, piece.extra["table"]), piece)
            return
        for number, entry in index.instances.slice("images", piece.start, piece.end):
            try:
                image = index.image(number, entry)
            except BadEntryError as error:
                yield BadEntry(piece.file, number, error.kind, str(error))
                continue
            yield from image.problems
            for row in self._rows(image, index):
                yield row if isinstance(row, BadEntry) else {"images": [image.file], **row}

    @abc.abstractmethod
    def _rows(self, image: _Image, index: _Index) -> Iterator[dict[str, Any] | BadEntry]:
        """The rows of an image, but for their `images`."""


class Coco(_Coco):
    """Captions with the words that name categories, grounded in the image's instances."""

    format = "coco"

    def _rows(self, image: _Image, index: _Index) -> Iterator[dict[str, Any] | BadEntry]:
        reported: set[str] = set()
        for number, caption in image.captions:
            try:
                text = line_of(caption.get("caption"))
            except BadEntryError as error:
                yield BadEntry(self.captions.name, number, error.kind, f"its caption {error}")
                continue
            grounding = []
            for naming in index.words.find(text):
                if (category := image.meant(naming)) is None:
                    continue
                region = image.region(category)
                if category not in reported:
                    yield from region.problems
                    reported.add(category)
                if region.mask is not None:
                    span = (naming.start, naming.end)
                    grounding.append(phrase_entry(text, *span, message=1, box=region.box, mask=region.mask))
            yield {
                "messages": conversation(DESCRIBE, text),
                "grounding": grounding,
                "id": None if caption.get("id") is None else str(caption["id"]),
                "file": self.captions.name,
                "row": number,
            }


class CocoQuestions(_Coco):
    """Questions about single objects, of which half are there, for the images that have at least three categories.

    The objects that are there are three of the image's categories. For each kind, and behind each question whose answer is yes, follows one
    whose answer is no: about any category (`random`); about the one that most images have (`popular`); about the one that most often is
    in an image with the object that was asked before (`adversarial`). As in POPE, it is none that the image has and none that was asked. Also it
    is none that a caption names: annotators overlook objects. The annotations' images with three categories or more are counted, all of the file's;
    among equals the first in the file's list of categories comes first.
    """

    format = "coco_questions"
    columns = {"kind": "string"}

    def pieces(self, work: Path) -> list[Piece]:
        found = super().pieces(work)
        _count_objects(_Index(self, work), work / "objects.json")
        return found

    def _rows(self, image: _Image, index: _Index) -> Iterator[dict[str, Any] | BadEntry]:
        there = [name for name in index.names.values() if name in image.instances]
        if len(there) < _ASKED:
            return
        named = {
            category
            for _, caption in image.captions
            if isinstance(caption.get("caption"), str)
            for naming in index.words.find(caption["caption"])
            for category in naming.categories
        }
        # Of the image's id alone, so that neither pieces nor processes matter. A text, since Python seeds with its SHA-512.
        chance = random.Random(f"{image.id}")
        asked = chance.sample(there, _ASKED)
        absent = _Region(None, mask_to_rle(np.zeros((image.height, image.width), dtype=bool)), [])
        for name in asked:
            yield from image.region(name).problems
        for kind in KINDS:
            number, taken = 0, {*there, *named}
            for name in asked:
                other = index.absent(kind, name, taken, chance)
                for question, answer, region in ((name, "Yes", image.region(name)), (other, "No", absent)):
                    if question is None:  # the image has every category, or a caption names it
                        continue
                    taken.add(question)
                    text = QUESTION.format("an" if question[0] in "aeiou" else "a", question)
                    start = len(text) - len(f"{question} in the image?")
                    span = (start, start + len(question))
                    entries = (
                        [phrase_entry(text, *span, message=0, box=region.box, mask=region.mask)] if region.mask else []
                    )
                    yield {
                        "messages": conversation(text, answer),
                        "grounding": entries,
                        "id": f"{image.id}-{kind}-{number}",
                        "file": self.path.name,
                        "row": image.number,
                        "kind": kind,
                    }
                    number += 1


@dataclass
class _Image:
    """An image with its annotations.

    Args:
        number: of its entry in `source`, the file of instances.
        id, file, width, height: of it.
        instances: numbered, by the name of their category.
        captions: numbered.
        problems: annotations without a category.
    """

    source: str
    number: int
    id: Any
    file: dict[str, Any]
    width: int
    height: int
    instances: dict[str, list[tuple[int, dict[str, Any]]]]
    captions: list[tuple[int, dict[str, Any]]]
    problems: list[BadEntry]
    _regions: dict[str, _Region] = field(default_factory=dict)

    def meant(self, naming: Naming) -> str | None:
        """The category whose instances words mean, or None.

        That is the only one of their categories that the image has. Where the words say how many things they mean, the image must have as many
        instances and no crowd: otherwise some of them are meant, and nobody knows which.
        """
        here = [category for category in naming.categories if category in self.instances]
        if len(here) != 1:
            return None
        instances = self.instances[here[0]]
        crowd = any(instance.get("iscrowd") for _, instance in instances)
        return here[0] if naming.count is None or (naming.count == len(instances) and not crowd) else None

    def region(self, category: str) -> _Region:
        """All instances of a category, crowds included."""
        if category not in self._regions:
            masks: list[dict[str, Any]] = []
            problems: list[BadEntry] = []
            for number, instance in self.instances[category]:
                try:
                    masks.append(segmentation_to_rle(instance.get("segmentation"), self.height, self.width))
                except BadEntryError as error:
                    problems.append(BadEntry(self.source, number, error.kind, f"the annotation {error}", phrase=True))
            mask = None if problems else join_rle(masks)
            if mask is None or not rle_area(mask):
                self._regions[category] = _Region(None, None, problems)
            else:
                self._regions[category] = _Region(rle_box(mask), mask, problems)
        return self._regions[category]


@dataclass(frozen=True)
class _Region:
    """Box and mask of instances. None where one is damaged, or none has a pixel: COCO has two such annotations (of the images 200365 and 550395)."""

    box: list[float] | None
    mask: dict[str, Any] | None
    problems: list[BadEntry]


class _Index:
    """The tables of both files, read only."""

    def __init__(self, source: _Coco, work: Path):
        self.source, self.work = source, work
        self.instances, self.captions = Entries(work / "instances.sqlite"), Entries(work / "captions.sqlite")
        self.names: dict[int, str] = {}
        for number, entry in self.instances.slice("categories"):
            if (
                not isinstance(entry.get("id"), int)
                or not isinstance(entry.get("name"), str)
                or not entry["name"].strip()
            ):
                raise ValueError(
                    f'{source.path}, categories[{number}] is not {{"id": number, "name": text}}; use the original file'
                )
            self.names[entry["id"]] = entry["name"]
        self.words = CategoryWords(self.names.values())

    def image(self, number: int, entry: dict[str, Any]) -> _Image:
        """An entry of `images` with its annotations.

        Raises:
            BadEntryError: if its id is not its own, or it has no file, another size, or no caption.
        """
        identity = entry.get("id")
        if len(self.instances.find("images", identity)) != 1:
            raise BadEntryError(
                "image without an id of its own",
                f"has the id {identity!r:.100}, which is none or another image's; correct it",
            )
        file = image_file(self.source.folder, entry.get("file_name"))
        width, height = check_size(file, entry.get("width"), entry.get("height"))
        captions = self.captions.find_numbered("annotations", identity)
        if not captions:
            raise BadEntryError(
                "image without captions",
                f"has no caption in {self.source.captions}; use the file that goes with the instances",
            )
        instances: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        problems = []
        for place, annotation in self.instances.find_numbered("annotations", identity):
            category = annotation.get("category_id")
            if isinstance(category, int) and category in self.names:
                instances[self.names[category]].append((place, annotation))
            else:
                reason = f"the annotation has the category {category!r:.100}, which is none of the file's; correct or remove it"
                problems.append(BadEntry(self.source.path.name, place, "unknown category", reason, phrase=True))
        return _Image(
            self.source.path.name, number, identity, file, width, height, dict(instances), captions, problems
        )

    def orphans(self, entries: Entries, piece: Piece) -> Iterator[BadEntry]:
        """Annotations of images that the file of instances does not have."""
        for number, annotation in entries.slice("annotations", piece.start, piece.end):
            identity = annotation.get("image_id")
            if not self.instances.find("images", identity):
                reason = f"the annotation is of the image {identity!r:.100}, which {self.source.path.name} does not have; remove it"
                yield BadEntry(piece.file, number, "annotation of an unknown image", reason)

    @functools.cached_property
    def _ranked(self) -> tuple[list[str], dict[str, list[str]]]:
        """Categories by the number of images that have them, and for each those that are in an image with it."""
        counted = json.loads((self.work / "objects.json").read_text(encoding="utf-8"))
        return _rank(self.names.values(), counted["images"]), {
            name: _rank(self.names.values(), counts) for name, counts in counted["together"].items()
        }

    def absent(self, kind: str, present: str, taken: set[str], chance: random.Random) -> str | None:
        """A category that is not taken, chosen as POPE does beside one that is there. None if all are taken."""
        popular, together = self._ranked
        ranked = {"random": [], "popular": popular, "adversarial": together[present]}[kind]
        left = [name for name in popular if name not in taken]  # categories of no image are never asked
        chosen = next((name for name in ranked if name not in taken), None)
        return chosen or (chance.choice(left) if left else None)


def _rank(names: Iterable[str], counts: dict[str, int]) -> list[str]:
    """The names that were counted, the most frequent first, equals in their own order."""
    return sorted((name for name in names if name in counts), key=lambda name: -counts[name])


def _orphan_pieces(table: str, file: Path, count: int) -> list[Piece]:
    return [
        Piece(f"{table}-{piece.name}", file.name, piece.start, piece.end, {"table": table})
        for piece in cut(file.name, count, 100_000)
    ]


def _count_objects(index: _Index, file: Path) -> None:
    """Counts the images with each category and with each two, as JSON. Images with fewer than three have no questions and do not count."""
    if file.is_file():
        return
    images: Counter[str] = Counter()
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for _, entry in index.instances.slice("images"):
        found = [annotation.get("category_id") for annotation in index.instances.find("annotations", entry.get("id"))]
        there = [name for category, name in index.names.items() if category in found]
        if len(there) >= _ASKED:
            images.update(there)
            for name in there:
                together[name].update(other for other in there if other != name)
    with new_file(file) as partial:
        partial.write_text(json.dumps({"images": images, "together": together}), encoding="utf-8")
