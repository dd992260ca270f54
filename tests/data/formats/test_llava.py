# SPDX-License-Identifier: Apache-2.0
"""Files of LLaVA: conversations, bad entries of each kind, and the command that converts."""

import json

import datasets
import pytest
from command_line import check_refused, run
from row_cases import LLAVA, encoded, image_part, read_source, text_part, turns, write

from agevlm.data.check import check_dataset, check_part
from agevlm.data.formats import open_source
from agevlm.data.formats.source import BadEntry
from agevlm.data.mixture import DataPart
from agevlm.data.prepared import convert_source, prepare_source
from agevlm.data.readers import read_dataset, read_rows
from agevlm.processing.rows import row_features

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_conversations_become_rows(tmp_path, images, suffix):
    path = write(tmp_path / f"llava.{suffix}", LLAVA)
    read = read_source("llava", path, images)
    further = {"id": datasets.Value("string"), "file": datasets.Value("string"), "row": datasets.Value("int64")}
    assert read.features == datasets.Features({**row_features(), **further})
    assert read["id"][:] == ["x1", "2", None, None]
    assert (read["file"][:], read["row"][:]) == ([str(path)] * 4, [0, 1, 2, 3])
    assert [[image.size for image in row] for row in read["images"]] == [
        [(40, 30)],
        [(40, 30), (20, 10)],
        [],
        [(20, 10)],
    ]
    assert read[0]["messages"] == [
        {"role": "user", "content": [image_part(), text_part("What is this?")]},
        {"role": "assistant", "content": [text_part("Noise.\u2028Really.")]},
    ]
    expected = [text_part("Is "), image_part(), text_part(" like"), image_part(), text_part("this?")]
    assert read[1]["messages"][0]["content"] == expected
    assert read[2]["messages"][:2] == [
        {"role": "system", "content": [text_part("Be brief.")]},
        {"role": "user", "content": [text_part("What is\n\n2 + 2?")]},
    ]
    assert read[3]["messages"][0]["content"] == [text_part("What is this?"), image_part()]
    stored = read.with_format("arrow")[0]["images"][0].as_py()
    assert stored == [{"bytes": None, "path": str(images / "a.png")}]
    assert check_dataset(read, progress=False).problems == []


def changed(**changes):
    return {key: value for key, value in (LLAVA[0] | changes).items() if value is not None}


BAD = [
    (changed(image="c.png"), "missing image", r"there is no image .*c\.png; add it"),
    (changed(image=3), "missing image", "the image is 3"),
    (changed(image="broken.jpg"), "broken image", r"broken\.jpg is not a readable image"),
    (changed(image=None), "wrong number of images", "conversations has 1 <image>, but `image` has 0"),
    (changed(image=["a.png"] * 2), "wrong number of images", "conversations has 1 <image>, but `image` has 2"),
    (changed(image="../secret.png"), "image outside its folder", "leads out of the folder"),
    (changed(conversations=None), "no conversation", "conversations is missing"),
    (changed(conversations=[]), "no conversation", "conversations is missing"),
    ("Hi.", "no conversation", "conversations is missing"),
    (changed(conversations=["Hi."]), "not a message", r"conversations\[0\] must be"),
    (changed(conversations=[{"from": "bot", "value": "Hi."}]), "not a message", "must be .* human, gpt, system"),
    (changed(conversations=[{"from": [], "value": "Hi."}]), "not a message", r"conversations\[0\] must be"),
    (changed(conversations=[{"from": "gpt", "value": None}]), "not a message", r"conversations\[0\] must be"),
    (changed(conversations=turns("<image>?", "A \ud800.")), "half of a character", "half of a surrogate pair"),
]


