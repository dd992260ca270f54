# SPDX-License-Identifier: Apache-2.0
"""Features on disk: what is stored is what the tower gives, nothing stale is served, and a stop loses little."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import dataset, tiny_processor, tiny_trainable
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from agevlm import (
    AgeVlmDataCollator,
    AgeVlmImageProcessorPil,
    AgeVlmProcessor,
    AgeVlmTrainer,
    AgeVlmTrainingArguments,
    cli,
    train,
)
from agevlm.data import FeatureStore, compute_features
from agevlm.data.features import image_digest
from agevlm.processing.collator import row_images

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
NUMBER = 12


@pytest.fixture(scope="module")
def rows():
    return dataset(NUMBER)


@pytest.fixture(scope="module")
def pictures(rows):
    """All images in order; rows have one, none or two."""
    return [image for row in rows for image in row_images(row)]


def frozen(**kwargs):
    return tiny_trainable(**kwargs).requires_grad_(False)


@pytest.fixture
def store(rows, tmp_path):
    return compute_features(frozen(), tiny_processor(), [rows], tmp_path / "features", progress=False)


def images_of_files(store: FeatureStore) -> int:
    return sum(len(names) for names in headers(store.folder).values())


def headers(folder: Path) -> dict[str, list[str]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        size = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + size])
        found[file.name] = json.loads(header["__metadata__"]["agevlm"])["images"]
    return found


# ---------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vision", ["convnext", "timm"])
def test_stored_features_are_the_towers_to_the_last_bit(vision, dtype, rows, pictures, tmp_path):
    model, processor = frozen(vision=vision).to(dtype), tiny_processor()
    store = compute_features(
        model, processor, [rows], tmp_path, batch_size=len(pictures), images_per_file=5, progress=False
    )
    assert len(store) == len(pictures)
    with torch.no_grad():
        expected = model.get_image_features(**processor.image_processor(pictures, return_tensors="pt"))
    found = store(pictures)
    assert found.last_hidden_state.dtype == dtype
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.visual_attention_mask, expected.visual_attention_mask)
    assert not found.visual_attention_mask.all(), "the pictures are padded"
    assert found.grid == expected.grid
    assert found.pooler_output is None
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0)).tolist()
    again = FeatureStore(tmp_path)([pictures[i] for i in order])
    assert torch.equal(again.last_hidden_state, expected.last_hidden_state[order])


def test_without_image_sizes_there_is_no_mask(rows, pictures, tmp_path):
    processor = tiny_processor()
    processor.image_processor.return_image_sizes = False
    store = compute_features(frozen(), processor, [rows], tmp_path, progress=False)
    assert store(pictures[:2]).visual_attention_mask is None


def test_an_image_is_stored_once_whatever_rows_it_is_in(rows, pictures, tmp_path):
    twice = datasets.concatenate_datasets([rows, rows])
    texts_only = rows.select_columns(["messages"])
    store = compute_features(
        frozen(),
        tiny_processor(),
        [twice, texts_only, rows],
        tmp_path,
        batch_size=2,
        images_per_file=4,
        progress=False,
    )
    assert len(store) == images_of_files(store) == len(pictures)
    assert max(map(len, headers(tmp_path).values())) == 4


def test_features_of_further_data_are_added(rows, pictures, tmp_path):
    half = compute_features(frozen(), tiny_processor(), [rows.select(range(4))], tmp_path, progress=False)
    before = half.folder.glob("*.safetensors")
    before = {file: file.stat().st_mtime_ns for file in before}
    store = compute_features(frozen(), tiny_processor(), [rows], tmp_path, progress=False)
    assert len(half) < len(store) == images_of_files(store) == len(pictures)
    assert all(file.stat().st_mtime_ns == written for file, written in before.items())


def test_features_are_read_when_they_are_asked_for(rows, pictures, tmp_path):
    store = compute_features(
        frozen(), tiny_processor(), [rows], tmp_path, batch_size=1, images_per_file=3, progress=False
    )
    expected = store(pictures[:3]).last_hidden_state
    store = FeatureStore(tmp_path)
    for file in headers(tmp_path):
        if file != f"{image_digest(pictures[0])}.safetensors":
            (tmp_path / file).unlink()
    assert torch.equal(store(pictures[:3]).last_hidden_state, expected)
    with pytest.raises(FileNotFoundError):
        store(pictures[3:4])


def test_an_image_is_known_by_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    image.save(tmp_path / "image.bmp")
    for name in ("image.png", "image.bmp"):
        with Image.open(tmp_path / name) as opened:
            assert image_digest(opened) == image_digest(image)
    pixels[4, 3, 1] ^= 1
    assert image_digest(Image.fromarray(pixels)) != image_digest(image)
    turned = Image.frombytes("RGB", (9, 7), image.tobytes())
    assert image_digest(turned) != image_digest(image)
    palettes = [image.convert("P"), image.convert("P")]
    palettes[1].putpalette(list(reversed(palettes[0].getpalette())))
    assert palettes[0].tobytes() == palettes[1].tobytes()
    assert image_digest(palettes[0]) != image_digest(palettes[1])
    palettes[1].putpalette(palettes[0].getpalette())
    palettes[1].info["transparency"] = 0
    assert image_digest(palettes[0]) != image_digest(palettes[1])


# ---------------------------------------------------------------------------------------- what is refused


def test_features_of_another_tower_are_refused(store, rows):
    model, processor = frozen(), tiny_processor()
    store.check(model, processor)
    reloaded = FeatureStore(store.folder)
    reloaded.check(model, processor)
    with torch.no_grad():
        next(reversed(list(model.model.vision_tower.parameters()))).view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match=r"another vision tower .*weights was .*`agevlm features RECIPE`"):
        store.check(model, processor)
    with pytest.raises(FileExistsError, match=r"vision_tower\.weights was"):
        compute_features(model, processor, [rows], store.folder, progress=False)
    with pytest.raises(ValueError, match=r"vision_tower\.weights was"):
        store.check(frozen().bfloat16(), processor)
    model = frozen()
    model.config.vision_config.out_indices = [1]
    with pytest.raises(ValueError, match=r"vision_tower\.configuration was"):
        store.check(model, processor)


def test_features_of_another_image_processor_are_refused(store):
    model, processor = frozen(), tiny_processor()
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"image_processor\.image_mean was"):
        store.check(model, processor)
    processor = tiny_processor()
    pil = AgeVlmImageProcessorPil(size={"height": 32, "width": 32})
    other = AgeVlmProcessor(pil, processor.tokenizer, image_token=processor.image_token)
    with pytest.raises(ValueError, match=r"image_processor\.image_processor_type was"):
        store.check(model, other)


def test_settings_survive_saving(store, tmp_path):
    model, processor = frozen(), tiny_processor()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model").requires_grad_(False)
    store.check(loaded, AgeVlmProcessor.from_pretrained(tmp_path / "model"))


def test_a_tower_that_trains_is_refused(store):
    model = frozen()
    next(model.model.vision_tower.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="vision tower trains"):
        store.check(model, tiny_processor())


def test_images_without_features_are_refused(store, rows):
    row = rows[0]
    pixels = np.array(row["images"][0])
    pixels[0, 0, 0] ^= 1
    row["images"] = [Image.fromarray(pixels)]
    collator = AgeVlmDataCollator(tiny_processor(), features=store)
    with pytest.raises(ValueError, match=r"1 of 2 images .* have no features .*`agevlm features RECIPE`"):
        collator([row, rows[3]])


def test_a_folder_without_features_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no features in .*`agevlm features RECIPE`"):
        FeatureStore(tmp_path)


def test_a_damaged_file_is_named(store):
    (file,) = store.folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{file.name} is damaged .*`agevlm features RECIPE`"):
        FeatureStore(store.folder)


# ---------------------------------------------------------------------------------------- stopped and resumed

_KILLED = """
import os, signal, sys
sys.path.insert(0, {fixtures!r})
from tiny_training import dataset, tiny_processor, tiny_trainable
from agevlm.data import features
save, calls = features.save_file, []
def interrupted(tensors, file, metadata):
    save(tensors, file, metadata)
    calls.append(file)
    if len(calls) == 2:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        os.kill(os.getpid(), signal.SIGKILL)
