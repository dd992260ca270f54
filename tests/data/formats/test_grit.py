# SPDX-License-Identifier: Apache-2.0
"""GRIT's parquet files and img2dataset's output: rows, what is left out of them, pieces, and memory."""

import io
import itertools
import math
import random
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image, ImageOps
from published_grit import color_of, grit_row, jpeg, picture, write_grit, write_tar

from agevlm.data.check import check_row
from agevlm.data.formats import open_source
from agevlm.data.formats.grit import Grit
from agevlm.data.formats.img2dataset import read_table
from agevlm.data.formats.source import BadEntry
from agevlm.data.prepared import convert_source, prepare_source

LAYOUTS = ["webdataset", "files"]


def read(path, images=None, work=None):
    """All that the pieces of a source have: rows, and bad entries."""
    source = open_source("grit", path, images)
    work = work or path.parent / "work"
    work.mkdir(exist_ok=True)
    found = [entry for piece in source.pieces(work) for entry in source.read(piece, work)]
    return [row for row in found if isinstance(row, dict)], [bad for bad in found if isinstance(bad, BadEntry)]


def read_one(folder, data=None, **changes):
    """What becomes of one row of GRIT with some changes and other bytes of its image, beside a good row."""
    rows = [grit_row(0), grit_row(1, **changes)]
    images = [jpeg(picture(0)), jpeg(picture(1)) if data is None else data]
    rows, bad = read(write_grit(folder, rows, images)[1])
    assert caption(rows[-1]) == grit_row(0)["caption"]  # the shard has the last row first
    return rows[:-1], bad


def upright(row):
    (image,) = row["images"]
    opened = Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]))
    return ImageOps.exif_transpose(opened.convert("RGB") if opened.mode != "RGB" else opened)


def rectangle(image, color):
    """The sides of the rectangle of a color."""
    there = np.abs(np.asarray(image).astype(int) - color).max(-1) < 60
    y, x = (np.flatnonzero(there.any(axis)) for axis in (1, 0))
    return [x[0], y[0], x[-1] + 1, y[-1] + 1]


def caption(row):
    return row["messages"][1]["content"][0]["text"]


def check_grounding(row):
    """Each phrase's box is the rectangle of its color in the upright image."""
    assert not [problem for problem in check_row(row) if problem.severity == "error"]
    phrases = [caption(row)[entry["start"] : entry["end"]] for entry in row["grounding"]]
    for phrase, entry in zip(phrases, row["grounding"], strict=True):
        assert np.abs(np.subtract(entry["box"], rectangle(upright(row), color_of(phrase)))).max() <= 1
    return phrases


# --- rows ---


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_files_to_rows(tmp_path, layout, saved, as_text):
    grit, output = write_grit(tmp_path, layout=layout, saved=saved, as_text=as_text)
    rows, bad = read(output) if saved else read(grit, output)
    assert [(entry.kind, entry.phrase) for entry in bad] == [("not downloaded", False)]
    rows.sort(key=lambda row: row["id"])
    expected = [
        ["a red box on a table", "the green door"],
        ["blue sea"],
        ["yellow flowers"],
        ["green field", "blue sky"],
        ["a blue car"],
        ["yellow bus by a red wall", "a red wall"],
    ]
    assert [check_grounding(row) for row in rows] == expected
    assert [row["id"] for row in rows] == [str(1795296605919 + i) for i in (0, 1, 2, 4, 5, 6)]
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "text"]
        (image,) = row["images"]
        assert (image["bytes"] is None) == (layout == "files")
        assert upright(row).size == (60, 40)
        # `file` and `row` lead to the entry.
        table = pa.parquet.read_table((output if saved else grit) / row["file"], columns=["id"])
        if saved:
            assert table["id"][row["row"]].as_py() == int(row["id"])


