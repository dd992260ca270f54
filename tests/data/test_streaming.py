# SPDX-License-Identifier: Apache-2.0
"""Data that are read while they train: each row goes to one reader, mixed and shuffled, and the same again after a stop."""

import collections
import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import generated_source
import numpy as np
import pyarrow.parquet
import pytest
import torch.utils.data
from accelerate.data_loader import IterableDatasetShard
from generated_source import GeneratedSource, write_generated
from grounded_rows import make_dataset, make_row, photograph

from agevlm.data import DataPart, check_part, read_mixture, streaming
from agevlm.data.readers import read_dataset, stored_images
from agevlm.data.streaming import LEFT_OUT, SHUFFLE_BUFFER, FirstRows, RowStream, SourcePieces, first_rows, open_pieces
from agevlm.processing.rows import ORIGIN_COLUMN, mask_to_rle, row_features

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    """So small that rows leave it before all are in."""
    monkeypatch.setattr("agevlm.data.streaming.SHUFFLE_BUFFER", 8)


def grounded(number: int) -> datasets.Dataset:
    """Rows whose texts are their numbers."""
    rows = []
    mask = mask_to_rle(np.arange(6)[:, None].repeat(8, 1) > 4)
    for i in range(number):
        image = photograph(i, (8, 6))
        rows.append(make_row(image, ("thing", [0, 0, 4, 4], mask), text=f"{i} "))
    return make_dataset(rows)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same 23 rows in a saved folder, a parquet file of six groups, and a folder of parquet files; and data of other formats."""
    folder = tmp_path_factory.mktemp("streamed")
    rows = grounded(23)
    rows.save_to_disk(folder / "saved")
    rows.to_parquet(folder / "rows.parquet", batch_size=4)
    (folder / "hub").mkdir()
    for start in range(0, 23, 8):
        rows.select(range(start, min(start + 8, 23))).to_parquet(folder / "hub" / f"train-{start:02}.parquet")
    images = [row["images"] for row in stored_images(rows)]
    turn = {name: datasets.Value("string") for name in ("user", "assistant")}
    columns = {"images": images, "texts": [[{"user": f"{i}?", "assistant": "Yes."}] for i in range(23)]}
    features = datasets.Features(images=datasets.List(datasets.Image()), texts=datasets.List(turn))
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "cauldron.parquet", batch_size=5)
    turn = {name: datasets.Value("string") for name in ("from", "value")}
    said = [[{"from": "human", "value": f"<image>\n{i}?"}, {"from": "gpt", "value": "Yes."}] for i in range(23)]
    columns = {"image": [image for (image,) in images], "conversations": said}
    features = datasets.Features(image=datasets.Image(), conversations=datasets.List(turn))
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder / "llava")
    (folder / "images").mkdir()
    for i, (image,) in enumerate(images):
        (folder / "images" / f"{i}.png").write_bytes(image["bytes"])
    entries = [{"id": str(i), "image": f"{i}.png", "conversations": turns} for i, turns in enumerate(said)]
    (folder / "llava.json").write_text(json.dumps(entries))
    return folder


FORMATS = {
    "saved": {"path": "saved"},
    "parquet": {"path": "rows.parquet"},
    "hub": {"path": "hub", "split": "train"},
    "cauldron": {"path": "cauldron.parquet", "format": "cauldron"},
    "llava": {"path": "llava", "format": "llava"},
    "llava file": {"path": "llava.json", "format": "llava", "images": "images"},
}


def part(places, name: str, **options) -> DataPart:
    given = {**FORMATS[name]}
    given |= {key: str(places / given[key]) for key in ("path", "images") if key in given}
    return DataPart(**given, streaming=True, **options)


def number_of(row: dict) -> int:
    text = next(part["text"] for part in row["messages"][0]["content"] if part["type"] == "text")
    return int(text.rstrip("?").split()[0].rstrip("?"))


def epoch(stream: RowStream, readers: int = 1, which: int = 0) -> list[list[dict]]:
    """The rows that each of several readers has in an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "_endless", lambda epochs: next(itertools.islice(epochs, which, None)))
        return [list(stream._share(reader, readers, {})) for reader in range(readers)]