@pytest.mark.parametrize(("entry", "kind", "reason"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_a_bad_entry_is_an_error_that_names_it(tmp_path, images, entry, kind, reason):
    (tmp_path / "secret.png").write_bytes(encoded())
    path = write(tmp_path / "llava.json", [LLAVA[0], entry])
    with pytest.raises(ValueError, match=rf"llava\.json, entry 1: .*{reason}.*on_bad_row: skip"):
        read_source("llava", path, images)
    part = DataPart(str(path), format="llava", images=str(images))
    report = check_part(part, progress=False)
    assert (report.rows, report.bad_rows, [problem.row for problem in report.problems]) == (2, 1, [1])


def test_bad_entries_are_left_out_and_counted(tmp_path, images, caplog):
    (tmp_path / "secret.png").write_bytes(encoded())
    entries = [entry for bad, _, _ in BAD for entry in (LLAVA[0], bad)]
    path = write(tmp_path / "llava.json", entries)
    prepared = prepare_source(open_source("llava", path, images), progress=False)
    assert prepared.dataset["row"][:] == list(range(0, len(entries), 2))
    kinds = [kind for _, kind, _ in BAD]
    assert prepared.bad == {(kind, False): kinds.count(kind) for kind in kinds}
    assert prepared.first_bad.row == 1
    report = check_part(DataPart(str(path), format="llava", images=str(images)), progress=False)
    assert [problem.row for problem in report.problems] == list(range(1, len(entries), 2))
    rows = read_dataset(path, "llava", images=images, keep_bad=True)
    assert rows.column_names == ["images", "messages", "grounding", "row_origin"]
    origins = [
        {"file": str(path), "row": number, "problem": None, "skip": True} for number in range(0, len(entries), 2)
    ]
    assert rows["row_origin"][:] == origins
    assert f"left out {len(BAD)} entries (broken image 1, half of a character 1, " in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[{]", "a.json, line 1, is not JSON"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"a.jsonl, line [34], is not JSON"),
        ("a.json", b'["\xff"]', "a.json is not UTF-8"),
        ("a.json", b"", "has no rows of the format llava"),
        ("a.json", b'{"a": 1}', "has no rows .*: all of its 1 entries are bad; the first: conversations is missing"),
    ],
)
def test_files_that_are_none(tmp_path, images, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_source("llava", tmp_path / name, images, "skip")
    assert [file.suffix for file in (tmp_path / "cache" / "agevlm").iterdir()] == [".lock"]


def test_a_byte_order_mark_and_line_ends_of_windows(tmp_path, images):
    path = write(tmp_path / "llava.jsonl", LLAVA)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(read_source("llava", path, images)) == 4


def test_missing_file_and_folder_and_arguments(tmp_path, images):
    path = write(tmp_path / "llava.json", LLAVA)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        open_source("llava", tmp_path / "nowhere.json", images)
    with pytest.raises(FileNotFoundError, match=r"no such folder of images: .*nowhere"):
        open_source("llava", path, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no split 'train'"):
        open_source("llava", path, images, "train")
    with pytest.raises(ValueError, match=r"no format 'voc'; choose one of: .*llava"):
        open_source("voc", path, images)
    with pytest.raises(ValueError, match="leave `name` out"):
        read_dataset(path, "llava", images=images, name="default")
    with pytest.raises(ValueError, match="has no column kind, but the columns id"):
        read_dataset(path, "llava", images=images, columns=["kind"])
    assert read_dataset(path, "llava", images=images, columns=["id"])["id"][:] == ["x1", "2", None, None]


def test_images_beside_the_file(tmp_path, images):
    assert len(read_source("llava", write(images / "llava.json", LLAVA), None)) == 4


def test_a_changed_file_and_added_images_are_read_again(tmp_path, images):
    path = write(tmp_path / "llava.json", LLAVA)
    assert len(read_source("llava", path, images)) == 4
    write(path, [*LLAVA[:1], changed(image="sub/c.png")])
    assert len(read_source("llava", path, images, "skip")) == 1
    (images / "sub" / "c.png").write_bytes(encoded())
    assert len(read_source("llava", path, images, "skip")) == 2


def test_converted_data_contain_the_images(tmp_path, images, capfd):
    source = open_source("llava", write(tmp_path / "llava.json", LLAVA), images)
    convert_source(source, tmp_path / "out", progress=False)
    assert capfd.readouterr() == ("", "")
    for file in images.rglob("*.*"):
        file.unlink()
    read = read_rows(tmp_path / "out")
    assert [[image.size for image in row] for row in read["images"]][1::2] == [[(40, 30), (20, 10)], [(20, 10)]]
    assert read.with_format("arrow")[3]["images"][0].as_py() == [{"bytes": encoded(20, 10), "path": "b.png"}]
    with pytest.raises(FileExistsError):
        convert_source(source, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="there is no image"):
        convert_source(source, tmp_path / "new", progress=False)
    assert {file.name for file in tmp_path.iterdir()} == {"llava.json", "images", "out"}


def test_the_command_converts_and_says_what_it_left_out(monkeypatch, capsys, tmp_path, images):
    path = write(tmp_path / "in.json", [*LLAVA, changed(image="c.png"), changed(conversations=[])])
    command = ["data", "convert", path, "--format", "llava", "--images", images, "--out", tmp_path / "out"]
    check_refused(monkeypatch, capsys, tmp_path, "entry 4: there is no image", *command)
    code, printed = run(monkeypatch, capsys, *command, "--on-bad-row", "skip", "--num-proc", 1)
    assert code == 0, printed
    assert "4 rows, 4 images, 0 grounded phrases. Left out: 2 entries (missing image 1, no conversation 1)" in printed
    assert [BadEntry(**json_line).row for json_line in read_lines(tmp_path / "out" / "bad.jsonl")] == [4, 5]
    code, printed = run(monkeypatch, capsys, "data", "check", tmp_path / "out")
    assert code == 0, printed
    code, printed = run(monkeypatch, capsys, "data", "check", path, "--format", "llava", "--images", images)
    assert code == 1
    assert "missing image" in printed


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "voc", "{tmp}/in.json", "--images", "{tmp}/images", "--out", "{tmp}/out"], "no format 'voc'"),
        (["--format", "llava", "{tmp}/no.json", "--images", "{tmp}/images", "--out", "{tmp}/out"], "no.json"),
        (["--format", "llava", "{tmp}/in.json", "--images", "{tmp}/no", "--out", "{tmp}/out"], "no such folder"),
        (["--format", "llava", "{tmp}/in.json", "--images", "{tmp}/images", "--out", "{tmp}/images"], "already exists"),
        (["--format", "llava", "{tmp}/in.json", "--out", "{tmp}/out", "--num-proc", "0"], "is 0, but must be at least 1"),
        (["--format", "llava", "ftp://x/in.json", "--out", "{tmp}/out"], "is not an address that data are read from"),
    ],
)  # fmt: skip
def test_mistakes_of_the_command(arguments, message, monkeypatch, capsys, tmp_path, images):
    write(tmp_path / "in.json", LLAVA)
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    check_refused(monkeypatch, capsys, tmp_path, message, "data", "convert", *arguments)


@pytest.mark.parametrize("place", ["", "gqa", "coco/train2017"])
@pytest.mark.parametrize("given", [True, False])
def test_rows_are_made_again_where_images_were_added(tmp_path, images, place, given):
    folder = tmp_path / "data" / place
    folder.mkdir(parents=True)
    path = write(tmp_path / "data/llava.json", [LLAVA[2], changed(image=f"{place}/new.png".strip("/"))])
    source = open_source("llava", path, path.parent if given else None)
    assert len(prepare_source(source, progress=False).dataset) == 1
    (folder / "new.png").write_bytes((images / "a.png").read_bytes())
    assert len(prepare_source(source, progress=False).dataset) == 2


def test_a_configuration_is_refused(tmp_path, images):
    part = DataPart(str(write(tmp_path / "llava.json", LLAVA)), format="llava", images=str(images), name="1.0")
    with pytest.raises(ValueError, match="llava has no configurations; leave `name` out"):
        check_part(part, progress=False)