def test_output_of_whole_grit_serves_its_parquet_too(tmp_path):
    """Images of GRIT's rows are found by their addresses, whatever else img2dataset saved. The key is another one."""
    grit, output = write_grit(tmp_path)
    with_key = sorted((row["id"], caption(row)) for row in read(output)[0])
    by_address, _ = read(grit, output)
    assert [(row["id"], caption(row)) for row in by_address] == with_key
    assert [row["id"] for row in read(grit / "coyo_1_snappy.parquet", output, tmp_path / "one")[0]] == [
        str(1795296605919 + i) for i in (4, 5, 6)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_of_one_address(tmp_path, layout):
    """Rows that share an address share the image. A row whose address was not in the download is not an error."""
    rows = [grit_row(0), grit_row(1), grit_row(0, id=7, caption="a red box", ref_exps=[]), grit_row(2)]
    images = [jpeg(picture(0)), jpeg(picture(1)), None, jpeg(picture(2))]
    grit, output = write_grit(tmp_path, rows, images, layout=layout, saved=False)
    (output / "00001.parquet").unlink()
    shutil.rmtree(output / "00001", ignore_errors=True)
    (output / "00001.tar").unlink(missing_ok=True)
    found, bad = read(grit, output)
    assert [row["id"] for row in found] == ["1795296605919", "1795296605920", "7"]
    assert upright(found[0]).tobytes() == upright(found[2]).tobytes() != upright(found[1]).tobytes()
    assert [(entry.file, entry.row, entry.kind) for entry in bad] == [("coyo_1_snappy.parquet", 0, "not downloaded")]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_of_turned_images(tmp_path, orientation):
    """The annotators' tools read images as they are stored; training sees them upright."""
    rows, bad = read_one(tmp_path, jpeg(picture(6), orientation), caption=grit_row(6)["caption"], ref_exps=grit_row(6)["ref_exps"])  # fmt: skip
    assert not bad
    assert check_grounding(rows[0]) == ["yellow bus by a red wall", "a red wall"]
    assert upright(rows[0]).size == ((80, 120) if orientation > 4 else (120, 80))


# --- bad entries ---

WORD = [0.0, 4.0, 0.0, 0.5, 1.0, 1.0, 0.9]  # "blue", of the second picture


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"caption": ""}, "empty caption"),
        ({"caption": " \n"}, "empty caption"),
        ({"caption": None}, "empty caption"),
        ({"ref_exps": None}, "no ref_exps"),
        ({"data": b""}, "broken image"),
        ({"data": b"<html>gone</html>"}, "broken image"),
        ({"data": jpeg(picture(1))[:100]}, "broken image"),
    ],
)
def test_entries_that_are_left_out(tmp_path, changes, kind):
    rows, bad = read_one(tmp_path, **changes)
    assert not rows
    assert [(entry.file, entry.row, entry.kind, entry.phrase) for entry in bad] == [("00000.parquet", 0, kind, False)]


@pytest.mark.parametrize(
    ("text", "kind"),
    [("[[0, 4, ", "ref_exps is not JSON"), ("", "ref_exps is not JSON"), ("[" * 100_000, "ref_exps is not JSON"), ('{"0": 4}', "no ref_exps"), ("null", "no ref_exps")],
)  # fmt: skip
def test_texts_that_are_no_lists(tmp_path, text, kind):
    rows = [grit_row(0, ref_exps="[]"), grit_row(1, ref_exps=text)]
    found, bad = read(write_grit(tmp_path, rows, [jpeg(picture(0)), jpeg(picture(1))])[1])
    assert [row["grounding"] for row in found] == [[]]
    assert [(entry.kind, entry.phrase) for entry in bad] == [(kind, False)]


