# SPDX-License-Identifier: Apache-2.0
"""Readers of every format of data, as rows (`agevlm.processing.rows`): data sets of rows, LLaVA's and The Cauldron's on the Hub, and the
published formats of [`agevlm.data.formats`]."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub import ask_hub, unreachable
from ..processing.rows import ORIGIN_COLUMN, import_datasets, place_images, row_features
from .download import is_local, local
from .formats import SOURCES, open_source
from .formats.entries import read_json
from .formats.llava import llava_messages
from .prepared import find_prepared, prepare_source

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from .formats.source import Source

logger = logging.getLogger(__name__)

# The column of a data set that holds the conversations.
CONVERSATIONS = {"rows": "messages", "llava": "conversations", "cauldron": "texts"}
_FIX = (
    "`agevlm data check` lists all such rows, and `on_bad_row: skip` in a recipe's entry of the data leaves them out"
)
_URL = r"^[A-Za-z][A-Za-z0-9+.-]*(://|::)"


def find_source(
    path: str | os.PathLike,
    format: str,
    images: str | os.PathLike | None = None,
    split: str | None = None,
    name: str | None = None,
) -> Source | None:
    """The published data set that a recipe's part names, downloaded if it is at an address; None where the part is a data set of rows.

    Raises:
        OSError: if something is missing, or cannot be downloaded.
        ValueError: if there is no such format, or the arguments do not fit it.
    """
    # Of LLaVA's format there are files, and data sets on the Hub.
    if format in SOURCES and not (format == "llava" and Path(path).suffix not in (".json", ".jsonl")):
        if name is not None:
            raise ValueError(f"{path}: the format {format} has no configurations; leave `name` out")
        return open_source(format, local(path), None if images is None else local(images), split)
    if format not in CONVERSATIONS:
        raise ValueError(
            f"{path}: no format {format!r}; choose one of: {', '.join(dict.fromkeys([*CONVERSATIONS, *SOURCES]))}"
        )
    if images is not None:
        raise ValueError(
            f"{path}: `images` is the folder, or the archive, of the images of a published data set, or of a .json or .jsonl file of format "
            f"llava; got format {format} and images {images}"
        )
    return None


def missing_work(
    path: str | os.PathLike,
    format: str,
    images: str | os.PathLike | None = None,
    split: str | None = None,
    name: str | None = None,
) -> str | None:
    """What must be done before a recipe's part can be read, for people; None if nothing is known of.

    Raises:
        OSError, ValueError: as [`find_source`].
    """
    if missing := [os.fspath(address) for address in (path, images) if address is not None and not is_local(address)]:
        return f"Downloading {', '.join(missing)}"
    source = find_source(path, format, images, split, name)
    if source is not None:
        return None if find_prepared(source) is not None else f"Converting {path} (format {format})"
    if os.path.exists(path) or "://" in os.fspath(path) or _is_kept(os.fspath(path), name):
        return None
    return f"Downloading {path}"


def _is_kept(path: str, name: str | None) -> bool:
    """Whether the cache of `datasets` has a data set of the Hub, in the layout that the library itself looks for when it is offline."""
    from datasets.naming import camelcase_to_snakecase

    *owner, last = path.split("/")
    folder = Path(import_datasets().config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(last)]))
    return any(folder.glob(f"{name or ''}*/*/*"))


def read_dataset(
    path: str | os.PathLike,
    format: str = "rows",
    *,
    name: str | None = None,
    split: str | None = None,
    images: str | os.PathLike | None = None,
    columns: Collection[str] = (),
    keep_bad: bool = False,
    allow_urls: bool = False,
) -> Dataset:
    """Read data of any format as rows to train on.

    Only conversations are converted. Images stay as they are stored and are decoded when a batch needs them.

    Args:
        path: the file or folder of a published data set, or a data set (see `read_rows`); or its address, see
            [`~agevlm.data.download.local`].
        format: one of [`~agevlm.data.formats.SOURCES`], whose rows are made once and kept in a cache
            ([`~agevlm.data.prepared.prepare_source`]); or that of a data set, whose conversations are in the column `messages` (`rows`),
            `conversations` (`llava`, where `path` is no .json or .jsonl file) or `texts` (`cauldron`).
        name: the configuration of a data set on the Hub that has several; requires `split`.
        split: may be left out if the data set has one split only.
        images: the folder, or the archive, of a published data set's images, or its address.
        columns: names of further columns to keep, of texts, numbers or truth values.
        keep_bad: keep rows of a data set that are not of the format, without messages and images; their origin says what is wrong, and
            the collator refuses them. Bad entries of a published data set are left out and counted. By default the first one is an
            error.
        allow_urls: see `read_rows`.

    Returns:
        rows with the columns `messages`, `images` or `image` if there are any, `grounding` if there is any, `columns`, and
        [`~agevlm.processing.rows.ORIGIN_COLUMN`], with `skip` as `keep_bad` is.

    Raises:
        OSError: if there is no such data set, file or folder.
        ValueError: if the data are not of this format, the arguments do not fit together, or a column is missing.
        ImportError: if `datasets` is not installed.
    """
    if (source := find_source(path, format, images, split, name)) is not None:
        return _source_rows(source, columns, keep_bad)
    path = local(path)
    problems: dict[int, str] | None = {} if keep_bad else None
    if name is None:
        dataset = _read_rows(path, split, problems, allow_urls)
    elif split is not None:
        dataset = check_images(from_hub(path, name, split=split), path, problems, allow_urls)
    else:
        raise ValueError(f"{path}: `name` requires `split`; add it")
    file = os.fspath(path) if split is None else f"{os.fspath(path)} ({split})"
    return _as_rows(dataset, format, file, columns, problems)


def read_rows(path: str | os.PathLike, split: str | None = None, *, allow_urls: bool = False) -> Dataset:
    """Open a data set on disk or on the Hub with all of its columns.

    Args:
        path: a folder that `save_to_disk` wrote or another one that `datasets.load_dataset` reads, a `.json`, `.jsonl`
            or `.parquet` file of rows, or the id of a data set on the Hub. Paths of images in a JSON file are relative
            to its folder; such a file is read into memory.
        split: the name of the split. A data set without a name of its split has the split `train`. May be left out if
            there is one split only.
        allow_urls: accept images that are URLs. `datasets` would fetch any URL when it decodes a row, so images then stay as
            they are stored, `{"bytes": ..., "path": ...}`, for `load_image`, which has limits.

    Raises:
        FileNotFoundError: if there is no such data set, on disk or on the Hub.
        ValueError: if there is no such split, several splits and no `split`, a file has no rows of the format, or an
            image is a URL and `allow_urls` is False.
        ImportError: if `datasets` is not installed.
    """
    return _read_rows(path, split, None, allow_urls)


def _read_rows(
    path: str | os.PathLike, split: str | None, problems: dict[int, str] | None, allow_urls: bool
) -> Dataset:
    datasets = import_datasets()
    import pyarrow as pa
    import pyarrow.parquet

    place, name = Path(path), os.fspath(path)
    try:
        if place.is_dir() and any((place / file).is_file() for file in ("state.json", "dataset_dict.json")):
            loaded = read_saved(name)
        elif place.is_dir():
            loaded = datasets.load_dataset(name)
        elif place.suffix in (".json", ".jsonl") and place.is_file():
            loaded = _rows_to_dataset(read_json_rows(place), name, problems)
        elif place.suffix == ".parquet" and place.is_file():
            if not pa.parquet.read_metadata(name).num_rows:
                raise ValueError(f"{path} has no rows")
            loaded = datasets.Dataset.from_parquet(name)
        elif place.is_file():
            raise ValueError(f"{path} is not a .json, .jsonl or .parquet file; convert it to one of them")
        else:
            loaded = from_hub(name)
    except FileNotFoundError:
        raise
    except (
        datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError
    ) as error:  # fmt: skip
        if isinstance(error, (ValueError, OSError)) and name in str(error):
            raise
        raise ValueError(f"{path} cannot be read as a data set: {error.__cause__ or error}") from error

    splits = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    names = ", ".join(splits)
    if split is None and len(splits) > 1:
        raise ValueError(f"{path} has several splits; name one of them: {names}")
    if split is not None and split not in splits:
        raise ValueError(f"{path} has no split {split!r}; it has: {names}")
    dataset = splits[split] if split is not None else next(iter(splits.values()))
    if "images" in dataset.column_names:
        images = dataset.features["images"]
        if not isinstance(getattr(images, "feature", None), datasets.Image):
            try:
                dataset = dataset.cast_column("images", row_features()["images"])
            except (TypeError, ValueError, NotImplementedError) as error:
                raise ValueError(f"{path}: its column images does not hold lists of images: {error}") from error
    return check_images(dataset, name, problems, allow_urls)


def check_images(
    dataset: Dataset, name: str, problems: dict[int, str] | None = None, allow_urls: bool = False
) -> Dataset:
    """The data set, if `datasets` would fetch no image of it when it decodes or saves one. Only paths are read.

    Columns with other files, such as sounds or images inside of messages, become plain values, `{"bytes": ..., "path": ...}`, because
    `datasets` would fetch those as well.

    Args:
        dataset: with any columns.
        name: of the data set, for errors.
        problems: where rows with URLs are noted; by default the first is an error.
        allow_urls: see `read_rows`.

    Raises:
        ValueError: if an image is a URL, and nothing is noted or allowed.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Features
    from datasets.features.features import require_decoding

    plain = Features.from_arrow_schema(dataset.data.schema.remove_metadata())
    columns = _image_columns(dataset)
    files = [name for name, feature in dataset.features.items() if name not in columns and require_decoding(feature)]
    if files:
        dataset = _with_features(dataset, {name: plain[name] for name in files})
    if allow_urls:
        return stored_images(dataset)
    for column in columns:
        first = 0
        for batch in dataset.select_columns(column).with_format("arrow").iter(10_000):
            for stored in batch[column].chunks:
                rows, length = None, len(stored)
                if not pa.types.is_struct(stored.type):
                    rows, stored = pc.list_parent_indices(stored), pc.list_flatten(stored)
                paths = pc.fill_null(pc.struct_field(stored, "path"), "")
                is_file = pc.is_null(pc.struct_field(stored, "bytes"))
                remote = pc.and_(is_file, pc.match_substring_regex(paths, _URL))
                for place in pc.indices_nonzero(remote).to_pylist():
                    number = first + (place if rows is None else rows[place].as_py())
                    _note(problems, name, number, url_problem(paths[place].as_py()))
                first += length
    return dataset


