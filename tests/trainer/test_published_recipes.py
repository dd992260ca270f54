# SPDX-License-Identifier: Apache-2.0
"""The 1B recipes from `agevlm data prepare` to a trained model, on tiny parts, from files in the layouts that their data are published in."""

import io
import json
import zipfile
from pathlib import Path

import datasets
import pytest
import torch
from command_line import run
from grounded_rows import photograph
from PIL import Image
from published_coco import write_coco
from safetensors.torch import load_file
from tiny_training import tiny_processor, tiny_trainable
from web_server import serve

from agevlm.trainer.recipe import load_recipe
from agevlm.trainer.stages import PRESETS, group_parameters

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "examples" / "recipes" / "age_vlm_1b"
STAGES = ["1_align", "2_adapt_vision", "3_guide", "4_instruct"]
# What no machine of the tests has: eight GPUs, time, and cores for workers.
SMALL = [
    "training.per_device_train_batch_size=4",
    "training.gradient_accumulation_steps=1",
    "training.dataloader_num_workers=0",
    "training.logging_steps=1",
    "training.save_strategy=no",
]


def jpeg(seed):
    file = io.BytesIO()
    photograph(seed, (48, 40)).save(file, "JPEG")
    return file.getvalue()


def zipped(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def llava_pretrain():
    """LLaVA-Pretrain: a JSON list, and an archive of images in numbered folders. One image is missing and one is cut off."""
    names = [f"{i % 3:05}/{i:09}.jpg" for i in range(12)]
    entries = [
        {
            "id": name[6:-4],
            "image": name,
            "conversations": [
                {"from": "human", "value": "Describe the image concisely.\n<image>"},
                {"from": "gpt", "value": f"image number {i} of a dog"},
            ],
        }
        for i, name in enumerate(names)
    ]
    images = {name: jpeg(i) for i, name in enumerate(names)}
    images[names[5]] = images[names[5]][:200]
    del images[names[7]]
    return json.dumps(entries).encode(), zipped(images)


def llava_next(folder):
    """LLaVA-NeXT-Data: parquet files with conversations and an image or none."""
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = datasets.Features(
        id=datasets.Value("string"),
        conversations=datasets.List(turn),
        data_source=datasets.Value("string"),
        image=datasets.Image(),
    )
    rows = [
        {
            "id": str(i),
            "conversations": [
                {"from": "human", "value": ("" if i == 3 else "<image>\n") + "What is this?"},
                {"from": "gpt", "value": f"a cat on sofa {i}"},
                {"from": "human", "value": "Is there a dog?"},
                {"from": "gpt", "value": "No."},
            ],
            "data_source": "tiny",
            "image": None if i == 3 else photograph(100 + i, (40, 40)),
        }
        for i in range(8)
    ]
    (folder / "data").mkdir(parents=True)
    for part in range(2):
        name = folder / "data" / f"train-{part:05}-of-00002.parquet"
        datasets.Dataset.from_list(rows[part::2], features=features).to_parquet(name)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    )


def cauldron(folder):
    """The Cauldron: a configuration for each of its sets, with images and texts."""
    turn = {name: datasets.Value("string") for name in ("user", "assistant", "source")}
    features = datasets.Features(images=datasets.List(datasets.Image()), texts=datasets.List(turn))
    rows = [
        {
            "images": [photograph(200 + i, (40, 44))],
            "texts": [
                {"user": f"What is on the sofa? Brief answer {k}.", "assistant": "A dog.", "source": "VQAv2"}
                for k in range(1 + i % 3)
            ],
        }
        for i in range(8)
    ]
    for name in ("vqav2", "vsr"):
        (folder / name).mkdir(parents=True)
        data = datasets.Dataset.from_list(rows, features=features)
        data.to_parquet(folder / name / "train-00000-of-00001-0123456789abcdef.parquet")
    configurations = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("vqav2", "vsr")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n")