@pytest.mark.parametrize(
    ("phrase", "kind"),
    [
        ([0.0, 9.0, *WORD[2:]], "wrong span"),  # the caption has 8 characters
        ([4.0, 4.0, *WORD[2:]], "wrong span"),
        ([5.0, 4.0, *WORD[2:]], "wrong span"),
        ([-1.0, 4.0, *WORD[2:]], "wrong span"),
        ([0.5, 4.0, *WORD[2:]], "wrong span"),
        ([4.0, 5.0, *WORD[2:]], "wrong span"),  # a blank
        ([0.0, 4.0, 0.0, 0.0, 120.0, 80.0, 0.9], "box outside the image"),  # in pixels
        ([0.0, 4.0, -0.1, 0.0, 1.0, 1.0, 0.9], "box outside the image"),
        ([0.0, 4.0, 0.6, 0.0, 0.4, 1.0, 0.9], "empty box"),
        ([0.0, 4.0, 0.0, 0.6, 1.0, 0.4, 0.9], "empty box"),
        ([0.0, 4.0, 0.5, 0.0, 0.5, 1.0, 0.9], "empty box"),
        ([0.0, 4.0, 1.0, 0.0, 1.0005, 1.0, 0.9], "empty box"),
        ([0.0, 4.0, math.nan, 0.0, 1.0, 1.0, 0.9], "not a phrase"),
        ([math.nan, 4.0, *WORD[2:]], "not a phrase"),
        ([0.0, math.inf, *WORD[2:]], "not a phrase"),
        ([0.0, 4.0, 0.0, 0.5, 1.0], "not a phrase"),
        ([], "not a phrase"),
        (None, "not a phrase"),
        (WORD, "repeated phrase"),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_phrases_that_are_left_out(tmp_path, phrase, kind, as_text):
    rows = [grit_row(1, ref_exps=[WORD, phrase, [5.0, 8.0, *WORD[2:]]])]
    (row,), bad = read(write_grit(tmp_path, rows, [jpeg(picture(1))], as_text=as_text)[1])
    assert [caption(row)[entry["start"] : entry["end"]] for entry in row["grounding"]] == ["blue", "sea"]
    assert [(entry.kind, entry.phrase) for entry in bad] == [(kind, True)]
    assert bad[0].reason.startswith("ref_exps[1] ")


def test_rounding_is_no_mistake(tmp_path):
    """Boxes a little beyond the image are cut off, and a phrase without a confidence is one."""
    rows, bad = read_one(tmp_path, ref_exps=[[0.0, 4.0, -0.0004, 0.5, 1.0004, 1.0]])
    assert not bad
    assert rows[0]["grounding"][0]["box"] == [0, 40, 120, 80]


@pytest.mark.parametrize("saved", [True, False])
def test_images_that_were_cut_or_exchanged(tmp_path, saved):
    """A padded square of img2dataset's own default mode, and a resized one that is as it was."""
    padded = ImageOps.pad(picture(1), (64, 64))
    rows = [grit_row(i) for i in range(3)]
    images = [jpeg(picture(0).resize((31, 21))), jpeg(padded), jpeg(picture(2))]
    grit, output = write_grit(tmp_path, rows, images, saved=saved)
    if saved:  # as img2dataset says it
        table = pa.parquet.read_table(output / "00000.parquet").to_pylist()
        table = [row | {"original_width": 120, "original_height": 80} for row in table]
        pa.parquet.write_table(pa.Table.from_pylist(table), output / "00000.parquet")
    found, bad = read(output) if saved else read(grit, output)
    assert {row["id"] for row in found} == {str(rows[i]["id"]) for i in (0, 2)}
    assert [entry.kind for entry in bad] == ["image of another shape"]


def test_one_bad_entry_is_an_error_unless_it_is_skipped(tmp_path, own_cache):
    """Images that were gone are no error in any case."""
    good = write_grit(tmp_path / "good")[1]
    assert len(prepare_source(open_source("grit", good), on_bad_row="error", progress=False).dataset) == 6
    rows = [grit_row(0), grit_row(1, caption=""), grit_row(2, ref_exps=[WORD, [0.0, 99.0, *WORD[2:]]]), grit_row(3)]
    bad = write_grit(tmp_path / "bad", rows)[1]
    with pytest.raises(ValueError, match=r"downloaded, 00000\.parquet, entry 0: ref_exps\[1\] .*on_bad_row: skip"):
        prepare_source(open_source("grit", bad), on_bad_row="error", progress=False)
    prepared = prepare_source(open_source("grit", bad), on_bad_row="skip", progress=False)
    assert prepared.bad == Counter(
        {("empty caption", False): 1, ("wrong span", True): 1, ("not downloaded", False): 1}
    )
    assert len(prepared.dataset) == 2


# --- shards ---


def test_members_in_any_order(tmp_path):
    """Also below a folder, as `tar cf` writes them, and with files of others between them."""
    output = write_grit(tmp_path)[1]
    expected = read(output)[0]
    for archive in output.glob("*.tar"):
        with tarfile.open(archive) as opened:
            members = [(f"./{archive.stem}/{m.name}", opened.extractfile(m).read()) for m in opened]
        random.Random(0).shuffle(members)
        write_tar(archive, [("README", b"x" * 700), *members])
    assert read(output) == (expected, read(output)[1])
    assert [entry.kind for entry in read(output)[1]] == ["not downloaded"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
def test_shards_without_their_tables(tmp_path, layout, how):
    """The JSON beside an image has what the table has. What was not downloaded is not known then."""
    output = write_grit(tmp_path, layout=layout)[1]
    expected = {row["id"]: row for row in read(output)[0]}
    table = output / "00000.parquet"
    content = {"missing": None, "empty": b"", "cut": table.read_bytes()[:-300]}[how]
    table.unlink()
    if content is not None:
        table.write_bytes(content)
    rows, bad = read(output)
    assert {row["id"]: row | {"file": "", "row": 0} for row in rows} == {
        name: row | {"file": "", "row": 0} for name, row in expected.items()
    }
    assert [entry.kind for entry in bad] == ([] if how == "missing" else ["broken table"]) + ["not downloaded"]


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b'"text"', b"\xff"])
def test_broken_annotations(tmp_path, text):
    output = write_grit(tmp_path, layout="files")[1]
    (output / "00000.parquet").unlink()
    (output / "00000" / "000000001.json").write_bytes(text)
    (output / "00000" / "000000002.json").unlink()
    rows, bad = read(output)
    assert len(rows) == 4
    assert [(entry.row, entry.kind) for entry in bad[:2]] == [(1, "not JSON"), (2, "no annotation")]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.34, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("with_table", [True, False])
def test_archives_that_break_off(tmp_path, share, with_table):
    """Every image that is whole is read, and every one that the table names and the archive lacks is counted."""
    output = write_grit(tmp_path, shard=7)[1]
    archive = output / "00000.tar"
    content = archive.read_bytes()
    with tarfile.open(archive) as opened:
        members = opened.getmembers()
    cut = int(members[-1].offset_data * share)
    whole = {m.name.split(".")[0] for m in members if m.name.endswith(".jpg") and m.offset_data + m.size <= cut}
    annotated = {m.name.split(".")[0] for m in members if m.name.endswith(".json") and m.offset_data + m.size <= cut}
    archive.write_bytes(content[:cut])
    if not with_table:
        (output / "00000.parquet").unlink()
    rows, bad = read(output)
    assert {row["images"][0]["path"] for row in rows} == {f"{key}.jpg" for key in (whole if with_table else whole & annotated)}  # fmt: skip
    counts = Counter(entry.kind for entry in bad)
    assert counts["broken archive"] == 1
    assert counts["missing image"] == (6 - len(whole) if with_table else 0)


def test_archives_with_a_broken_header(tmp_path):
    output = write_grit(tmp_path, shard=7)[1]
    archive = output / "00000.tar"
    with tarfile.open(archive) as opened:
        header = opened.getmembers()[6].offset
    content = bytearray(archive.read_bytes())
    content[header : header + 512] = b"\xff" * 512
    archive.write_bytes(content)
    rows, bad = read(output)
    assert len(rows) == 2
    assert Counter(entry.kind for entry in bad)["broken archive"] == 1


def test_members_under_one_name(tmp_path):
    """The first is read."""
    output = write_grit(tmp_path)[1]
    expected, _ = read(output)
    archive = output / "00000.tar"
    with tarfile.open(archive) as opened:
        members = [(m.name, opened.extractfile(m).read()) for m in opened]
    write_tar(archive, [*members, (members[0][0], jpeg(picture(5)))])
    rows, bad = read(output)
    assert rows == expected
    assert [entry.kind for entry in bad] == ["repeated members", "not downloaded"]


def test_files_that_lead_out_of_their_folder(tmp_path):
    """Neither a link nor a key gets at a file elsewhere."""
    output = write_grit(tmp_path, layout="files")[1]
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(picture(0)))
    (output / "00000" / "000000001.jpg").unlink()
    (output / "00000" / "000000001.jpg").symlink_to(secret)
    table = pa.parquet.read_table(output / "00001.parquet").to_pylist()
    table[0]["key"] = "../../secret"
    pa.parquet.write_table(pa.Table.from_pylist(table), output / "00001.parquet")
    rows, bad = read(output)
    assert Counter(entry.kind for entry in bad) == Counter(
        ["image outside its folder", "missing image", "not downloaded"]
    )
    assert all(secret.read_bytes() != Path(row["images"][0]["path"]).read_bytes() for row in rows)


