# SPDX-License-Identifier: Apache-2.0
"""Cards of models: what they say is what lies in the folder, in the Hub's own forms; and nothing of this machine."""

import json
import re

import pytest
import timm
import torch
import yaml
from command_line import run
from documents import blocks
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from tiny_models import tiny_llama, tiny_vision, write_gguf
from tiny_training import dataset, tiny_processor
from transformers import ConvNextImageProcessor

from agevlm import AgeVlmForConditionalGeneration, from_parts, load_trained, lora_modules_to_save, save_trained
from agevlm.build import load_timm
from agevlm.hub import load_pretrained, load_processor
from agevlm.hub_cards import read_results, write_model_card
from agevlm.parts import read_fingerprint
from agevlm.provenance import describe, find_licenses, identify, read_provenance
from agevlm.trainer import LORA_TARGET_MODULES, AgeVlmSFTConfig, AgeVlmSFTTrainer
from agevlm.trainer.recipe import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]

RECIPE = """
model: built
data: [{path: my_rows}]
training: {output_dir: run, max_steps: 1, logging_steps: 1, report_to: none, use_cpu: true}
stages:
- {name: align, training: {stage: align, initial_gate: 1.0}}
- {name: guide, training: {stage: guide, guidance_loss: log_dice, learning_rate: 2e-3}}
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Two parts with cards of their own and rows with an attribution, in the folder of work."""
    monkeypatch.chdir(tmp_path)
    processor = tiny_processor()
    llama = tiny_llama(vocab_size=len(processor.tokenizer), pad_token_id=processor.tokenizer.pad_token_id)
    llama.save_pretrained("little-llama")
    processor.tokenizer.save_pretrained("little-llama")
    (tmp_path / "little-llama/README.md").write_text("---\nlicense: llama3.2\nlanguage: [en, de]\n---\n")
    tiny_vision().save_pretrained("tower")
    ConvNextImageProcessor().save_pretrained("tower")
    (tmp_path / "tower/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    dataset(4).save_to_disk("my_rows")
    (tmp_path / "my_rows/ATTRIBUTION.md").write_text("By many. License: CC BY-SA 4.0.\n")
    return tmp_path


@pytest.fixture
def built(parts, monkeypatch, capsys):
    options = ["--image-size", "32", "--image-token", "<|reserved_special_token_0|>"]
    code, printed = run(monkeypatch, capsys, "build", "--text", parts / "little-llama", "--vision", "tower", "--out", "built", *options)  # fmt: skip
    assert code == 0, printed
    return parts / "built"


def test_build_and_train_write_cards_that_tell_all_stages(built):
    """From the command line to the second stage; the numbers are those of the recipe and of the models themselves."""
    card = ModelCard.load(built / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.library_name == "transformers"
    assert card.data.license == "other"
    assert card.data.license_name == "llama3.2-and-apache-2.0"
    assert card.data.language == ["en", "de"]
    assert "base_model" not in card.data.to_dict()  # the Hub knows neither part
    assert "| text model | little-llama |" in card.text
    assert "untrained" in card.text
    assert "not trained" in card.text

    (built.parent / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    trainer = train("recipe.yaml")
    card = ModelCard.load("run/2_guide/README.md")
    assert "untrained" not in card.text
    table = _table_of(card.text, "## Training")
    assert table[""] == ["align", "guide"]
    assert table["learning rate"] == ["5e-05", "0.002"]
    assert [value.split(",")[0] for value in table["guidance of maps"]] == ["dice", "log_dice"]
    counts = {name: sum(p.numel() for n, p in trainer.model.named_parameters() if name in n and p.requires_grad) for name in ("cross_attn", "projector")}  # fmt: skip
    for column in table["parameters that train"]:
        assert f"cross attention {counts['cross_attn']:,}" in column
        assert f"adapter {counts['projector']:,}" in column
    assert "| my_rows | cc-by-sa-4.0 |" in card.text
    assert "not evaluated" in card.text
    assert "(training.png)" in card.text
    assert card.data.tags.count("attention-guidance") == 1
    for folder in ("built", "run/1_align", "run/2_guide"):
        told = (built.parent / folder / "README.md").read_text() + json.dumps(read_provenance(folder))
        assert str(built.parent) not in told
        assert not re.search(r"\bNone\b|/tmp/|/home/|/nowhere/", told)
        assert "stages" in read_provenance(folder)
    assert len(read_provenance("run/1_align")["stages"]) == 1
    assert len(read_provenance("run/2_guide/checkpoint-1")["stages"]) == 2

    # A LoRA adapter for it has the same history, and one stage more.
    model = load_pretrained(AgeVlmForConditionalGeneration, "run/2_guide")
    lora = LoraConfig(r=2, target_modules=LORA_TARGET_MODULES, modules_to_save=lora_modules_to_save(model.config))
    args = AgeVlmSFTConfig("lora", max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    trainer = AgeVlmSFTTrainer(model, args, train_dataset=dataset(4), processing_class=load_processor("run/2_guide"), peft_config=lora)  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset_name=str(built.parent / "my_rows"))
    card = ModelCard.load("lora/README.md")
    assert card.data.library_name == "peft"
    assert {"lora", "trl", "sft", "agevlm"} <= set(card.data.tags)
    assert _table_of(card.text, "## Training")[""] == ["align", "guide", "LoRA"]
    assert "rank 2" in card.text
    assert "| my_rows |" in card.text
    assert str(built.parent) not in (built.parent / "lora/README.md").read_text()
    again = write_model_card("lora", repo_id="me/lora")  # from the folder alone
    assert _table_of(again.text, "## Training") == _table_of(card.text, "## Training")
    assert again.data.tags == card.data.tags


def test_the_python_of_a_card_runs(built):
    """With the folder's own name, in the folder above it, as it will with the name on the Hub."""
    Image.new("RGB", (40, 30), "red").save("photo.jpg")
    namespace: dict = {}
    for block in blocks(built / "README.md", "python"):
        exec(block, namespace)
    assert "generated" in namespace


def results_of(benchmark: str, scores: dict, **settings) -> dict:
    settings = {"benchmark": benchmark, "model": "/nowhere/me/model", "dtype": "float32", "limit": None, **settings}
    return {"settings": settings, "versions": {"agevlm": "0.1.0"}, "scores": scores}


POPE = results_of(
    "POPE",
    {
        "random": {"accuracy": 0.9, "chance": 0.5, "f1": 0.8, "yes_ratio": 0.4, "questions": 3000},
        "mean": {"accuracy": 0.85, "chance": 0.5, "f1": 0.8, "yes_ratio": 0.4, "questions": 9000},
    },
    data="lmms-lab/POPE", categories=None,
) | {"data": {"name": "lmms-lab/POPE", "id": "lmms-lab/POPE"}}  # fmt: skip
SCENES = results_of(
    "grounded scenes",
    {
        "count": {"score": 0.5, "chance": 0.4, "questions": 100, "interval": [0.4, 0.6]},
        "pointing": {"score": 0.7, "chance": 0.1, "questions": 80},
    },
    data="/nowhere/me/my_scenes", split="test",
) | {"data": {"name": "my_scenes"}}  # fmt: skip


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 16, "cross_attention_layers": [2, 7, 12, 17]}}))  # fmt: skip
    return folder


