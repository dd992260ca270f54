# SPDX-License-Identifier: Apache-2.0
"""Runs of the laboratory: that each variant is what it says, and that runs repeat and resume."""

import gc
import json
import math
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_laboratory import SHORT, STAGES, tiny_laboratory

from agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration, AgeVlmProcessor
from agevlm.trainer import GroupedBatches
from research import runs
from research.ablations import TOPICS
from research.runs import ARMS, Variant, fresh_model, run, run_all

pytestmark = pytest.mark.slow

VARIANTS = ARMS | {name: variant for topic in TOPICS.values() for name, variant in topic.items()}
EXAMINED = ["guided", "unguided", "concatenation", "teacher", "padding_seen"]


@pytest.fixture(scope="module", autouse=True)
def fast():
    """One thread, as in a process that shares the machine: sums in another order would be other numbers. No figures, and no
    collection of what is imported as garbage after each stage."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agevlm.trainer.recipe.draw_training", lambda *args, **kwargs: None)
        yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    return tiny_laboratory(tmp_path_factory.mktemp("laboratory"))


@pytest.fixture(scope="module")
def trained(laboratory):
    """By variant, the result of a run with seed 0, trained when a test asks for it; with the batches that it saw as `batches`."""
    done = {}

    def get(name):
        if name not in done:
            batches = []

            class Recorded(GroupedBatches):
                def _batches(self):
                    batches.append(super()._batches())
                    return batches[-1]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("agevlm.trainer.sampling.GroupedBatches", Recorded)
                runs.prepare_features(VARIANTS[name], laboratory)
                done[name] = {**run(VARIANTS[name], name, 0, laboratory), "batches": batches}
        return done[name]

    return get


def weights(laboratory, name, seed=0):
    return load_file(laboratory.run_dir(name, seed) / "trained.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def losses(result):
    return [entry["loss"] for entry in result["log"] if "loss" in entry]


def guidance(result):
    """The entries of guided steps."""
    return [entry for entry in result["log"] if entry.get("guided_phrases")]


# --- the variants ---


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_valid_recipe_of_its_own(laboratory, name):
    changes = laboratory.settings(VARIANTS[name], name, 0)
    assert (changes == laboratory.settings(ARMS["guided"], "guided", 0)) == (name == "guided")


def test_layers_of_the_ablations_are_those_that_their_titles_name():
    """With the depth of SmolLM2-135M."""
    default = AgeVlmConfig(text_config={"num_hidden_layers": 30}).text_config
    assert default.cross_attention_llama_layers == [2, 10, 17, 24]
    for layer, (name, variant) in zip(default.cross_attention_layers, TOPICS["guided_layers"].items(), strict=True):
        assert (name, variant.overrides) == (f"layer_{layer}", [f"training.guided_layers=[{layer}]"])
    for variant in TOPICS["insertion"].values():
        config = AgeVlmConfig(text_config={"num_hidden_layers": 30, **variant.text_config}).text_config
        named = ", ".join(map(str, config.cross_attention_llama_layers))
        assert variant.title.endswith((f"before layers {named}", f"before layer {named}"))


@pytest.mark.parametrize("name", EXAMINED)
def test_a_variant_is_trained_and_examined(laboratory, trained, name):
    result = trained(name)
    assert list(dict.fromkeys(entry["stage"] for entry in result["log"])) == STAGES
    assert len(losses(result)) == 4
    assert all(math.isfinite(loss) for loss in losses(result))
    assert {"existence", "objects", "count"} <= result["scores"]["test"].keys()
    assert "pointing" in result["scores"]["test"]
    assert result["similarity"]["test"]["pairs"] == 4
    # The language model is unchanged, and a text without an image does not see the rest.
    assert result["text_loss"]["model"] == result["text_loss"]["language_model"]
    assert result["versions"].keys() >= {"agevlm", "torch", "transformers"}
    folder = laboratory.run_dir(name, 0)
    stored = json.loads((folder / "result.json").read_text())
    assert stored == json.loads(json.dumps({k: v for k, v in result.items() if k != "batches"}))
    assert {path.name for path in folder.iterdir()} == {"result.json", "settings.json", "trained.safetensors"}
    assert result["batches"] == trained("guided")["batches"] != []


def test_guidance_is_in_the_stages_that_the_variants_name(laboratory, trained):
    assert [entry["stage"] for entry in guidance(trained("guided"))] == ["guide", "instruct"]
    assert guidance(trained("unguided")) == guidance(trained("concatenation")) == []

    def weights_of(name):
        recipe = laboratory.load_recipe(VARIANTS[name], name, 0)
        return [stage.training["guidance_weight"] for stage in recipe.split()]

    assert weights_of("no_stage_3") == [0, 0, 0, 1]
    assert weights_of("no_stage_4") == [0, 0, 1, 0]


def test_other_masks_change_the_guidance_loss_and_nothing_before(trained):
    ours, theirs = trained("teacher"), trained("guided")
    assert losses(ours)[:2] == losses(theirs)[:2]
    assert guidance(ours)[0]["lm_loss"] == guidance(theirs)[0]["lm_loss"]
    assert guidance(ours)[0]["guidance_loss"] != guidance(theirs)[0]["guidance_loss"]


def test_blocks_and_sinks_are_those_of_the_variant(laboratory):
    one_block = Variant("one block", text_config={"cross_attention_layers": [0]})
    for variant, blocks in ((ARMS["guided"], "0134"), (one_block, "0"), (VARIANTS["no_sink"], "0134")):
        model = fresh_model(variant, 0, laboratory)
        names = [name for name, _ in model.named_parameters() if ".cross_attn." in name]
        assert {name.split(".cross_attn.")[1].split(".")[0] for name in names} == set(blocks)
        assert any(name.endswith(".sink") for name in names) == (variant is not VARIANTS["no_sink"])


def test_features_are_kept_apart_by_the_image_processor(laboratory):
    masked, seen = (VARIANTS[name] for name in ("padding_masked", "padding_seen"))
    assert laboratory.features(masked) == laboratory.features(ARMS["guided"]) != laboratory.features(seen)


def test_text_loss_is_that_of_the_language_model_and_notices_a_change(laboratory):
    model = fresh_model(ARMS["guided"], 0, laboratory)
    processor = AgeVlmProcessor.from_pretrained(laboratory.checkpoint)
    before = runs.text_loss(model, processor, laboratory.checkpoint)
    ids = processor.tokenizer(runs.TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert before["model"] == before["language_model"] == pytest.approx(loss, rel=1e-5)
    model.model.language_model.layers[3].mlp.up_proj.weight.data[0, 0] += 0.01
    after = runs.text_loss(model, processor, laboratory.checkpoint)
    assert after["language_model"] == before["language_model"] != after["model"]


# --- seeds ---


def test_models_of_a_seed_start_alike_and_not_as_the_checkpoint(laboratory):
    checkpoint = AgeVlmForConditionalGeneration.from_pretrained(laboratory.checkpoint).state_dict()
    guided, other_seed = (fresh_model(ARMS["guided"], seed, laboratory).state_dict() for seed in (0, 1))
    for key, value in guided.items():
        fresh = "multi_modal_projector" in key or ".cross_attn." in key
        drawn = fresh and len(value.unique()) > 1
        assert torch.equal(value, checkpoint[key]) != drawn, key
        assert torch.equal(value, other_seed[key]) != drawn, key
    one_block = Variant("one block", text_config={"cross_attention_layers": [0]})
    for variant in (ARMS["concatenation"], VARIANTS["no_sink"], one_block):
        ours = fresh_model(variant, 0, laboratory).state_dict()
        shared = [key for key in ours if key in guided]
        assert any("multi_modal_projector" in key for key in shared)
        assert all(torch.equal(ours[key], guided[key]) for key in shared), variant.title


def test_a_seed_gives_the_same_result_again_and_another_seed_another(laboratory, trained, tmp_path):
    first = trained("guided")
    elsewhere = replace(laboratory, output_dir=tmp_path, splits=("test", "zero_shot"))
    shutil.copytree(laboratory.output_dir / "features", tmp_path / "features")
    again, other = (run(ARMS["guided"], "guided", seed, elsewhere) for seed in (0, 1))
    assert same(weights(laboratory, "guided"), weights(elsewhere, "guided"))
    assert again["text_loss"] == first["text_loss"]
    for key in ("scores", "similarity"):
        assert again[key]["test"] == first[key]["test"]
        assert again[key].keys() == {"test", "zero_shot"}
    assert losses(again) == losses(first) != losses(other)
    assert not same(weights(laboratory, "guided"), weights(elsewhere, "guided", seed=1))


# --- running ---


def comparable(result):
    return {key: value for key, value in result.items() if key not in ("seconds", "log", "batches")}


def test_finished_runs_are_kept_and_a_stopped_one_resumes(laboratory, trained, tmp_path, monkeypatch):
    """The stopped one in another process, after its second stage."""
    resumed = replace(laboratory, output_dir=tmp_path)
    uninterrupted = {name: json.loads(json.dumps(comparable(trained(name)))) for name in ("guided", "unguided")}
    shutil.copytree(laboratory.run_dir("guided", 0), resumed.run_dir("guided", 0))
    before = (resumed.run_dir("guided", 0) / "result.json").stat().st_mtime_ns

    class StoppedError(Exception):
        pass

    class StoppedTrainer(runs.AgeVlmTrainer):
        def train(self, **kwargs):
            if "3_guide" in self.args.output_dir:
                raise StoppedError
            return super().train(**kwargs)

    runs.prepare_features(ARMS["unguided"], resumed)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "AgeVlmTrainer", StoppedTrainer)
        with pytest.raises(StoppedError):
            run(ARMS["unguided"], "unguided", 0, resumed)
    arms = {name: ARMS[name] for name in ("guided", "unguided")}
    results = run_all(arms, [0], resumed, workers=os.cpu_count())
    assert {name: comparable(result) for name, (result,) in results.items()} == uninterrupted
    assert same(weights(laboratory, "unguided"), weights(resumed, "unguided"))
    assert [entry["step"] for entry in results["unguided"][0]["log"] if "loss" in entry] == [1, 2, 3, 4]
    assert (resumed.run_dir("guided", 0) / "result.json").stat().st_mtime_ns == before
    monkeypatch.setattr(runs, "run", None)  # nothing is left to do
    assert run_all(arms, [0], resumed) == results


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"overrides": [*SHORT, "training.learning_rate=1"]}, "recipe.training.learning_rate was 0.006 and is 1"),
        ({"splits": ("test", "zero_shot")}, "examined.zero_shot was None and is"),
        ({"max_questions": 2}, "max_questions was 1 and is 2"),
    ],
)
def test_results_of_other_settings_are_refused(laboratory, trained, changes, said):
    trained("guided")
    with pytest.raises(FileExistsError, match="holds work of other settings") as caught:
        run_all({"guided": ARMS["guided"]}, [0], replace(laboratory, **changes))
    assert said in str(caught.value)


def test_results_of_another_checkpoint_or_other_scenes_are_refused(laboratory, trained, tmp_path):
    trained("guided")
    other = tmp_path / "other"
    shutil.copytree(laboratory.checkpoint, other)
    assert run_all({"guided": ARMS["guided"]}, [0], replace(laboratory, checkpoint=other))  # moved
    generation = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**generation, "max_new_tokens": 3}))
    runs._checkpoint_digest.cache_clear()
    with pytest.raises(FileExistsError, match=r"recipe\.model was"):
        run_all({"guided": ARMS["guided"]}, [0], replace(laboratory, checkpoint=other))
    scenes = {**laboratory.scenes, "exact": laboratory.scenes["teacher"]}
    with pytest.raises(FileExistsError, match=r"recipe\.data\.0\.path was"):
        run_all({"guided": ARMS["guided"]}, [0], replace(laboratory, scenes=scenes))


def test_what_cannot_work_is_refused_at_once(laboratory, monkeypatch):
    with pytest.raises(ValueError, match="no scenes nowhere; there are exact"):
        run_all({"x": Variant("x", scenes="nowhere")}, [0], laboratory)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no CUDA GPU"):
        run_all(ARMS, [0], replace(laboratory, device="cuda"))


def test_a_file_of_variants_names_what_is_wrong_in_it(tmp_path):
    file = tmp_path / "variants.yaml"
    file.write_text("gate:\n  open:\n    titel: gates are open\n")
    with pytest.raises(ValueError, match=r"'gate\.open\.titel': did you mean 'title'"):
        runs.read_variants(file)