# --- pieces ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saved", [True, False])
def test_pieces_in_any_order(tmp_path, monkeypatch, layout, saved):
    monkeypatch.setattr("agevlm.data.formats.grit._ROWS", 2)
    grit, output = write_grit(tmp_path, layout=layout, saved=saved)
    arguments = (output,) if saved else (grit, output)
    work = tmp_path / "work"
    work.mkdir()
    pieces = open_source("grit", *arguments).pieces(work)
    assert len(pieces) == (3 if saved else 4) == len({piece.name for piece in pieces})
    one_pass = [entry for piece in pieces for entry in open_source("grit", *arguments).read(piece, work)]
    assert len(one_pass) == 7
    for order in itertools.permutations(range(len(pieces))):
        source = open_source("grit", *arguments)
        apart = {i: list(source.read(pieces[i], work)) for i in order}
        assert [entry for i in range(len(pieces)) for entry in apart[i]] == one_pass


@pytest.mark.parametrize("group", [1, 3, 7, 100])
def test_rows_of_a_table(tmp_path, group):
    table = pa.table({"a": range(20), "b": [[i, None] for i in range(20)]})
    pa.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=group)
    for start, end in [(0, None), (0, 20), (0, 1), (5, 6), (6, 9), (19, 20), (7, 14), (3, None), (4, 4)]:
        found = list(read_table(tmp_path / "t.parquet", ["b", "c"], start, end))
        assert found == [(i, {"b": [i, None]}) for i in range(20)[start:end]]