def numbers(rows) -> list[int]:
    return [number_of(row) for row in rows]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_those_that_are_read_at_once(name, places):
    given = part(places, name)
    options = {"split": given.split, "images": given.images}
    expected = stored_images(read_dataset(given.path, given.format, **options))
    pieces = open_pieces(given.path, given.format, **options)
    rows = [row for piece in range(pieces.count) for row in pieces.read(piece)]
    assert pieces.rows in (23, None)
    assert len(rows) == 23
    for row, other in zip(rows, expected, strict=True):
        assert row["messages"] == other["messages"]
        assert row["images"] == (other["images"] if "images" in other else [other["image"]])
        assert row["grounding"] == (other.get("grounding") or [])
        assert row[ORIGIN_COLUMN]["problem"] is None
        if name not in ("parquet", "hub", "cauldron"):  # whose pieces are counted by themselves
            assert row[ORIGIN_COLUMN] == other[ORIGIN_COLUMN]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("readers", [1, 2, 3, 8])
def test_every_row_goes_to_one_reader_once_an_epoch(name, readers, places):
    for which in (0, 2):
        shares = [numbers(share) for share in epoch(read_mixture([part(places, name)]), readers, which)]
        assert sorted(itertools.chain(*shares)) == list(range(23))
        assert all(shares)


def test_processes_and_workers_each_have_a_share(places):
    """By the data loaders that train, with workers that are processes of their own, and what accelerate puts around the stream."""
    stream = read_mixture([part(places, "parquet"), DataPart(str(places / "saved"), rows=5)])
    for process in range(2):
        stream.begin(seed=1, batch_size=2, processes=2, process=process)
        shard = IterableDatasetShard(stream, 2, num_processes=2, process_index=process)
        loader = torch.utils.data.DataLoader(shard, batch_size=2, num_workers=2, collate_fn=list)
        batches = [numbers(batch) for batch in itertools.islice(loader, 20)]
        for worker in range(2):  # whose batches come in turn
            share = stream._share(2 * process + worker, 4, {})
            assert list(itertools.chain(*batches[worker::2])) == numbers(itertools.islice(share, 20))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_with_the_next_batch(workers, places):
    stream = read_mixture([part(places, "parquet", weight=2), part(places, "cauldron", weight=1)])

    def batches(number: int, skip: int) -> list:
        stream.begin(seed=5, batch_size=3, skip_batches=skip)
        loader = torch.utils.data.DataLoader(stream, batch_size=3, num_workers=workers, collate_fn=list)
        return [[row and number_of(row) for row in batch] for batch in itertools.islice(loader, number)]

    whole = batches(30, 0)
    resumed = batches(30, 13)  # in the second epoch, and not the turn of the first worker
    assert resumed[:13] == [[None] * 3] * 13
    assert resumed[13:] == whole[13:]


def test_epochs_and_seeds_have_orders_of_their_own(places):
    stream = read_mixture([part(places, "parquet")])

    def rows(seed: int) -> list[int]:
        stream.begin(seed=seed)
        return numbers(itertools.islice(stream, 46))

    first, second = rows(0)[:23], rows(0)[23:]
    assert sorted(first) == sorted(second) == list(range(23))
    assert len({tuple(first), tuple(second), tuple(rows(1)[:23]), tuple(range(23))}) == 4
    assert rows(0)[:23] == first


def test_parts_are_mixed_by_size_or_by_weight(tmp_path, places):
    write_generated(tmp_path / "many", 400)
    many = SourcePieces(GeneratedSource(tmp_path / "many"), skip=False)
    few = open_pieces(str(places / "saved"), "rows")
    for weights in (None, [1, 3]):
        rows = list(itertools.islice(RowStream([many, few], weights), 423 if weights is None else 4000))
        of_few = [row[ORIGIN_COLUMN]["file"] == str(places / "saved") for row in rows]
        if weights is None:
            assert sum(of_few) == 23
            places_of_few = [place for place, here in enumerate(of_few) if here]
            # The mean of 23 places that are drawn from 423 is 211, with a standard deviation of 25.
            assert abs(sum(places_of_few) / 23 - 211) < 100
        else:
            assert abs(sum(of_few) / 4000 - 0.75) < 5 * (0.75 * 0.25 / 4000) ** 0.5