def is_url(path: str | None) -> bool:
    """Whether `datasets` would fetch an image at this path."""
    return re.match(_URL, path or "") is not None


def url_problem(path: str) -> str:
    """What is wrong with an image at a URL where none is allowed."""
    return (
        f"its image {path!r:.200} is a URL, and images at URLs in data are not fetched: download them, or allow it "
        "(`--allow-urls`, `training.allow_urls=true` of a recipe)"
    )


def _note(problems: dict[int, str] | None, name: str, number: int, problem: str) -> None:
    """Notes what is wrong with a row, or raises it where nothing is noted."""
    if problems is None:
        raise ValueError(f"{name}, row {number}: {problem}; {_FIX}")
    problems.setdefault(number, problem)


def _image_columns(dataset: Dataset) -> list[str]:
    """The columns of images, or of lists of images."""
    from datasets import Image

    features = dataset.features.items()
    return [name for name, feature in features if isinstance(getattr(feature, "feature", feature), Image)]


def stored_images(dataset: Any) -> Any:
    """A `datasets.Dataset`, or several by name, with images as they are stored, `{"bytes": ..., "path": ...}`.

    `datasets` decodes images when a row is taken, where an error names no row. Nothing is copied. Anything else is returned
    as it is.
    """
    from datasets import Dataset, Image

    if isinstance(dataset, dict):
        return type(dataset)({name: stored_images(part) for name, part in dataset.items()})
    if not isinstance(dataset, Dataset):
        return dataset
    stored: dict[str, Any] = {}
    for name in _image_columns(dataset):
        feature = dataset.features[name]
        stored[name] = Image(decode=False) if isinstance(feature, Image) else type(feature)(Image(decode=False))
    return _with_features(dataset, stored)