def one_process(arguments, folder, monkeypatch):
    monkeypatch.setattr("agevlm.data.formats.grit._ROWS", 2)
    made = convert_source(open_source("grit", *arguments), folder, progress=False)
    assert len(made.dataset) == 6
    assert made.bad == Counter({("not downloaded", False): 1})
    return made


@pytest.mark.slow  # starts two processes
def test_two_processes_make_the_rows_of_one(tmp_path, own_cache, monkeypatch):
    arguments = write_grit(tmp_path, saved=False)
    one = one_process(arguments, tmp_path / "one", monkeypatch)
    two = convert_source(open_source("grit", *arguments), tmp_path / "two", num_proc=2, progress=False)
    assert two.dataset.with_format("arrow")[:] == one.dataset.with_format("arrow")[:]
    assert two.bad == one.bad


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_that_was_killed_goes_on(tmp_path, own_cache, monkeypatch, saved):
    grit, output = write_grit(tmp_path, saved=saved)
    arguments = (output,) if saved else (grit, output)
    one = one_process(arguments, tmp_path / "one", monkeypatch)
    began, read_piece = [], Grit.read

    def interrupted(self, piece, work):
        began.append(piece.name)
        if len(began) == 3:
            raise KeyboardInterrupt
        return read_piece(self, piece, work)

    monkeypatch.setattr(Grit, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_source(open_source("grit", *arguments), tmp_path / "two", progress=False)
    assert not (tmp_path / "two").exists()
    two = convert_source(open_source("grit", *arguments), tmp_path / "two", progress=False)
    assert began[2] == began[3]
    assert len(began) == len(set(began)) + 1
    assert two.dataset.with_format("arrow")[:] == one.dataset.with_format("arrow")[:]
    assert two.bad == one.bad


# --- mistakes ---


def test_folders_that_are_not_img2datasets(tmp_path):
    grit, output = write_grit(tmp_path)
    for arguments in ((grit,), (grit, grit), (grit, tmp_path / "none"), (tmp_path / "none",)):
        with pytest.raises(FileNotFoundError, match=r"img2dataset --url_list .*--resize_mode keep_ratio"):
            open_source("grit", *arguments)
    with pytest.raises(FileNotFoundError, match="hf download zzliang/GRIT"):
        open_source("grit", tmp_path, output)
    with pytest.raises(ValueError, match="no split"):
        open_source("grit", output, split="train")
    with pytest.raises(ValueError, match="lacks the columns ref_exps, which GRIT has"):
        open_source("grit", write_grit(tmp_path / "plain", saved=False)[1], output)
    (grit / "coyo_0_snappy.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is not a whole parquet file"):
        open_source("grit", grit, output)
    (output / "00001").mkdir()
    with pytest.raises(ValueError, match=r"has 00001\.tar and the folder 00001"):
        open_source("grit", output)


def test_output_without_the_phrases(tmp_path):
    with pytest.raises(ValueError, match=r"without the columns ref_exps; .*`images`"):
        open_source("grit", write_grit(tmp_path, saved=False)[1])


def test_files_of_a_source(tmp_path):
    grit, output = write_grit(tmp_path)
    own = {"00000.tar", "00001.tar", "00002.tar", "00000.parquet", "00001.parquet", "00002.parquet"}
    assert {file.name for file in open_source("grit", output).files()} == own
    both = {file.name for file in open_source("grit", grit, output).files()}
    assert both == own | {"coyo_0_snappy.parquet", "coyo_1_snappy.parquet"}


# --- memory ---

READ_ALL = """
import pathlib, sys, psutil
from agevlm.data.formats import open_source
process, rows, phrases, most = psutil.Process(), 0, 0, 0
work = pathlib.Path(sys.argv[1])
source = open_source("grit", *sys.argv[2:])
for piece in source.pieces(work):
    for entry in source.read(piece, work):
        rows += 1
        phrases += len(entry["grounding"])
        if rows % 250 == 0:
            most = max(most, process.memory_info().rss / 2**20)
        if rows in (10_000, 100_000):
            print(rows, phrases, most)
"""


@pytest.mark.minutes
@pytest.mark.parametrize("saved", [True, False])
def test_memory_does_not_grow_with_the_rows(tmp_path, saved):
    """The most after 10,000 and after 100,000 rows in shards of 1,000. GRIT's parquet has one group of rows, as the published files."""
    data = jpeg(Image.new("RGB", (12, 8)))
    rows = [grit_row(i) for i in range(100_000)]
    grit, output = write_grit(tmp_path, rows, [data] * len(rows), saved=saved, shard=1000)
    (tmp_path / "work").mkdir()
    arguments = [tmp_path / "work", *((output,) if saved else (grit, output))]
    ran = subprocess.run([sys.executable, "-c", READ_ALL, *map(str, arguments)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    print(ran.stdout)
    few, many = (line.split() for line in ran.stdout.splitlines())
    assert int(many[0]) == len(rows)
    assert int(many[1]) == sum(len(row["ref_exps"]) for row in rows)
    assert float(many[2]) < float(few[2]) + 50  # the entries alone are more than 100 MB