def test_results_are_in_the_text_the_index_and_the_files_of_the_hub(model_folder, tmp_path):
    """Those in the folder are found, and those elsewhere are named."""
    (model_folder / "evaluation/pope").mkdir(parents=True)
    (model_folder / "evaluation/pope/results.json").write_text(json.dumps(POPE))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/results.json").write_text(json.dumps(SCENES))
    write_model_card(model_folder, repo_id="me/my-model", results=tmp_path / "elsewhere")
    card = ModelCard.load(model_folder / "README.md")
    name, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "my-model"
    values = {(entry.dataset_type, entry.metric_name): (entry.metric_value, entry.metric_args) for entry in found}
    assert values == {
        ("lmms-lab/POPE", "random: accuracy"): (0.9, {"chance": 0.5, "questions": 3000}),
        ("lmms-lab/POPE", "mean: accuracy"): (0.85, {"chance": 0.5, "questions": 9000}),
        ("my-scenes", "count: accuracy"): (0.5, {"chance": 0.4, "questions": 100, "interval": [0.4, 0.6]}),
        ("my-scenes", "pointing: pointing accuracy"): (0.7, {"chance": 0.1, "questions": 80}),
    }
    assert "| count | accuracy | 0.500 | 0.400 to 0.600 | 0.400 | 100 |" in card.text
    assert "before layers 2, 6, 10, 14 of 16" in card.text
    assert "not evaluated" not in card.text
    assert "/nowhere" not in str(card)
    files = list((model_folder / ".eval_results").iterdir())
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[0].read_text()))
    assert (len(files), entry.dataset_id, entry.value) == (1, "lmms-lab/POPE", 0.85)