def _with_features(dataset: Dataset, features: dict[str, Any]) -> Dataset:
    """A view of a data set whose columns are read as other types of the same storage. Nothing is copied."""
    from datasets.fingerprint import Hasher

    view = copy.deepcopy(dataset)  # as `datasets` does; the tables are shared
    view._info.features.update(features)
    view._fingerprint = Hasher.hash([dataset._fingerprint, features])
    return view


def read_saved(path: str | os.PathLike) -> Dataset | DatasetDict:
    """The data set of a folder that `save_to_disk` wrote.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if one of its files is damaged, or it has no rows.
    """
    try:
        return import_datasets().load_from_disk(os.fspath(path))
    except FileNotFoundError:
        raise
    except IndexError as error:  # the library's, where a data set was saved without rows
        raise ValueError(f"{path} has no rows") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:  # as its readers raise
        raise ValueError(
            f"{path}: a file of this data set is damaged ({type(error).__name__}: {error}); make the data set again, or copy it "
            "once more"
        ) from error


def from_hub(path: str, *args: Any, **options: Any) -> Any:
    """The data set of a Hub id, or the copy in the cache where the Hub does not answer; or of a folder laid out as on the Hub."""
    datasets = import_datasets()
    error = None if Path(path).is_dir() else ask_hub(path, "data set")
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = offline or error is not None  # else each file is asked for several times
        return datasets.load_dataset(path, *args, **options)
    except (FileNotFoundError, ConnectionError) as missing:
        if error is not None:
            raise unreachable(path, "data set", error) from missing
        raise FileNotFoundError(f"The Hub's data set {path} cannot be read: {missing}") from missing
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def read_json_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a `.json` (a list) or `.jsonl` file, unchanged but for the relative paths of images, which become
    absolute: they start from the file's folder. So `check_dataset` can name the mistakes in rows that no data set could
    hold.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is not JSON, or not a list of objects.
    """
    path = Path(path)

    def with_absolute_path(image: Any) -> Any:
        if isinstance(image, str):
            image = {"path": image, "bytes": None}
        if isinstance(image, dict) and isinstance(image.get("path"), str) and "://" not in image["path"]:
            return image | {"path": str(path.absolute().parent / image["path"])}
        return image

    return [
        entry | {"images": [with_absolute_path(image) for image in entry["images"]]}
        if isinstance(entry.get("images"), list)
        else entry
        for entry in _entries(path)
    ]


def _source_rows(source: Source, kept: Collection[str], keep_bad: bool) -> Dataset:
    """The rows of a published data set, with their origins. All columns but the origins' flags stay on disk."""
    prepared = prepare_source(source, on_bad_row="skip" if keep_bad else "error")
    import pyarrow as pa
    from datasets import Dataset, concatenate_datasets
    from datasets.fingerprint import Hasher

    rows = prepared.dataset
    if missing := set(kept) - ({"id"} | set(source.columns)):
        raise ValueError(
            f"{source.path} has no column {', '.join(sorted(missing))}, but the columns {', '.join(['id', *source.columns])}"
        )
    if prepared.bad:
        logger.warning(f"{source.path}: left out {prepared.describe_bad()}.")
    places = rows.data.table.select(["file", "row"])
    origins = [
        pa.StructArray.from_arrays(
            [*batch.columns, pa.nulls(len(batch), pa.string()), pa.repeat(pa.scalar(keep_bad), len(batch))],
            ["file", "row", "problem", "skip"],
        )
        for batch in places.to_batches()
    ]
    fingerprint = Hasher.hash([rows._fingerprint, keep_bad])
    column = Dataset(pa.table({ORIGIN_COLUMN: pa.chunked_array(origins)}), fingerprint=fingerprint)
    shown = rows.select_columns(["images", "messages", "grounding", *kept])
    return concatenate_datasets([shown, column], axis=1)