def test_parts_on_disk_keep_the_weights_of_their_values(places, tmp_path):
    rows = grounded(40).add_column("kind", ["often"] * 10 + ["seldom"] * 20 + ["never"] * 10)
    rows.save_to_disk(tmp_path / "kinds")
    by_kind = DataPart(str(tmp_path / "kinds"), weight=1, weight_by={"kind": {"often": 4, "seldom": 1}})
    stream = read_mixture([by_kind, part(places, "parquet", weight=1)])
    drawn = numbers(
        row for row in itertools.islice(stream, 2000) if row[ORIGIN_COLUMN]["file"].startswith(str(tmp_path / "kinds"))
    )
    assert max(drawn) < 30
    assert abs(len(drawn) / 2000 - 0.5) < 5 * (0.25 / 2000) ** 0.5
    assert abs(sum(number < 10 for number in drawn) / len(drawn) - 0.8) < 5 * (0.16 / 1000) ** 0.5


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_some_rows_are_the_same_in_every_epoch_and_for_any_number_of_readers(readers, places):
    stream = read_mixture([part(places, "parquet", rows=9)], seed=7)
    shares = [numbers(share) for share in epoch(stream, readers)]
    assert [len(share) for share in shares] == [-(-(9 - i) // readers) for i in range(readers)]
    drawn = set(itertools.chain(*shares))
    assert len(drawn) == 9
    stream.begin(seed=9)
    assert set(numbers(itertools.islice(stream, 27))) == drawn, "in each epoch, with any order"
    other = read_mixture([part(places, "parquet", rows=9)], seed=8)
    assert set(numbers(epoch(other)[0])) != drawn


def test_an_evaluation_has_the_same_rows_in_memory(places):
    given = [part(places, "parquet", rows=9)]
    rows = read_mixture(given, seed=7, in_memory=True)
    assert isinstance(rows, datasets.Dataset)
    assert set(numbers(rows)) == set(numbers(epoch(read_mixture(given, seed=7))[0]))
    assert rows.features["images"] == datasets.List(datasets.Image())
    assert rows[0]["images"][0].size == (8, 6)
    with pytest.raises(ValueError, match="say how many as `rows`"):
        read_mixture([part(places, "parquet")], in_memory=True)


def test_bad_entries_are_none_of_the_rows_of_an_evaluation(tmp_path):
    write_generated(tmp_path / "some", 60, bad={"missing image": 3})
    assert len(first_rows(SourcePieces(GeneratedSource(tmp_path / "some"), skip=True), 20, 0)) == 20
    write_generated(tmp_path / "none", 9, bad={"missing image": 1})
    with pytest.raises(ValueError, match="none has no good rows"):
        first_rows(SourcePieces(GeneratedSource(tmp_path / "none"), skip=True), 20, 0)


def test_bad_entries_are_left_out_and_counted(tmp_path):
    write_generated(tmp_path / "bad", 60, bad={"missing image": 7, "not downloaded": 5}, bad_phrases={"empty box": 4})
    stream = RowStream([SourcePieces(GeneratedSource(tmp_path / "bad"), skip=True)])
    stream.find_problem = lambda row: "it is odd" if number_of(row) % 20 == 1 else None
    bad = {*range(0, 60, 7)} | {*range(0, 60, 5)}
    good = [number for number in range(60) if number not in bad and number % 20 != 1]
    assert sorted(itertools.chain(*map(numbers, epoch(stream, 2)))) == good
    counted: collections.Counter = collections.Counter()
    for row in itertools.islice(stream, 10 * len(good)):
        for kind, (number, first) in row[ORIGIN_COLUMN].get(LEFT_OUT, {}).items():
            counted[kind] += number
            assert first.startswith(f"{tmp_path / 'bad'}, generated.json, row ")
    # In ten epochs. What is read ahead into the buffer counts as well.
    gone, missing = len(range(0, 60, 5)), len([i for i in range(0, 60, 7) if i % 5])
    boxes, odd = len([i for i in range(0, 60, 4) if i not in bad]), len([i for i in (1, 21, 41) if i not in bad])
    assert counted == {"not downloaded": 10 * gone, "missing image": 10 * missing, "empty box": 10 * boxes,
                       "cannot be trained on": 10 * odd}  # fmt: skip


def test_without_skip_only_images_that_were_gone_are_left_out(tmp_path):
    write_generated(tmp_path / "bad", 60, bad={"missing image": 7, "not downloaded": 5})
    stream = RowStream([SourcePieces(GeneratedSource(tmp_path / "bad"), skip=False)])
    rows = list(itertools.islice(stream, 60 - 10))
    problems = [row[ORIGIN_COLUMN]["problem"] for row in rows if row[ORIGIN_COLUMN]["problem"]]
    assert len(problems) == len([i for i in range(0, 60, 7) if i % 5])
    assert all("there is no image" in problem for problem in problems)


def test_rows_of_a_data_set_that_are_not_of_the_format_are_named(tmp_path):
    images = [{"bytes": None, "path": "https://host/a.png"}, {"bytes": b"x", "path": "b.png"}]
    text = [{"role": "user", "content": [{"type": "text", "text": "0 Hello."}]}]
    columns = {"images": [[image] for image in images], "messages": [text, [{**text[0], "role": None}]]}
    features = datasets.Features(images=datasets.List(datasets.Image()), messages=row_features()["messages"])
    rows = datasets.Dataset.from_dict(columns, features=features)  # whose own `to_parquet` would fetch the image
    pyarrow.parquet.write_table(rows.data.table, tmp_path / "bad.parquet")
    pieces = open_pieces(str(tmp_path / "bad.parquet"), "rows")
    origins = [row[ORIGIN_COLUMN] for row in pieces.read(0)]
    assert [(origin["file"], origin["row"]) for origin in origins] == [
        (str(tmp_path / "bad.parquet"), i) for i in (0, 1)
    ]
    assert "is a URL" in origins[0]["problem"]
    assert "message 0 is not" in origins[1]["problem"]
    allowed = open_pieces(str(tmp_path / "bad.parquet"), "rows", allow_urls=True)
    assert next(allowed.read(0))[ORIGIN_COLUMN]["problem"] is None


@pytest.mark.parametrize("name", ["parquet", "cauldron", "llava file"])
def test_a_check_streams_and_finds_the_same(name, places):
    given = part(places, name)
    found, expected = (check_part(replace(given, streaming=on), progress=False) for on in (True, False))
    assert found == expected
    assert found.rows == 23
    assert found.phrases_with_mask == (23 if name == "parquet" else 0)


def test_what_cannot_be_streamed_is_named(places, tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    several = datasets.DatasetDict(train=grounded(2), test=grounded(2))
    several.save_to_disk(tmp_path / "several")
    write_generated(tmp_path / "open", 30, ends=False)
    unknown = SourcePieces(GeneratedSource(tmp_path / "open"), skip=False)
    assert unknown.rows is None
    for expected, parts in {
        "weight_by looks at all rows": [part(places, "saved", weight_by={"kind": {"a": 1}})],
        "is read as a whole; leave `streaming` out": [DataPart(str(tmp_path / "rows.json"), streaming=True)],
        "several splits; name one of them: train, test": [DataPart(str(tmp_path / "several"), streaming=True)],
        "no split 'dev'; it has: train, test": [DataPart(str(tmp_path / "several"), split="dev", streaming=True)],
        "has no column 'texts'": [DataPart(str(places / "saved"), format="cauldron", streaming=True)],
        "has no weight": [part(places, "saved", weight=1), part(places, "parquet")],
        "rows must be at least 1": [part(places, "saved", rows=0)],
    }.items():
        with pytest.raises(ValueError, match=expected):
            read_mixture(parts)
    with pytest.raises(ValueError, match=r"open: the number of rows is not known.* Give each part a `weight`"):
        RowStream([unknown, FirstRows(unknown, 3, 0)])
    RowStream([unknown, unknown], [1, 2])
    RowStream([FirstRows(unknown, 5, 0), FirstRows(unknown, 3, 0)])
    stream = read_mixture([part(places, "saved", rows=3)])
    stream.begin(processes=4, process=3)
    with pytest.raises(ValueError, match="fewer good rows than there are processes and workers"):
        next(row for row in stream if row is not None)


def test_the_buffer_gives_each_row_once_and_moves_it_little(monkeypatch):
    monkeypatch.setattr(streaming, "SHUFFLE_BUFFER", 50)
    rows = list(streaming.shuffled(range(1000), random.Random(0)))  # type: ignore[arg-type]
    assert sorted(rows) == list(range(1000))
    assert max(number - place for place, number in enumerate(rows)) <= 50  # none comes before it was read
    assert SHUFFLE_BUFFER == 1000


MEMORY = """
import itertools, resource, sys
from pathlib import Path
from generated_source import GeneratedSource
from agevlm.data.streaming import RowStream, SourcePieces, open_pieces
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
stream = RowStream([SourcePieces(GeneratedSource(sys.argv[1]), True), open_pieces(sys.argv[2], "rows")])
rows = iter(stream)
for number in (20_000, 80_000):
    size = sum(len(image["bytes"]) for row in itertools.islice(rows, number) for image in row["images"])
    print(round(resident()), size)
"""


@pytest.mark.minutes
def test_memory_stays_flat_over_a_hundred_thousand_rows(tmp_path, places):
    write_generated(tmp_path / "large", 100_000, size=4_000)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "large"), str(places / "rows.parquet")]
    folders = {"PYTHONPATH": str(Path(generated_source.__file__).parent), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env={**os.environ, **folders}, capture_output=True, text=True, check=True)
    (early, some), (late, most) = (map(int, line.split()) for line in done.stdout.split("\n") if line)
    assert some + most > 380e6, "as many bytes of images passed"
    assert late - early < 20, f"{early} MB after 20,000 rows and {late} MB after 100,000"
