# SPDX-License-Identifier: Apache-2.0
"""How benchmarks read their data: JSON lines, tables with images, image files; and parts of the questions."""

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..processing.image_processing_agevlm import load_image
from ..processing.rows import is_unicode


def read_lines(file: str | os.PathLike, columns: Iterable[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, whatever its name ends with.

    Raises:
        OSError: if it cannot be read.
        ValueError: if a line is not an object, or lacks one of `columns`; says which.
    """
    rows = []
    for number, line in enumerate(Path(file).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: is not JSON ({error}); write one object a line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: is not an object; write one object a line")
        if missing := [name for name in columns if name not in row]:
            raise ValueError(f"{file}, line {number}: lacks {', '.join(missing)}; it has {', '.join(row)}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} has no lines")
    return rows


def read_table(data: str | os.PathLike, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a data set that holds its images in a column `image`: a Hub id, or a folder or `.parquet` file.

    Returns:
        rows of `columns` and of `load_image`, as [`~agevlm.evaluation.answers.Question`] has it.

    Raises:
        FileNotFoundError: if there is nothing of this name, here or on the Hub.
        ValueError: if it is not a data set, lacks a column, or an image is a URL.
        ImportError: if `datasets` is not installed.
    """
    from ..data.readers import check_images, read_rows

    dataset = read_rows(data)
    if missing := [name for name in (*columns, "image") if name not in dataset.column_names]:
        raise ValueError(f"{data} lacks the columns {', '.join(missing)}; it has {', '.join(dataset.column_names)}")

    if not len(dataset):
        raise ValueError(f"{data} has no rows")

    from datasets import Image as ImageFeature

    try:
        images = dataset.select_columns(["image"]).cast_column("image", ImageFeature())
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{data}: its column image does not hold images: {error}") from error
    images = check_images(images, str(data))  # a plain column may have become one of images just now
    return [
        {**row, "load_image": functools.partial(_row_image, images, number, str(data))}
        for number, row in enumerate(dataset.select_columns(list(columns)))
    ]


def _row_image(images: Any, number: int, name: str) -> Image.Image:
    try:
        image = images[number]["image"]
    except Exception as error:  # decoders raise errors of many types for damaged data
        raise ValueError(
            f"{name}, row {number + 1}: its image cannot be read ({error or type(error).__name__})"
        ) from error
    if image is None:
        raise ValueError(f"{name}, row {number + 1}: has no image; add it or remove the row")
    return image


def data_settings(data: str | os.PathLike, images: str | os.PathLike | None, **chosen: Sequence[str] | None) -> dict:
    """A benchmark's settings that say which questions are asked, as values that JSON can hold."""
    return {
        "data": str(data),
        "images": None if images is None else str(images),
        **{name: None if names is None else list(names) for name, names in chosen.items()},
    }


def check_texts(row: Mapping[str, Any], columns: Iterable[str]) -> None:
    """
    Raises:
        ValueError: if one of a row's `columns` is not a text; names the place in the data, `row["where"]`.
    """
    for name in columns:
        if not is_text(row[name]):
            raise ValueError(f"{row['where']}: its {name} must be a text, got {row[name]!a:.200}")


def is_text(value: Any) -> bool:
    """Whether a value is a text with more than white space, of whole characters."""
    return isinstance(value, str) and bool(value.strip()) and is_unicode(value)


def image_file(path: Path, where: str) -> Callable[[], Image.Image]:
    """What loads the image of a file. `where` says which row it belongs to.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no such image file: {path}; name the folder of the images with --images")

    def load() -> Image.Image:
        try:
            return load_image(path)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    return load


def first_of_each(rows: Iterable[Any], limit: int | None, group: Callable[[Any], Any]) -> list[Any]:
    """The first `limit` rows of each group, in order; all of them by default."""
    if limit is not None and limit < 1:
        raise ValueError(f"the limit must be at least 1, got {limit}")
    seen: Counter[Any] = Counter()
    kept = []
    for row in rows:
        seen[group(row)] += 1
        if limit is None or seen[group(row)] <= limit:
            kept.append(row)
    return kept


def check_chosen(chosen: Sequence[str] | None, known: Iterable[str], what: str) -> None:
    """
    Raises:
        ValueError: if one of `chosen` is not `known`.
    """
    known = list(dict.fromkeys(known))
    if unknown := [name for name in chosen or () if name not in known]:
        raise ValueError(f"there is no {what} '{unknown[0]}' in the data; there are: {', '.join(known)}")


def lenient_table(what: str, scores: Mapping[str, Mapping[str, Any]], unread: str) -> list[list[str]]:
    """The accuracy by a lenient rule beside the score by the authors' own, and how many answers only it reads.

    Args:
        what: the header of the rows' names.
        scores: by name; their `accuracy` is the score.
        unread: how the scores call the number of answers that the authors' rule does not read.
    """

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    header = [what, "score", "by the lenient rule", "read by neither rule", "read by the lenient rule alone"]
    return [
        header,
        *(
            [
                name,
                share(row["accuracy"]),
                share(row["lenient_accuracy"]),
                str(row["lenient_unanswered"]),
                f"{row['lenient_only']} of {row[unread]}",
            ]
            for name, row in scores.items()
        ),
    ]
