# SPDX-License-Identifier: Apache-2.0
"""Memory does not grow with the data: ten times the rows of each format, read to the end. GRIT has its own test, and so has the engine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from published_coco import CATEGORIES, rectangles, save_coco, write_coco
from published_flickr30k import write_flickr30k
from published_grand import write_grand, write_grand_f
from published_refcoco import NAME, SCHEMA, read_entries, write_refcoco
from published_visual_genome import write_visual_genome

pytestmark = pytest.mark.minutes

# Peak of the process, in KB, before the first row and after the last.
SCRIPT = """
import sys
from pathlib import Path
from agevlm.data.formats import open_source

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

format, path, images, split, work = sys.argv[1:]
source, work = open_source(format, path, images, split or None), Path(work)
before = peak()
rows = sum(isinstance(found, dict) for piece in source.pieces(work) for found in source.read(piece, work))
print(rows, before, peak())
"""


def flickr30k(folder, rows):
    path, images = write_flickr30k(folder, train=1, val=0, test=0)
    (name,) = (path / "train.txt").read_text().split()
    names = [f"{int(name) + i}" for i in range(rows // 5)]
    for other in names[1:]:
        for place, end in ((path / "Sentences", "txt"), (path / "Annotations", "xml"), (images, "jpg")):
            os.link(place / f"{name}.{end}", place / f"{other}.{end}")
    (path / "train.txt").write_text("\n".join(names))
    return path, images, "train"


def refcoco(folder, rows):
    path, images = write_refcoco(folder, train=1, other=0, objects=1)
    file = path / "data" / NAME.format("train")
    (entry,) = read_entries(file)
    annotation, info = json.loads(entry["raw_anns"]), json.loads(entry["raw_image_info"])
    with pq.ParquetWriter(file, SCHEMA) as writer:
        for start in range(0, rows, 1000):
            some = [
                {
                    **entry,
                    "image_id": i,
                    "ref_id": i,
                    "raw_anns": json.dumps({**annotation, "image_id": i, "id": i}),
                    "raw_image_info": json.dumps({**info, "id": i}),
                }
                for i in range(start, start + 1000)
            ]
            writer.write_table(pa.Table.from_pylist(some, SCHEMA))
    return path, images, "train"


def repeat(file, times):
    """Writes a list of one entry again, with the entry many times."""
    (entry,) = json.loads(file.read_text())
    text = json.dumps(entry)
    with open(file, "w") as opened:
        opened.write("[" + text)
        for _ in range(times - 1):
            opened.write(", " + text)
        opened.write("]")


def visual_genome(folder, rows):
    path, images = write_visual_genome(folder, images=1, regions=10)
    repeat(path / "region_descriptions.json", rows)
    return path, images, ""


def grand(folder, rows):
    path, images = write_grand(folder, photographs=1)
    (file,) = path.rglob("*.json")
    for i in range(2, rows + 1):
        other = file.with_name(f"sa_{i}.json")
        if i % 50_000:
            os.link(file, other)
        else:  # a file has not more names than that
            file = Path(shutil.copy(file, other))
    return path, images, ""


def grand_f(folder, rows):
    path, images = write_grand_f(folder, photographs=1)
    repeat(path, rows)
    return path, images, ""


def coco(folder, rows, each=5):
    """Images with an instance of each of three categories, or now and then of three others, and with five captions. All have the same file."""
    write_coco(folder, count=1, name="train2014")
    (file,) = (folder / "train2014").iterdir()
    names = {name: number for number, name in CATEGORIES.items()}
    width, height = Image.open(file).size
    images, instances, captions = [], [], []
    for i in range(rows // each):
        images.append({"id": i, "file_name": file.name, "width": width, "height": height})
        for name in ("cat", "car", "chair") if i % 100 == 0 else ("dog", "bus", "couch"):
            box = {"segmentation": rectangles((3, 3, 12, 12)), "bbox": [3, 3, 9, 9], "area": 81}
            instances.append({"image_id": i, "category_id": names[name], **box})
        captions += [{"image_id": i, "caption": "A dog on a couch beside a bus."} for _ in range(5)]
    return save_coco(folder, "train2014", images, instances, captions), folder / "train2014", ""


def coco_questions(folder, rows):
    return coco(folder, rows, each=18)


FORMATS = (flickr30k, refcoco, visual_genome, grand, grand_f, coco, coco_questions)


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_memory_does_not_grow_with_the_rows(write, tmp_path):
    grown = {}
    for rows in (10_000, 100_000):
        folder = tmp_path / f"{rows}"
        folder.mkdir()
        place = [str(part) for part in write(folder, rows)]
        command = [sys.executable, "-c", SCRIPT, write.__name__, *place, str(folder / "work")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        read, before, after = map(int, done.stdout.split())
        assert read > 0.9 * rows
        grown[rows] = after - before
        print(write.__name__, f"{read} rows: {before / 1000:.0f} MB before, {after / 1000:.0f} MB at most")
    assert grown[100_000] - grown[10_000] < 40_000
