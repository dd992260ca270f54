# SPDX-License-Identifier: Apache-2.0
"""Experiments: that each variant is what it says, that runs repeat and resume, and that the report says what was found."""

import gc
import importlib.util
import io
import json
import math
import os
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict, load_from_disk
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tiny import IMAGE, tiny_tokenizer
from tiny_models import tiny_llama, tiny_vision
from typer.testing import CliRunner

from agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration, AgeVlmImageProcessor, AgeVlmProcessor, cli, from_parts
from agevlm.data.scene_builder import build_scenes
from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmImageFeatures
from agevlm.processing.processing_agevlm import DEFAULT_CHAT_TEMPLATE
from agevlm.processing.rows import mask_from_rle, mask_to_rle
from research import curriculum as curricula
from research import runs as experiments
from research.curriculum import STAGES, Curriculum
from research.report import _colours, check_claims, score_sheets, summarize, write_report
from research.runs import (
    ARMS,
    Setting,
    Variant,
    ablations,
    fresh_model,
    pool_features,
    run,
    run_all,
    split_features,
    widen,
)

SIZE = 64  # pixels; the tiny tower makes 8x8 tokens of them
COLOURS = {
    "dog": "red",
    "cat": "green",
    "sofa": "blue",
    "car": "yellow",
    "key": "white",
    "cup": "black",
    "pen": "cyan",
}
# One step a stage.
# Several rows in each batch, so that of a fraction some are guided and some are not.
SHORT = Curriculum(steps=4, tokens_per_batch=600, stages=tuple(replace(stage, share=1 / 4) for stage in STAGES))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in a process that shares the machine: sums in another order would be other numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # a trainer collects garbage after each stage, and would look at everything that is imported
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A checkpoint with a sink, scenes of two splits to examine, the same with wrong masks for a teacher, and wide ones."""
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "cutouts").mkdir()
    (folder / "backgrounds").mkdir()
    for name, colour in COLOURS.items():
        image = Image.new("RGBA", (40, 40))
        image.paste(colour, (5, 5, 35, 35))
        image.save(folder / f"cutouts/{name}.png")
    for number in range(3):
        Image.new("RGB", (100, 90), (60 * number,) * 3).save(folder / f"backgrounds/{number}.png")
    numbers = {"num_train": 12, "num_validation": 1, "num_test": 4, "num_zero_shot": 2, "zero_shot_classes": 3}
    numbers |= {"image_size": SIZE, "max_objects": 2, "cooccurrence": 0.5}
    exact = build_scenes(folder / "cutouts", folder / "backgrounds", folder / "exact", **numbers, progress=False)

    def mirror(row):
        masks = [
            mask_to_rle(np.ascontiguousarray(mask_from_rle(entry["mask"])[:, ::-1])) for entry in row["grounding"]
        ]
        return {"grounding": [{**e, "mask": mask} for e, mask in zip(row["grounding"], masks, strict=True)]}

    DatasetDict({**exact, "train": exact["train"].map(mirror)}).save_to_disk(folder / "teacher")
    widen(folder / "exact", folder / "wide")

    tokenizer = tiny_tokenizer(chat_template=DEFAULT_CHAT_TEMPLATE)
    processor = AgeVlmProcessor(
        AgeVlmImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer, image_token=IMAGE
    )
    torch.manual_seed(0)
    model = from_parts(
        tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id),
        tiny_vision(),
        image_token_id=processor.image_token_id,
        cross_attention_sink=True,
    )
    model.generation_config.eos_token_id = list(range(len(tokenizer)))  # answers of one token, for speed
    model.save_pretrained(folder / "untrained")
    processor.save_pretrained(folder / "untrained")
    return Setting(
        checkpoint=folder / "untrained",
        data={name: folder / name for name in ("exact", "teacher", "wide")},
        output_dir=folder / "out",
        curriculum=SHORT,
        max_questions=1,
        splits=("test",),
    )


def config(setting):
    return AgeVlmConfig.from_pretrained(setting.checkpoint).text_config


@pytest.fixture(scope="module")
def variants(setting):
    topics = ablations(config(setting))
    return ARMS | {name: variant for topic in topics.values() for name, variant in topic.items()}


@pytest.fixture(scope="module")
def trained(setting, variants):
    """By variant, the result of a run with seed 0, made when it is asked for; with the batches that it saw as `batches`."""
    done = {}

    def get(name):
        if name not in done:
            batches = []

            class Recorded(curricula.PlannedBatches):
                def __init__(self, *args):
                    super().__init__(*args)
                    batches.append(self.batches)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(curricula, "PlannedBatches", Recorded)
                done[name] = {**run(variants[name], name, 0, setting), "batches": batches}
        return done[name]

    return get


def weights(setting, name, seed=0):
    return load_file(setting.run_dir(name, seed) / "trained.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def guided_stages(result):
    return [entry["stage"] for entry in result["log"] if entry["guided_phrases"] > 0]


def logged(result, name):
    """A number of the first step that is guided."""
    return result["log"][2][name]


# --- the variants ---


def names():
    """Of all variants; those of the tiny checkpoint, whose blocks are at these layers."""
    layers = [f"layer_{n}" for n in (0, 2, 5, 7)]
    topics = ablations(AgeVlmConfig(text_config={"num_hidden_layers": 6, "cross_attention_sink": True}).text_config)
    return [
        *ARMS,
        *(name for topic, found in topics.items() for name in (layers if topic == "guided_layers" else found)),
    ]


@pytest.mark.parametrize("name", names())
def test_every_variant_trains_and_is_examined(setting, trained, name):
    result = trained(name)
    assert [entry["stage"] for entry in result["log"]] == [stage.name for stage in STAGES]
    assert all(math.isfinite(entry["loss"]) for entry in result["log"])
    assert {"existence", "objects", "count"} <= result["scores"]["test"].keys()
    assert ("pointing" in result["scores"]["test"]) == (name != "concatenation")
    assert result["similarity"]["test"]["pairs"] == 4
    # The language model is as it was, and a text without an image does not know of the rest.
    assert result["text_loss"]["model"] == result["text_loss"]["language_model"]
    assert result["versions"].keys() >= {"agevlm", "torch", "transformers"}
    stored = json.loads((setting.run_dir(name, 0) / "result.json").read_text())
    assert stored == json.loads(json.dumps({k: v for k, v in result.items() if k != "batches"}))


@pytest.mark.parametrize("name", [name for name in ARMS if name != "guided"] + ["one_block", "bce", "padding_seen"])
def test_all_variants_see_the_same_batches(trained, name):
    assert trained(name)["batches"] == trained("guided")["batches"]


def test_text_loss_is_that_of_the_language_model_and_notices_one_that_was_touched(setting):
    model = fresh_model(ARMS["guided"], 0, setting)
    processor = AgeVlmProcessor.from_pretrained(setting.checkpoint)
    before = experiments.text_loss(model, processor, setting.checkpoint)
    ids = processor.tokenizer(experiments.TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert before["model"] == before["language_model"] == pytest.approx(loss, rel=1e-5)
    model.model.language_model.layers[3].mlp.up_proj.weight.data[0, 0] += 0.01
    after = experiments.text_loss(model, processor, setting.checkpoint)
    assert after["language_model"] == before["language_model"] != after["model"]


def test_stages_are_guided_where_it_is_said(trained):
    assert guided_stages(trained("guided")) == ["guide", "instruct"]
    assert guided_stages(trained("unguided")) == []
    assert guided_stages(trained("no_stage_3")) == ["instruct"]
    assert guided_stages(trained("no_stage_4")) == ["guide"]


def test_a_fraction_of_none_is_unguided(setting, trained):
    """So that no ablation of it is needed."""
    run(Variant("no row guided", arguments={"guided_fraction": 0.0}), "fraction_0", 0, setting)
    for name in ("unguided", "guided"):
        trained(name)
    assert same(weights(setting, "fraction_0"), weights(setting, "unguided"))
    assert not same(weights(setting, "guided"), weights(setting, "unguided"))
    assert 0 < logged(trained("fraction_50"), "guided_phrases") < logged(trained("guided"), "guided_phrases")


@pytest.mark.parametrize(
    "name", ["teacher", "dice", "dice_as_it_is", "bce", "layer_0", "layer_2", "layer_5", "layer_7"]
)
def test_other_guidance_has_another_guidance_loss_and_begins_alike(trained, name):
    """Before the first guided step nothing differs."""
    ours, theirs = trained(name), trained("guided")
    assert [entry["loss"] for entry in ours["log"][:2]] == [entry["loss"] for entry in theirs["log"][:2]]
    assert logged(ours, "lm_loss") == logged(theirs, "lm_loss")
    assert logged(ours, "guidance_loss") != logged(theirs, "guidance_loss")


def test_guidance_of_each_layer_alone_is_on_average_that_of_all(trained):
    layers = [logged(trained(f"layer_{n}"), "guidance_loss") for n in (0, 2, 5, 7)]
    assert statistics.fmean(layers) == pytest.approx(logged(trained("guided"), "guidance_loss"), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "before"),
    [("guided", [0, 1, 3, 4]), ("first_layers", [0, 1, 2, 3]), ("last_layers", [2, 3, 4, 5]), ("one_block", [0])],
)
def test_blocks_stand_where_it_is_said(setting, trained, name, before):
    blocks = trained(name)["scores"]["test"]["pointing"]["by_block"]
    assert len(blocks) == len(before)
    found = {int(key.split(".layers.")[1].split(".")[0]) for key in weights(setting, name) if ".cross_attn." in key}
    assert sorted(found) == before


@pytest.mark.parametrize(("name", "gate"), [("no_gates", 20.0), ("gates_shut", 0.01), ("guided", 0.5)])
def test_gates_begin_where_it_is_said(setting, trained, name, gate):
    trained(name)
    gates = [float(value) for key, value in weights(setting, name).items() if key.endswith(".gate")]
    if name == "no_gates":
        assert gates == [20.0] * 4  # and stay there
    else:
        assert gates != [gate] * 4
        # Four steps, and the rounding of what is stored.
        assert gates == pytest.approx([gate] * 4, abs=4 * SHORT.learning_rate + 2e-3)


def test_the_sink_goes_and_all_else_is_drawn_alike(setting, variants, trained):
    for name in ("no_sink", "guided"):
        trained(name)
    assert any(key.endswith(".sink") for key in weights(setting, "guided"))
    assert not any(key.endswith(".sink") for key in weights(setting, "no_sink"))


def test_a_checkpoint_without_a_sink_is_tried_with_one():
    (variant,) = ablations(AgeVlmConfig().text_config)["sink"].values()
    assert variant.text_config == {"cross_attention_sink": True}


def test_padding_is_masked_or_seen(setting, variants):
    masked, seen = (split_features(setting, variants[name], "test") for name in ("padding_masked", "padding_seen"))
    assert seen.visual_attention_mask is None
    # An image of 64x40 pixels covers 5 of the 8 rows of tokens.
    assert masked.visual_attention_mask.reshape(-1, 8, 8).any(-1).tolist() == [[True] * 5 + [False] * 3] * 4
    assert torch.equal(masked.last_hidden_state, seen.last_hidden_state)


def test_tokens_are_pooled_over_squares():
    tokens = torch.randn(2, 15, 3)
    pooled = pool_features(AgeVlmImageFeatures(last_hidden_state=tokens, grid=(3, 5)), 2)
    assert pooled.grid == (2, 3)
    grid = tokens.reshape(2, 3, 5, 3)
    for row, column in np.ndindex(2, 3):
        square = grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        expected = square.double().mean((1, 2)).float()
        torch.testing.assert_close(pooled.last_hidden_state[:, 3 * row + column], expected)


def test_pooling_does_not_take_in_padding():
    mask = torch.ones(2, 16, dtype=torch.bool)
    features = AgeVlmImageFeatures(last_hidden_state=torch.randn(2, 16, 3), visual_attention_mask=mask, grid=(4, 4))
    assert pool_features(features, 2).last_hidden_state.shape == (2, 4, 3)
    mask[0, -1] = False
    with pytest.raises(ValueError, match="Images with padding cannot be pooled"):
        pool_features(features, 2)


def test_the_concatenating_arm_reads_pooled_tokens(setting):
    arm = ARMS["concatenation"]
    whole, pooled = (split_features(setting, variant, "test") for variant in (ARMS["guided"], arm))
    assert whole.grid == (8, 8)
    assert pooled.grid == (4, 4)
    assert pooled.last_hidden_state.shape[1] == 16


def test_wide_scenes_are_the_same_scenes(setting):
    exact, wide = (load_from_disk(setting.data[name])["train"] for name in ("exact", "wide"))
    columns = ["messages", "scene", "kind", "answers"]
    assert exact.select_columns(columns)[:] == wide.select_columns(columns)[:]
    for row, other in zip(exact, wide, strict=True):
        (image,) = other["images"]
        assert image.size == (SIZE, 40)
        reference = np.asarray(row["images"][0].convert("RGB").resize((SIZE, 40)), dtype=float)
        assert np.abs(np.asarray(image, dtype=float) - reference).mean() < 6
        for entry, squashed in zip(row["grounding"], other["grounding"], strict=True):
            before, after = mask_from_rle(entry["mask"]), mask_from_rle(squashed["mask"])
            assert after.shape == (40, SIZE)
            assert after.mean() == pytest.approx(before.mean(), abs=0.01)
            if before.any():
                centres = [np.argwhere(mask).mean(0) / mask.shape for mask in (before, after)]
                assert centres[0] == pytest.approx(centres[1], abs=0.03)


# --- seeds ---


def test_models_of_a_seed_start_alike_and_not_as_the_checkpoint(setting, variants):
    checkpoint = AgeVlmForConditionalGeneration.from_pretrained(setting.checkpoint).state_dict()
    guided, other_seed = (fresh_model(ARMS["guided"], seed, setting).state_dict() for seed in (0, 1))
    for key, value in guided.items():
        fresh = "multi_modal_projector" in key or ".cross_attn." in key
        drawn = fresh and len(value.unique()) > 1
        assert torch.equal(value, checkpoint[key]) != drawn, key
        assert torch.equal(value, other_seed[key]) != drawn, key
    for name in ("concatenation", "no_sink", "one_block"):
        ours = fresh_model(variants[name], 0, setting).state_dict()
        shared = [key for key in ours if key in guided]
        assert any("multi_modal_projector" in key for key in shared)
        assert all(torch.equal(ours[key], guided[key]) for key in shared), name


def test_a_seed_gives_the_same_result_again_and_another_seed_another(setting, trained, tmp_path):
    first = trained("guided")
    elsewhere = replace(setting, output_dir=tmp_path, splits=("test", "zero_shot"))
    shutil.copytree(setting.output_dir / "features", tmp_path / "features")
    again, other = (run(ARMS["guided"], "guided", seed, elsewhere) for seed in (0, 1))
    assert same(weights(setting, "guided"), weights(elsewhere, "guided"))
    assert again["text_loss"] == first["text_loss"]
    for key in ("scores", "similarity"):
        assert again[key]["test"] == first[key]["test"]
        assert again[key].keys() == {"test", "zero_shot"}
    assert [e["loss"] for e in again["log"]] == [e["loss"] for e in first["log"]] != [e["loss"] for e in other["log"]]
    assert not same(weights(setting, "guided"), weights(elsewhere, "guided", seed=1))


# --- running ---


def comparable(result):
    return {key: value for key, value in result.items() if key not in ("seconds", "log", "batches")}


def test_what_is_done_is_not_done_again_and_the_rest_is_as_if_never_stopped(setting, trained, tmp_path, monkeypatch):
    """The rest is done by another process."""
    resumed = replace(setting, output_dir=tmp_path)
    uninterrupted = {name: json.loads(json.dumps(comparable(trained(name)))) for name in ("guided", "unguided")}
    shutil.copytree(setting.run_dir("guided", 0), resumed.run_dir("guided", 0))
    before = (resumed.run_dir("guided", 0) / "result.json").stat().st_mtime_ns
    # What a killed run leaves.
    resumed.run_dir("unguided", 0).mkdir()
    (resumed.run_dir("unguided", 0) / "result.json.partial").write_text('{"name": "ungui')
    arms = {name: ARMS[name] for name in ("guided", "unguided")}
    results = run_all(arms, [0], resumed, workers=os.cpu_count())
    assert {name: comparable(result) for name, (result,) in results.items()} == uninterrupted
    assert same(weights(setting, "unguided"), weights(resumed, "unguided"))
    assert (resumed.run_dir("guided", 0) / "result.json").stat().st_mtime_ns == before
    monkeypatch.setattr(experiments, "run", None)  # nothing is left to do
    assert run_all(arms, [0], resumed) == results


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance_weight": 2.0}, "guidance_weight was 1.0 and is 2.0"),
        ({"curriculum": replace(SHORT, steps=8)}, "curriculum.steps was 4 and is 8"),
        ({"splits": ("test", "zero_shot")}, "data.zero_shot was None and is"),
        ({"max_questions": 2}, "max_questions was 1 and is 2"),
    ],
)
def test_results_of_other_settings_are_refused(setting, trained, changes, said):
    trained("guided")
    with pytest.raises(ValueError, match="is of other settings") as caught:
        run_all({"guided": ARMS["guided"]}, [0], replace(setting, **changes))
    assert said in str(caught.value)


def test_results_of_another_checkpoint_or_other_scenes_are_refused(setting, trained, tmp_path):
    trained("guided")
    other = tmp_path / "other"
    shutil.copytree(setting.checkpoint, other)
    assert run_all({"guided": ARMS["guided"]}, [0], replace(setting, checkpoint=other))  # moved
    generation = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**generation, "max_new_tokens": 3}))
    experiments._checkpoint_digest.cache_clear()
    with pytest.raises(ValueError, match="checkpoint was"):
        run_all({"guided": ARMS["guided"]}, [0], replace(setting, checkpoint=other))
    data = {**setting.data, "exact": setting.data["teacher"]}
    with pytest.raises(ValueError, match=r"data\.train was"):
        run_all({"guided": ARMS["guided"]}, [0], replace(setting, data=data))


def test_a_setting_that_cannot_work_is_refused_at_once(setting, monkeypatch):
    with pytest.raises(ValueError, match="no scenes wide, but exact"):
        run_all({"x": replace(ARMS["guided"], data="wide")}, [0], replace(setting, data={"exact": Path("x")}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU here"):
        run_all(ARMS, [0], replace(setting, device="cuda"))


# --- the command ---


def ablate(setting, out, *more):
    command = ["ablate", "--model", setting.checkpoint, "--data", setting.data["exact"], "--out", out, *more]
    return CliRunner().invoke(cli.app, [str(part) for part in command])


def test_ablate_runs_the_topics_that_are_asked_for(setting, tmp_path, monkeypatch):
    """With runs that make up what they find; what they would do is tested above."""
    monkeypatch.setattr(sys, "argv", ["agevlm", "ablate", "--topics", "padding,sink"])
    done = []

    def run(variant, name, seed, setting):
        done.append((name, seed))
        result = {**made_up("guided", seed, hits=30, pointing=0.5), "title": variant.title}
        result["settings"] = experiments._settings(variant, setting)
        setting.run_dir(name, seed).mkdir(parents=True)
        (setting.run_dir(name, seed) / "result.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(experiments, "run", run)
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", lambda *args, **kwargs: ThreadPoolExecutor(1))
    for name in ("draw_scores", "draw_training"):  # which take their time, and are looked at below
        monkeypatch.setattr(f"research.report.{name}", lambda *args: None)
    more = ["--topics", "padding,sink", "--seeds", "0", "--steps", "4", "--guidance-weight", "2"]
    more += ["--max-questions", "7"]
    result = ablate(setting, tmp_path, *more)
    assert result.exit_code == 0, result.output
    expected = ["guided", "unguided", "padding_masked", "padding_seen", "no_sink"]
    assert done == [(name, 0) for name in expected]
    report = (tmp_path / "report/report.md").read_text()
    assert "`agevlm ablate --topics padding,sink`" in report
    assert "## padding" in report
    assert "## sink" in report
    stored = json.loads((tmp_path / "report/results.json").read_text())["results"]
    assert list(stored) == expected
    assert all(found["settings"]["guidance_weight"] == 2 for (found,) in stored.values())
    assert all(found["settings"]["max_questions"] == 7 for (found,) in stored.values())
    assert all(found["settings"]["curriculum"]["steps"] == 4 for (found,) in stored.values())
    assert stored["padding_seen"][0]["settings"]["data"] != stored["guided"][0]["settings"]["data"]
    assert ablate(setting, tmp_path, *more).exit_code == 0
    assert len(done) == 5


def test_ablate_says_what_is_wrong(setting, tmp_path):
    for arguments, said in (
        (["--topics", "gates"], "no topic gates; there are stages, guided_layers, guided_fraction, loss, padding"),
        (["--seeds", "one"], "--seeds must be numbers"),
        (["--model", tmp_path / "none"], "There is no folder"),
        (["--data", tmp_path], "not a folder of grounded scenes"),
    ):
        error = ablate(setting, tmp_path / "out", *arguments).exception
        assert isinstance(error, (ValueError, OSError))
        assert said in str(error)
    assert not (tmp_path / "out").exists()


# --- the evidence ---


@pytest.fixture
def evidence(monkeypatch):
    examples = Path(__file__).resolve().parents[2] / "examples"
    monkeypatch.syspath_prepend(examples)
    spec = importlib.util.spec_from_file_location("evidence", examples / "evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_evidence_has_made_with_other_numbers_is_refused(evidence, tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        folder.mkdir()
        (folder / "data").touch()

    for _ in range(2):
        assert evidence.made(tmp_path / "scenes", {"number": 1}, make) == tmp_path / "scenes"
    assert made == [tmp_path / "scenes"]
    with pytest.raises(FileExistsError, match="other arguments: choose another --output-dir, or delete"):
        evidence.made(tmp_path / "scenes", {"number": 2}, make)


def test_the_teacher_has_other_masks_in_training_alone(evidence, setting, tmp_path):
    exact = tmp_path / "exact"
    shutil.copytree(setting.data["exact"], exact)
    (exact / "ATTRIBUTION.md").write_text("by nobody")
    evidence.add_teacher(exact, tmp_path / "teacher")
    before, after = load_from_disk(exact), load_from_disk(tmp_path / "teacher")
    assert list(before) == list(after)
    for split in before:
        ours, theirs = (part[split].select_columns("grounding")[:] for part in (after, before))
        assert (ours == theirs) == (split != "train")
        columns = ["messages", "scene", "kind", "answers"]
        assert after[split].select_columns(columns)[:] == before[split].select_columns(columns)[:]
    quality = json.loads((tmp_path / "teacher/mask_quality.json").read_text())
    assert 0 < quality["mean_iou"] < 1
    assert {path.name for path in tmp_path.iterdir()} == {"exact", "teacher"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arms", "guided,clever"], "there is no arm clever; there are concatenation, unguided, guided, teacher"),
        (["--seeds", "0;1"], "--seeds must be whole numbers"),
        (["--steps", "3"], "--steps must be at least 4"),
    ],
)
def test_the_evidence_says_what_is_wrong(evidence, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["evidence.py", *arguments])
    with pytest.raises(SystemExit):
        evidence.main()
    assert said in capsys.readouterr().err


# --- the report, on results that are made up ---


def yes_no(hits, wrong, missed, right):
    """A row of scores of yes/no questions by their counts: yes and there, yes and not there, no and there, no and not."""
    number = hits + wrong + missed + right
    return {
        "score": (hits + right) / number,
        "f1": 2 * hits / (2 * hits + wrong + missed),
        "precision": hits / max(1, hits + wrong),
        "recall": hits / (hits + missed),
        "yes_ratio": (hits + wrong) / number,
        "chance": max(hits + missed, wrong + right) / number,
        "questions": number,
    }


def made_up(name, seed, *, hits, pointing=None, auroc=0.6, relation=0.5, loss=2.5):
    """A run that finds `hits` of the 40 objects of which 100 questions ask, and says 10 times that one is there that is not."""
    kinds = ("existence", "existence_popular", "existence_adversarial", "negation")
    scores = {kind: yes_no(hits, 10, 40 - hits, 50) for kind in kinds}
    scores |= {kind: {"score": relation, "chance": 0.5} for kind in ("objects", "count", "position", "relation")}
    if pointing is not None:
        blocks = [pointing - 0.1, pointing + 0.1]
        scores["pointing"] = {"score": pointing, "chance": 0.06, "by_block": blocks, "iou": 0.4, "mass": 0.5}
    similarity = {"auroc": auroc, "overlap": 0.7, "matching_mean": 0.4, "random_mean": 0.2, "pairs": 50}
    curve = [0.5 * pointing, pointing] if pointing is not None and name != "unguided" else [None, None]
    log = [
        {"step": step, "stage": stage, "loss": 3 / step + seed / 10} | ({} if p is None else {"pointing_accuracy": p})
        for step, stage, p in zip((10, 20, 30), ("align", "guide", "guide"), (None, *curve), strict=True)
    ]
    return {
        "name": name,
        "title": ARMS[name].title,
        "seed": seed,
        "scores": {"test": scores},
        "similarity": {"test": similarity},
        "text_loss": {"model": loss, "language_model": 2.5},
        "log": log,
        "seconds": {"training": 100.0, "examination": 20.0},
        "settings": {},
        "versions": {"agevlm": "0.1.0", "torch": "2.6"},
    }


@pytest.fixture
def results():
    return {
        "concatenation": [made_up("concatenation", seed, hits=20 + seed) for seed in range(3)],
        "unguided": [made_up("unguided", seed, hits=25, pointing=0.2 + 0.01 * seed) for seed in range(3)],
        "guided": [
            made_up("guided", seed, hits=36 + seed, pointing=0.82 + 0.02 * seed, auroc=0.95, relation=0.8)
            for seed in range(3)
        ],
    }


def test_summaries_are_means_deviations_and_chance(results):
    found = summarize(results)["guided"]["test"]
    # 36, 37 and 38 hits of 40, and 10 that are wrong: F1 = 2 * hits / (2 * hits + 10 + missed)
    assert found["existence (random), F1"].values == (72 / 86, 74 / 87, 76 / 88)
    # 40 of 100 answers are yes: F1 of always saying so is 80 / 140
    assert found["existence (random), F1"].chance == pytest.approx(80 / 140)
    assert found["existence (random), accuracy"].values == pytest.approx((0.86, 0.87, 0.88))
    assert found["existence (random), accuracy"].chance == 0.6
    assert found["pointing"].mean == pytest.approx(0.84)
    assert found["pointing"].deviation == pytest.approx(0.02)  # sqrt((0.02² + 0 + 0.02²) / 2)
    assert str(found["pointing"]) == "0.840 ± 0.020"
    assert found["attention IoU"].chance is None
    assert (found["similarity, AUROC"].chance, found["similarity, overlap (low is good)"].chance) == (0.5, 1.0)
    single = summarize({"guided": results["guided"][:1]})["guided"]["test"]["pointing"]
    assert str(single) == "0.820"


@pytest.mark.parametrize(
    ("hits", "wrong", "missed", "right"), [(0, 0, 40, 60), (0, 60, 40, 0), (40, 60, 0, 0), (3, 5, 7, 11)]
)
def test_chance_of_f1_needs_no_true_positive(results, hits, wrong, missed, right):
    results["guided"][0]["scores"]["test"]["existence"] = yes_no(hits, wrong, missed, right)
    share = (hits + missed) / (hits + wrong + missed + right)
    found = summarize({"guided": results["guided"][:1]})["guided"]["test"]["existence (random), F1"]
    assert found.chance == pytest.approx(2 * share / (1 + share))


def test_tables_have_a_column_for_each_variant_and_chance(results):
    scores, blocks = score_sheets(results)
    assert scores.columns == ["", "concatenation", "unguided", "guided", "chance"]
    assert "3 seeds" in scores.title
    rows = {row[0]: row[1:] for row in scores.rows}
    assert rows["pointing"] == ["", "0.210 ± 0.010", "0.840 ± 0.020", "0.060"]
    assert rows["relation"] == ["0.500 ± 0.000", "0.500 ± 0.000", "0.800 ± 0.000", "0.500"]
    assert blocks.rows == [["unguided", "0.110", "0.310", "0.210"], ["guided", "0.740", "0.940", "0.840"]]
    text = scores.markdown()
    assert "| pointing |  | 0.210 ± 0.010 | 0.840 ± 0.020 | 0.060 |" in text
    assert text.splitlines()[3] == "| --- | ---: | ---: | ---: | ---: |"


def verdicts(results):
    return {claim.text: claim.held for claim in check_claims(results)}


def test_claims_that_hold(results):
    claims = check_claims(results)
    assert all(claim.held for claim in claims)
    # Three existence splits against two rivals, two on pointing, two on similarity, relation, position, and the text.
    assert len(claims) == 6 + 2 + 2 + 2 + 1
    first = claims[0]
    assert first.text == "test: existence (random), F1, guided > unguided"
    assert first.numbers == '0.850 ± 0.013 and 0.667 ± 0.000; chance 0.571 (always "Yes")'


@pytest.mark.parametrize(
    ("arm", "changes", "fails"),
    [
        ("unguided", {"hits": 40, "pointing": 0.2}, "F1, guided > unguided"),
        ("concatenation", {"hits": 40}, "F1, guided > concatenation"),
        ("guided", {"hits": 37, "pointing": 0.79, "auroc": 0.95, "relation": 0.8}, "pointing, guided ≥ 0.80"),
        ("unguided", {"hits": 25, "pointing": 0.43}, "pointing, guided ≥ 2 × unguided"),
        ("guided", {"hits": 37, "pointing": 0.84, "auroc": 0.89, "relation": 0.8}, "AUROC, guided ≥ 0.90"),
        ("concatenation", {"hits": 20, "auroc": 0.95}, "AUROC, guided > concatenation"),
        (
            "concatenation",
            {"hits": 20, "relation": 0.8},
            "relation, guided > concatenation|position, guided > concatenation",
        ),
        ("unguided", {"hits": 25, "pointing": 0.2, "loss": 2.5 + 2**-50}, "to the last bit"),
    ],
)
def test_claims_that_do_not_hold(results, arm, changes, fails):
    results[arm] = [made_up(arm, seed, **changes) for seed in range(3)]
    failed = [text for text, held in verdicts(results).items() if not held]
    assert failed
    assert all(any(text.endswith(end) for end in fails.split("|")) for text in failed), failed


def test_a_claim_that_holds_below_chance_says_so(results):
    results["guided"] = [
        made_up("guided", seed, hits=15, pointing=0.84, auroc=0.95, relation=0.8) for seed in range(3)
    ]
    results["unguided"] = [made_up("unguided", seed, hits=14, pointing=0.2) for seed in range(3)]
    first = check_claims(results)[0]
    assert first.held
    # F1 is 30 / 65 and 28 / 64
    assert first.numbers == (
        '0.462 ± 0.000 and 0.438 ± 0.000; chance 0.571 (always "Yes"), which guided does not exceed'
    )


def test_claims_about_arms_that_are_not_there_are_left_out(results):
    del results["concatenation"]
    assert not any("concatenation" in text for text in verdicts(results))
    assert list(verdicts({"unguided": results["unguided"]})) == [
        "loss on text without an image, every model = its language model alone, to the last bit"
    ]


def test_the_report_is_whole_and_replaces_a_former_one(results, tmp_path, monkeypatch):
    folder = tmp_path / "report"
    arguments = {
        "title": "Evidence",
        "command": "python x.py",
        "claims": check_claims(results),
        "notes": {"masks": {"iou": 0.5}},
    }
    tables = write_report(results, folder, **arguments)
    text = (folder / "report.md").read_text()
    for said in (
        "# Evidence",
        "- command: `python x.py`",
        "- seeds: 0, 1, 2",
        "18 minutes",
        "torch 2.6",
        "- masks: iou 0.500",
        "13 of 13 held",
    ):
        assert said in text
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"scores_test.png", "similarity.png", "training.png"}
    for name in pictures:
        assert f"]({name})" in text
        assert (folder / name).stat().st_size < 150_000
        with Image.open(folder / name) as image:
            assert image.width > 400
    stored = json.loads((folder / "results.json").read_text())
    assert stored["minutes"] == pytest.approx(18)
    assert [claim["held"] for claim in stored["claims"]] == [True] * 13
    for name, runs in results.items():
        assert stored["results"][name] == [{k: v for k, v in result.items() if k != "log"} for result in runs]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(tables)
    assert "0.840 ± 0.020" in console.export_text()

    (folder / "old.png").touch()
    monkeypatch.setattr("research.report.draw_scores", lambda *args: None)
    monkeypatch.setattr("research.report.draw_training", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(results, folder, **arguments)
    assert (folder / "report.md").read_text() == text  # the former one, while the new one is not whole
    monkeypatch.setattr("research.report.draw_training", lambda *args: None)
    write_report(results, folder, **arguments)
    assert not (folder / "old.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_variant_has_one_colour_with_and_without_the_reference():
    assert _colours(["a", "guided", "b"], "guided") == {**_colours(["a", "b"]), "guided": "black"}
    assert len({*_colours("abcdefg").values(), "black"}) == 8


def test_topics_have_their_own_tables_and_figures(results, tmp_path):
    write_report(
        results, tmp_path / "report", title="Ablations", command="x", topics={"loss": ["unguided"]}, reference="guided"
    )
    text = (tmp_path / "report/report.md").read_text()
    assert "## loss" in text
    assert "|  | guided | unguided | chance |" in text
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {"topic_loss.png", "training_loss.png"}