def coco(folder):
    """COCO 2014's two archives."""
    write_coco(folder, count=8, name="train2014")
    archives = {}
    for name, part in (
        ("annotations/annotations_trainval2014.zip", "annotations"),
        ("zips/train2014.zip", "train2014"),
    ):
        files = {f"{part}/{file.name}": file.read_bytes() for file in (folder / part).iterdir()}
        archives[f"/{name}"] = zipped(files)
    return archives


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The data sets of the recipes, the assembled model, and a cache of their own. Gives the overrides of a recipe and what was downloaded."""
    folder = tmp_path_factory.mktemp("published")
    tiny_trainable(gate=0.0).bfloat16().save_pretrained(folder / "0_assembled")
    tiny_processor().save_pretrained(folder / "0_assembled")
    llava_next(folder / "lmms-lab" / "LLaVA-NeXT-Data")
    cauldron(folder / "HuggingFaceM4" / "the_cauldron")
    entries, images = llava_pretrain()
    pages = {"/blip_laion_cc_sbu_558k.json": entries, "/images.zip": images, **coco(folder / "coco")}
    with serve(pages) as (port, asked), pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        hosts = {
            "hf://datasets/liuhaotian/LLaVA-Pretrain": f"http://127.0.0.1:{port}",
            "http://images.cocodataset.org": f"http://127.0.0.1:{port}",
            "lmms-lab/": f"{folder}/lmms-lab/",
            "HuggingFaceM4/": f"{folder}/HuggingFaceM4/",
        }

        def overrides(recipe):
            """The same data from this machine."""
            loaded, found = load_recipe(recipe), []
            named = [("", loaded.data), *((f"stages.{stage.name}.", stage.data or []) for stage in loaded.stages)]
            for place, parts in named:
                for i, part in enumerate(parts):
                    for key in ("path", "images"):
                        address = value = getattr(part, key)
                        for host, here in hosts.items():
                            value = value and value.replace(host, here)
                        if value is not None:
                            assert value != address, "all data are published ones"
                            found.append(f"{place}data.{i}.{key}={value}")
            return found

        yield folder, overrides, asked


def check_parts(report):
    """Each part of a stage has the rows that were written, without the missing and the broken image."""
    for part in report["parts"]:
        name = Path(part["path"]).name
        if name == "blip_laion_cc_sbu_558k.json":
            assert (part["rows"], part["images"], part["phrases"]) == (10, 10, 0)
            assert sorted(part["dropped"].values()) == [1, 1]
            assert "missing image (entries)" in part["dropped"]
            continue
        assert part["dropped"] == {}
        if name == "annotations_trainval2014.zip":
            assert part["rows"] == part["images"] == 8 * 5  # five captions an image
            assert part["masks"] == part["phrases"] > 0
        else:
            assert (part["rows"], part["images"]) == {"LLaVA-NeXT-Data": (8, 7), "the_cauldron": (8, 8)}[name]


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_the_four_stages(published, tmp_path, monkeypatch, capsys):
    """All are prepared before the first trains, and nothing is downloaded or converted afterwards. The chosen parameters train, and nothing else."""
    folder, overrides, asked = published
    assembled = folder / "0_assembled"
    outputs = {stage: tmp_path / stage for stage in STAGES}
    commands = {}
    for number, stage in enumerate(STAGES):
        recipe = FOLDER / f"{stage}.yaml"
        before = outputs[STAGES[number - 1]] if number else assembled
        commands[stage] = [recipe, *overrides(recipe), *SMALL, "training.max_steps=2"]
        commands[stage] += [f"model={before}", f"training.output_dir={outputs[stage]}"]
        given = ["--model", assembled] if number else []
        code, printed = run(monkeypatch, capsys, "data", "prepare", *commands[stage], *given)
        assert code == 0, printed
        (report,) = json.loads((outputs[stage] / "prepared.json").read_text())["stages"]
        check_parts(report)
        assert report["name"] == stage[2:]
        assert report["steps"] == 2
        assert report["flops"] > 0
    downloaded = list(asked)
    made = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*") if path.is_file()}

    before = assembled
    for stage in STAGES:
        after = outputs[stage]
        code, printed = run(monkeypatch, capsys, "train", *commands[stage])
        assert code == 0, printed
        trained = {name for group in PRESETS[stage[2:]] for name in group_parameters(tiny_trainable())[group]}
        old, new = weights(before), weights(after)
        assert old.keys() == new.keys()
        assert trained <= new.keys()
        for name, tensor in new.items():
            start = old[name].bfloat16().to(tensor.dtype)  # as the stage has loaded it
            assert torch.equal(tensor, start) == (name not in trained), name
            if name in trained or "vision_tower" not in name:
                assert tensor.dtype == (torch.float32 if name in trained else torch.bfloat16), name
        record = json.loads((after / "training.json").read_text())
        logged = [entry for entry in record["log_history"] if "lm_loss" in entry]
        assert [entry["step"] for entry in logged] == [1, 2]
        assert any("guidance_loss" in entry for entry in logged) == (stage == "3_guide")
        width, height = Image.open(after / "training.png").size
        assert (width > 2 * height) == (stage == "3_guide"), "a panel, or one for each curve of guidance"
        before = after
    assert asked == downloaded
    kept = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*") if path.is_file()}
    assert {path: kept.get(path) for path in made} == made


def test_the_reduced_plan(published, tmp_path, monkeypatch, capsys):
    """One file from the assembled model to the last stage; what the recipes above have made is used where they share it."""
    folder, overrides, _ = published
    recipe = FOLDER / "one_gpu_24gb.yaml"
    command = [
        recipe,
        *overrides(recipe),
        *SMALL,
        f"model={folder / '0_assembled'}",
        f"training.output_dir={tmp_path}",
    ]
    command += [f"stages.{stage.name}.training.max_steps=1" for stage in load_recipe(recipe).stages]
    for action in (["data", "prepare"], ["train"]):
        code, printed = run(monkeypatch, capsys, *action, *command)
        assert code == 0, printed
    reports = json.loads((tmp_path / "prepared.json").read_text())["stages"]
    assert [report["name"] for report in reports] == [stage[2:] for stage in STAGES]
    for report in reports:
        check_parts(report)
    record = json.loads((tmp_path / "training.json").read_text())
    assert [entry["stage"] for entry in record["log_history"] if "lm_loss" in entry] == [stage[2:] for stage in STAGES]
    old, new = weights(folder / "0_assembled"), weights(tmp_path / STAGES[-1])
    frozen = {
        name for group in ("self_attention", "ffn", "embeddings") for name in group_parameters(tiny_trainable())[group]
    }
    assert {name for name in new if torch.equal(old[name], new[name].bfloat16())} >= frozen & new.keys()
    assert any(not torch.equal(old[name].float(), new[name].float()) for name in new)