features.save_file = interrupted
model = tiny_trainable().requires_grad_(False)
features.compute_features(model, tiny_processor(), [dataset({number})], sys.argv[1], batch_size=2, images_per_file=4)
"""


def test_a_run_that_was_killed_goes_on(rows, pictures, tmp_path):
    code = _KILLED.format(fixtures=str(FIXTURES), number=NUMBER)
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "features"], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    kept = FeatureStore(tmp_path / "features")
    assert len(kept) == 4

    model, seen = frozen(), []
    model.model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    arguments = {"batch_size": 2, "images_per_file": 4, "progress": False}
    store = compute_features(model, tiny_processor(), [rows], tmp_path / "features", **arguments)
    assert sum(seen) == len(pictures) - 4
    whole = compute_features(frozen(), tiny_processor(), [rows], tmp_path / "whole", **arguments)
    assert torch.equal(store(pictures).last_hidden_state, whole(pictures).last_hidden_state)
    assert headers(store.folder) == headers(whole.folder)
    assert not list(store.folder.glob(".unfinished*"))


# ---------------------------------------------------------------------------------------- in training


def test_a_batch_has_features_in_place_of_pixels(store, rows):
    model = frozen()
    batch = [rows[i] for i in range(4)]
    with_pixels, with_features = (
        AgeVlmDataCollator(tiny_processor(), grid=(4, 4), features=features)(batch) for features in (None, store)
    )
    assert with_pixels.keys() - with_features.keys() == {"pixel_values", "image_sizes"}
    assert with_features.keys() - with_pixels.keys() == {"mm_encoder_outputs"}
    shared = with_pixels.keys() & with_features.keys()
    assert all(torch.equal(with_pixels[name], with_features[name]) for name in shared)
    outputs = []
    for batch in (with_pixels, with_features):
        inputs = {name: value for name, value in batch.items() if name not in ("map_targets", "num_dropped_phrases")}
        outputs.append(model(**inputs).logits)
    assert torch.equal(*outputs)
    texts = [{"messages": rows[1]["messages"]}]
    assert "mm_encoder_outputs" not in AgeVlmDataCollator(tiny_processor(), features=store)(texts)


def test_features_reach_workers_and_pinned_memory(store, rows, monkeypatch):
    collator = AgeVlmDataCollator(tiny_processor(), features=store)
    batches = [list(DataLoader(rows, 4, collate_fn=collator, num_workers=n)) for n in (0, 1)]
    for here, there in zip(*batches, strict=True):
        expected = here["mm_encoder_outputs"]["image"]
        assert torch.equal(there["mm_encoder_outputs"]["image"].last_hidden_state, expected.last_hidden_state)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor + 0)
    pinned = pin_memory(batches[0][0])["mm_encoder_outputs"]["image"]
    expected = batches[0][0]["mm_encoder_outputs"]["image"]
    assert torch.equal(pinned.last_hidden_state, expected.last_hidden_state)
    assert pinned.last_hidden_state.data_ptr() != expected.last_hidden_state.data_ptr()
    assert pinned.grid == expected.grid


def test_training_with_features_equals_training_with_pixels(rows, tmp_path):
    runs = []
    compute_features(frozen(), tiny_processor(), [rows], tmp_path / "features", batch_size=1, progress=False)
    for name in ("pixels", "features"):
        torch.manual_seed(0)
        seen: list[int] = []
        model = tiny_trainable()
        model.model.vision_tower.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        trainer = AgeVlmTrainer(
            model=model,
            args=AgeVlmTrainingArguments(
                str(tmp_path / name),
                stage="align",
                max_steps=4,
                per_device_train_batch_size=3,
                learning_rate=1e-2,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=rows,
            processing_class=tiny_processor(),
            features=FeatureStore(tmp_path / "features") if name == "features" else None,
        )
        seen.clear()
        trainer.train()
        runs.append((trainer, len(seen)))
    (pixels, forwards), (features, none) = runs
    assert forwards > 0 == none, "the tower does not run"
    names = ("lm_loss", "guidance_loss", "pointing_accuracy")
    logged = [
        [[e.get(n, 0.0) for n in names] for e in t.state.log_history if "lm_loss" in e] for t in (pixels, features)
    ]
    assert len(logged[0]) == 4
    assert sum(step[1] for step in logged[0]) > 1, "some phrases are guided"
    assert np.allclose(*logged, rtol=1e-5, atol=1e-6)
    trained, start = (m.state_dict() for m in (pixels.model, tiny_trainable()))
    for key, value in features.model.state_dict().items():
        assert torch.allclose(value, trained[key], rtol=1e-4, atol=1e-5), key
    assert any(not torch.equal(value, start[key]) for key, value in trained.items())


# ---------------------------------------------------------------------------------------- the command


@pytest.fixture
def recipe(rows, tmp_path) -> Path:
    """A recipe of two stages about a saved model and data; only the first freezes the tower."""
    tiny_trainable().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    rows.select(range(0, NUMBER, 2)).save_to_disk(tmp_path / "first")
    rows.select(range(1, NUMBER, 2)).save_to_disk(tmp_path / "second")
    values = {
        "model": str(tmp_path / "model"),
        "data": [{"path": str(tmp_path / "second")}],
        "training": {"output_dir": str(tmp_path / "out"), "max_steps": 1, "save_strategy": "no", "report_to": "none"},
        "stages": [
            {
                "name": "align",
                "training": {"stage": "align"},
                "data": [{"path": str(tmp_path / "first")}],
                "features": str(tmp_path / "features"),
            },
            {"name": "guide", "training": {"stage": "guide"}},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    return tmp_path / "recipe.yaml"


def agevlm(monkeypatch, *words: str | Path) -> int:
    """The exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["agevlm", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


class Recorder(AgeVlmTrainer):
    """Remembers of each step whether its batch had features or pixels."""

    seen: list[bool] = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.append("mm_encoder_outputs" in inputs)
        assert self.seen[-1] != ("pixel_values" in inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_recipe_trains_with_the_features_that_the_command_computes(recipe, rows, tmp_path, monkeypatch, capsys):
    assert agevlm(monkeypatch, "train", recipe) == 2
    assert "`agevlm features RECIPE`" in " ".join(capsys.readouterr().err.split())

    assert agevlm(monkeypatch, "features", recipe) == 0
    images = [image for row in rows.select(range(0, NUMBER, 2)) for image in row_images(row)]
    store = FeatureStore(tmp_path / "features")
    assert len(store) == len(images)
    assert all(image in store for image in images)
    assert f"features of {len(images)} images" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(Recorder, "seen", [])
    train(recipe, trainer_class=Recorder)
    assert Recorder.seen == [True, False]

    # Other data, a stage that trains the tower, and a recipe that names no folder.
    out = f"training.output_dir={tmp_path / 'other'}"
    assert agevlm(monkeypatch, "train", recipe, out, f"stages.align.data.0.path={tmp_path / 'second'}") == 2
    assert "have no features" in " ".join(capsys.readouterr().err.split())
    assert agevlm(monkeypatch, "train", recipe, out, f"stages.guide.features={tmp_path / 'features'}") == 2
    assert agevlm(monkeypatch, "features", recipe, "stages.align.features=null") == 2
    assert "features=outputs/features" in capsys.readouterr().err