# --- files to data sets ---


def _entries(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON or JSON-lines file."""
    values = [entry for _, entry, _ in read_json(path)]
    if not values:
        raise ValueError(f"{path} has no entries")
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise ValueError(f"{path}, entry {number} is not an object; write {{…}}")
    return values


def _rows_to_dataset(rows: list[dict[str, Any]], name: str, problems: dict[int, str] | None) -> Dataset:
    """A data set of rows from JSON. `row_features` types the columns of the format, `datasets` infers the others."""
    import pyarrow as pa
    from datasets import Dataset, Features

    known = row_features()
    known |= dict.fromkeys(("prompt", "chosen", "rejected"), known["messages"])
    names = list(dict.fromkeys(key for row in rows for key in row))
    if not names:
        raise ValueError(f"{name}: its rows are empty, without messages")
    rows = list(rows)
    for number, row in enumerate(rows):
        try:
            if not isinstance(row.get("images"), list | None):
                raise ValueError(f"images is {row['images']!r:.80}, but must be a list, [] for none")
            shown = len(row.get("images") or ())
            for column in {"messages", "prompt", "chosen", "rejected"} & set(row):
                if row[column] is not None:
                    if not isinstance(row[column], list):
                        raise ValueError(f"{column} is {row[column]!r:.80}, but must be a list of messages")
                    row[column] = place_images(row[column], shown if column in ("messages", "prompt") else 0)
        except ValueError as error:
            _note_unfit(problems, name, number, error)
            rows[number] = {}
    try:
        extra = {key: [row.get(key) for row in rows] for key in names if key not in known}
        features = Features({**known, **Dataset.from_dict(extra).features})
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise ValueError(
            f"{name}: a column beside those of the row format has values of several types: {error}"
        ) from error
    return _to_dataset(rows, Features({key: features[key] for key in names}), name, problems)


def _to_dataset(rows: list[dict[str, Any]], features: Any, name: str, problems: dict[int, str] | None) -> Dataset:
    """A data set of rows; those that do not fit the columns' types are empty, and noted."""
    import pyarrow as pa
    from datasets import Dataset

    errors = (ValueError, TypeError, AttributeError, KeyError, OverflowError, pa.ArrowException)

    def build(rows: list[dict[str, Any]]) -> Dataset:
        return Dataset.from_dict({key: [row.get(key) for row in rows] for key in features}, features=features)

    def empty_unfit(first: int, end: int) -> None:
        try:
            build(rows[first:end])
        except errors as error:
            if end - first > 1:
                empty_unfit(first, (first + end) // 2)
                empty_unfit((first + end) // 2, end)
            else:
                _note_unfit(problems, name, first, error)
                rows[first] = {}

    try:
        return build(rows)
    except errors:
        empty_unfit(0, len(rows))
        return build(rows)


def _note_unfit(problems: dict[int, str] | None, name: str, number: int, error: Exception) -> None:
    if problems is None:
        raise ValueError(
            f"{name} has rows that do not fit the row format: row {number}: {error}; `agevlm data check {name}` lists them, "
            "and `on_bad_row: skip` in a recipe's entry of the data leaves them out"
        ) from error
    problems[number] = f"does not fit the row format: {error}"


# --- data sets to rows ---


def _as_rows(
    dataset: Dataset, format: str, path: str, kept: Collection[str], problems: dict[int, str] | None
) -> Dataset:
    """A data set of any format as rows. Columns are put side by side, so that images are not copied."""
    import pyarrow as pa
    from datasets import ClassLabel, Features, Image, Value, concatenate_datasets

    source = CONVERSATIONS[format]
    if source not in dataset.column_names:
        raise ValueError(
            f"{path} has no column '{source}', which the format {format} requires, but {', '.join(dataset.column_names)}; "
            f"the formats' columns: {', '.join(f'{name} {column}' for name, column in CONVERSATIONS.items())}"
        )
    if missing := set(kept) - set(dataset.column_names):
        raise ValueError(
            f"{path} has no column {', '.join(sorted(missing))}, but the columns {', '.join(dataset.column_names)}"
        )
    if unfit := [name for name in kept if not isinstance(dataset.features[name], Value | ClassLabel)]:
        raise ValueError(
            f"{path}: its column {unfit[0]} does not hold single texts, numbers or truth values; name one that does"
        )
    features = row_features()
    image = next((name for name in ("images", "image") if name in dataset.column_names), None)
    if image and not isinstance(getattr(dataset.features[image], "feature", dataset.features[image]), Image):
        raise ValueError(
            f"{path}: its column {image} does not hold images, but {dataset.features[image]}; if these are names of files, "
            "download the data set, and give its .json file as `path` and the folder of its images as `images`"
        )
    columns = [dataset.select_columns(image)] if image else []
    messages = dataset.select_columns(source)
    if format != "rows" or messages.features["messages"] != features["messages"]:
        counts = count_images(dataset, image)
        bad, keep_bad = dict(problems or {}), problems is not None

        def to_messages(conversation: Any, number: int) -> dict[str, Any]:
            problem = bad.get(number)
            messages: list[dict[str, Any]] = []
            try:
                messages = [] if problem else convert_messages(conversation, format, counts[number])
            except ValueError as error:
                problem = str(error)
                if not keep_bad:
                    raise ValueError(f"{path}, row {number} {problem}; {_FIX}") from error
            return {"messages": messages, "problem": problem}

        messages = messages.map(
            to_messages,
            with_indices=True,
            input_columns=[source],
            remove_columns=[source],
            features=Features(messages=features["messages"], problem=Value("string")),
            desc=f"Conversations of {path}",
        )
        if problems is not None:
            found = messages.with_format("arrow")[:]["problem"].to_pylist()
            problems |= {number: problem for number, problem in enumerate(found) if problem}
        messages = messages.select_columns("messages")
    columns.append(messages)
    if "grounding" in dataset.column_names:
        grounding = dataset.select_columns("grounding")
        same = grounding.features["grounding"] == features["grounding"]
        try:
            columns.append(grounding if same else grounding.cast(Features(grounding=features["grounding"])))
        except (ValueError, TypeError, KeyError, NotImplementedError, pa.ArrowException) as error:
            raise ValueError(
                f"{path}: its column grounding does not hold lists of phrases, see agevlm.processing.rows: {error}"
            ) from error
    if kept:
        columns.append(dataset.select_columns(list(kept)))
    columns.append(_origins(path, len(dataset), problems))
    return concatenate_datasets(columns, axis=1)


def _origins(file: str, number: int, problems: dict[int, str] | None) -> Dataset:
    """The column of the rows' origins, made without a pass over the rows."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset
    from datasets.fingerprint import Hasher

    notes = (
        pa.array([problems.get(i) for i in range(number)], pa.string()) if problems else pa.nulls(number, pa.string())
    )
    fields = {
        "file": pa.repeat(pa.scalar(file), number),
        "row": pa.array(np.arange(number)),
        "problem": notes,
        "skip": pa.repeat(pa.scalar(problems is not None), number),
    }
    origins = pa.StructArray.from_arrays(list(fields.values()), list(fields))
    table = pa.table({ORIGIN_COLUMN: origins})
    return Dataset(table, fingerprint=Hasher.hash([file, number, problems]))


def convert_messages(conversation: Any, format: str, num_images: int) -> list[dict[str, Any]]:
    """The messages of a conversation of a data set of any format, as `row_features` has them, with a part for each image.

    Raises:
        ValueError: if it is not of the format.
    """
    try:
        placed = place_images(_messages(conversation, format), num_images)
        contents = [[{"type": part["type"], "text": part.get("text")} for part in m["content"]] for m in placed]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is not a conversation of the format {format}: {error}") from error
    return [{"role": m["role"], "content": content} for m, content in zip(placed, contents, strict=True)]


def _messages(conversation: Any, format: str) -> list[dict[str, Any]]:
    """Messages of one conversation."""
    if format == "llava":
        return llava_messages(conversation)
    if format == "cauldron":
        return [{"role": role, "content": turn[role]} for turn in conversation for role in ("user", "assistant")]
    return conversation


def count_images(dataset: Dataset, column: str | None) -> list[int]:
    """The number of images of each row, without decoding any."""
    import pyarrow.compute as pc

    if column is None:
        return [0] * len(dataset)
    stored = dataset.select_columns(column).with_format("arrow")[:][column]
    counts = pc.list_value_length(stored) if column == "images" else pc.is_valid(stored).cast("int32")
    return pc.fill_null(counts, 0).to_pylist()