def test_a_part_of_a_benchmark_is_no_entry_of_its_leaderboard(model_folder):
    part = {**POPE, "settings": {**POPE["settings"], "limit": 100}}
    (model_folder / "results.json").write_text(json.dumps(part))
    write_model_card(model_folder)
    assert not (model_folder / ".eval_results").exists()
    assert "first 100 questions of each kind only" in (model_folder / "README.md").read_text()


def test_results_that_are_missing_or_damaged(model_folder, tmp_path):
    write_model_card(model_folder)
    assert "It was not evaluated" in (model_folder / "README.md").read_text()
    with pytest.raises(FileNotFoundError, match="has no results: name a folder that `agevlm eval` has written"):
        read_results(tmp_path / "nowhere")
    (model_folder / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        write_model_card(model_folder)


def test_results_of_former_weights_are_left_out(model_folder, tmp_path, caplog):
    """Those without a fingerprint stay, and so do those that are named."""

    def write(name: str, results: dict, accuracy: float, weights: str | None) -> None:
        (model_folder / name).mkdir(exist_ok=True)
        scores = {"mean": {**POPE["scores"]["mean"], "accuracy": accuracy}}
        told = {**results, "scores": scores, **({"weights": weights} if weights else {})}
        (model_folder / name / "results.json").write_text(json.dumps(told))

    def values() -> set[float]:
        found = write_model_card(model_folder, results=named).data.eval_results or []
        return {entry.metric_value for entry in found}

    named: list = []
    tensors = {"model.multi_modal_projector.linear.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
    save_file(tensors, model_folder / "model.safetensors")
    write("pope", POPE, 0.25, read_fingerprint(model_folder))
    write("older", SCENES, 0.5, None)
    assert values() == {0.25, 0.5}
    tensors["lm_head.weight"] += 1  # is no part of the fingerprint, and float32 and bfloat16 are one
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, model_folder / "model.safetensors")
    assert values() == {0.25, 0.5}
    assert not caplog.messages
    tensors["model.multi_modal_projector.linear.weight"][0] = 2
    save_file(tensors, model_folder / "model.safetensors")
    assert values() == {0.5}
    assert not list((model_folder / ".eval_results").iterdir())
    assert "leaves them out: POPE" in caplog.text
    named.append(model_folder / "pope")
    assert values() == {0.25, 0.5}
    assert len(list((model_folder / ".eval_results").iterdir())) == 1


def test_the_card_of_an_adapter_for_a_delta_loads_it(tmp_path, monkeypatch):
    """In the folder above, as it will with the names on the Hub; the parts are in a package."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "card_parts").mkdir()
    (tmp_path / "card_parts/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    processor = tiny_processor()
    llama = tiny_llama(vocab_size=len(processor.tokenizer), pad_token_id=processor.tokenizer.pad_token_id, tie_word_embeddings=True)  # fmt: skip
    write_gguf(llama, tmp_path / "card_parts/text.gguf", processor.tokenizer)
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "card_parts/timm.safetensors")
    tower = load_timm("test_efficientnet", "package:card_parts/timm.safetensors")
    model = from_parts("package:card_parts/text.gguf", tower, image_token_id=processor.image_token_id)
    save_trained(model, "delta", processor)
    lora = LoraConfig(r=2, target_modules=LORA_TARGET_MODULES, modules_to_save=lora_modules_to_save(model.config))
    args = AgeVlmSFTConfig("lora", max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    trainer = AgeVlmSFTTrainer(load_trained("delta"), args, train_dataset=dataset(2), processing_class=processor, peft_config=lora)  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    for _ in range(2):
        namespace: dict = {}
        for block in blocks(tmp_path / "lora/README.md", "python"):
            exec(block, namespace)
        found = dict(namespace["model"].named_parameters())
        assert all(torch.equal(value, found[name]) for name, value in trainer.model.named_parameters())
        assert "`agevlm` is needed" in (tmp_path / "lora/README.md").read_text()
        (tmp_path / "lora/provenance.json").unlink(missing_ok=True)  # of PEFT's own saving
        write_model_card("lora")
    (tmp_path / "lora/provenance.json").write_text(json.dumps({"adapts": {"name": "me/whole", "id": "me/whole"}}))
    assert 'from_pretrained("me/whole", trust' in write_model_card("lora").text


@pytest.mark.parametrize(
    ("settings", "said", "packages"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, in 4 bits", "accelerate bitsandbytes"),
        ({"quant_method": "torchao"}, "torchao.", "accelerate torchao"),
        (None, None, None),
    ],
)
def test_the_card_of_a_quantized_model_says_it_and_what_it_needs(model_folder, settings, said, packages):
    config = json.loads((model_folder / "config.json").read_text())
    text = write_model_card(model_folder, config={**config, "quantization_config": settings}).text
    installed = re.search(r"`pip install transformers timm torchvision ?(.*)`", text)[1]
    assert installed == (packages or "")
    assert ("quantized by" in text) == (said is not None)
    assert said is None or f"quantized by {said}" in text


def test_what_someone_has_written_stays(model_folder):
    """A card that a program wrote is written again, until someone deletes the line that says so."""
    readme = model_folder / "README.md"
    for blank in ("", "# Model Card for Model ID\n\n[More Information Needed]\n"):  # of PEFT and huggingface_hub
        readme.write_text(blank)
        assert write_model_card(model_folder, license="mit") is not None
    assert write_model_card(model_folder, license="mit") is not None
    own = "\n".join(readme.read_text().splitlines()[:-1]) + "\nMine.\n"
    readme.write_text(own)
    assert write_model_card(model_folder) is None
    assert readme.read_text() == own
    assert write_model_card(model_folder, overwrite=True) is not None


@pytest.mark.parametrize("delta", [False, True])
def test_the_model_tree_names_parts_of_the_hub(model_folder, delta):
    """A base on the Hub is the parent; else the parts are: joined, trained further, or with something beside them."""

    def tree(provenance):
        (model_folder / "provenance.json").write_text(json.dumps(provenance))
        card = write_model_card(model_folder, needs_agevlm=delta)
        assert ("is needed" in card.text) == delta
        assert ("trust_remote_code" in card.text) != delta
        return card.data.base_model, card.data.base_model_relation

    parts = {"text": {"name": "a/text", "id": "a/text"}, "vision": {"name": "b/vision", "id": "b/vision"}}
    stages = [{"name": "align", "settings": {"steps": 3}, "data": [{"name": "c/rows", "id": "c/rows"}]}]
    both = ["a/text", "b/vision"]
    assert tree({"parts": parts, "stages": [], "untrained": True}) == (both, "adapter" if delta else "merge")
    assert tree({"parts": parts, "stages": stages}) == (both, "adapter" if delta else "finetune")
    base = {"name": "d/age-vlm", "id": "d/age-vlm"}
    assert tree({"base": base, "parts": parts, "stages": stages}) == ("d/age-vlm", "adapter" if delta else "finetune")
    assert ModelCard.load(model_folder / "README.md").data.datasets == ["c/rows"]


def test_names_are_fit_for_the_public(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "models--me--mine" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "rows.json").write_text("[]")
    assert identify("meta-llama/Llama-3.2-1B") == {"name": "meta-llama/Llama-3.2-1B", "id": "meta-llama/Llama-3.2-1B"}
    assert identify(snapshot) == {"name": "me/mine", "id": "me/mine", "revision": "0" * 40}
    assert identify(tmp_path) == identify(".") == {"name": tmp_path.name}
    assert identify("/nowhere/me/gone/rows.json") == identify("rows.json") == {"name": "rows.json"}
    assert identify("https://me.example/a/rows.json") == {"name": "rows.json"}
    assert identify("package:module/folder/weights.pth") == {"name": "weights.pth"}


def test_licenses_of_texts_and_of_gguf_files(tmp_path):
    import gguf

    text = "A: [CC BY-SA 4.0](https://x). B under CC0. License: GPL-2+\nApache License, Version 2.0, cc by 3.0; admit, 2 gpls"
    assert find_licenses(text) == ["cc-by-sa-4.0", "cc0-1.0", "gpl-2.0", "apache-2.0", "cc-by-3.0"]
    for license in ("apache-2.0", None):
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        writer.add_name("A name")
        if license:
            writer.add_license(license)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        assert describe(tmp_path / "model.gguf") == {"name": "model.gguf"} | ({"license": license} if license else {})


def _table_of(text: str, heading: str) -> dict[str, list[str]]:
    """The first table under a heading, by its first column."""
    lines = text.split(heading, 1)[1].split("\n\n|", 1)[1].split("\n\n", 1)[0]
    rows = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in ("|" + lines).splitlines()]
    return {row[0]: row[1:] for row in rows if not row[0].startswith("---")}
