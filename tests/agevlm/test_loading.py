# SPDX-License-Identifier: Apache-2.0
"""Models that are loaded whole, or refused by name of what is missing or damaged."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from command_line import check_refused
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_models import change_weights, tiny_age_vlm
from tiny_training import tiny_processor, tiny_trainable
from transformers import AutoModelForImageTextToText

from agevlm import AgeVlmForConditionalGeneration
from agevlm.hub import load_pretrained
from agevlm.inference import generation
from agevlm.trainer import recipe

BLOCK = "model.language_model.cross_attn.0.q_proj.weight"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    tiny_trainable().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


class Code:
    """A pickled object that runs code when it is loaded."""

    def __reduce__(self):
        return exec, ("raise SystemExit('foreign code ran')",)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Code()}, folder / "pytorch_model.bin")


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


WEIGHTS = "model.safetensors"
DAMAGES = {
    "a weight of a block": (lambda f: change_weights(f, {BLOCK: None}), f"it lacks {BLOCK}, which would be random"),
    "seven weights": (
        lambda f: change_weights(f, dict.fromkeys(f"model.language_model.layers.{n}.mlp.up_proj.weight" for n in range(6)) | {BLOCK: None}),
        "and 2 more, which would be random",
    ),
    "the head": (lambda f: change_weights(f, {"lm_head.weight": None}), "it lacks lm_head.weight"),
    "another shape": (
        lambda f: change_weights(f, {BLOCK: torch.zeros(3, 2)}),
        rf"{BLOCK} has the shape \(3, 2\), and \(\d+, \d+\) in the model",
    ),
    "one too many": (
        lambda f: change_weights(f, {"model.language_model.cross_attn.2.gate": torch.zeros(1)}),
        "it has model.language_model.cross_attn.2.gate, which the model does not have",
    ),
    "a truncated file": (lambda f: truncate(f / WEIGHTS, 1000), f"{WEIGHTS} is damaged"),
    "a file without its end": (lambda f: truncate(f / WEIGHTS, -8), f"{WEIGHTS} is damaged"),
    "an empty file": (lambda f: truncate(f / WEIGHTS, 0), f"{WEIGHTS} is damaged"),
    "pickled code": (pickled, "such files can run code"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_missing_weights_are_refused(damage, folder, monkeypatch, capsys):
    change, message = DAMAGES[damage]
    change(folder)
    picture = folder.parent / "picture.png"
    Image.new("RGB", (40, 30)).save(picture)
    with pytest.raises((ValueError, OSError), match=rf"(?s){re.escape(str(folder))}.*{message}") as refused:
        load_pretrained(AgeVlmForConditionalGeneration, folder)
    check_refused(monkeypatch, capsys, folder, str(refused.value).partition("\n")[0], "ask", "--model", folder, "--image", picture, "?")  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), [("missing", "00002-of-"), ("truncated", "00002-of-.* is damaged"), ("index", "there is no 'weight_map'")])  # fmt: skip
def test_sharded_weights(damage, message, folder, checkpoint):
    (folder / WEIGHTS).unlink()
    AgeVlmForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert isinstance(load_pretrained(AgeVlmForConditionalGeneration, folder), AgeVlmForConditionalGeneration)
    if damage == "missing":
        shards[1].unlink()
    elif damage == "truncated":
        truncate(shards[1], 20)
    else:
        (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises((ValueError, OSError), match=message):
        load_pretrained(AgeVlmForConditionalGeneration, folder)


def test_what_loads_today_goes_on_loading(checkpoint, tmp_path):
    """Every weight arrives; a tied head and buffers are in no checkpoint, and other types are asked for."""
    loaded = load_pretrained(AutoModelForImageTextToText, checkpoint)
    expected = AgeVlmForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert load_pretrained(AutoModelForImageTextToText, checkpoint, dtype=torch.bfloat16).dtype == torch.bfloat16
    tied = tiny_age_vlm(llama={"tie_word_embeddings": True}, cross_attention_sink=True, visual_position_embedding=True)
    tied.save_pretrained(tmp_path / "tied")
    again = load_pretrained(AgeVlmForConditionalGeneration, tmp_path / "tied")
    assert again.lm_head.weight is again.get_input_embeddings().weight
    with pytest.raises(OSError, match="nowhere"):
        load_pretrained(AgeVlmForConditionalGeneration, tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["nothing", "adapter", "base"])
def test_an_adapter_needs_its_own_weights_and_its_model(damage, folder, tmp_path):
    model = AgeVlmForConditionalGeneration.from_pretrained(folder)
    targets = r".*language_model\.layers.*q_proj"
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=["multi_modal_projector"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    if damage == "nothing":
        loaded = load_pretrained(AutoModelForImageTextToText, tmp_path / "adapter").state_dict()
        name = "model.language_model.layers.0.self_attn.q_proj.lora_B.default.weight"
        assert torch.equal(loaded[name], adapted.state_dict()[f"base_model.model.{name}"])
        return
    if damage == "base":
        change_weights(folder, {BLOCK: None})
    else:
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        file.rename(tmp_path / "adapter" / "model.safetensors")
        change_weights(tmp_path / "adapter", {"base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight": None})  # fmt: skip
        (tmp_path / "adapter" / "model.safetensors").rename(file)
    where = folder if damage == "base" else tmp_path / "adapter"
    with pytest.raises(ValueError, match=f"{where} does not have the weights.*it lacks"):
        load_pretrained(AutoModelForImageTextToText, tmp_path / "adapter")


def test_all_ways_to_a_model_refuse_missing_weights(folder):
    change_weights(folder, {BLOCK: None})
    config = {"model": str(folder), "data": [{"path": "rows"}], "training": {"output_dir": "out", "stage": "guide"}}
    (folder / "recipe.yaml").write_text(json.dumps(config))
    for load in (
        lambda: generation.load_model(folder, "cpu"),
        lambda: recipe.load_model(recipe.load_recipe(folder / "recipe.yaml")),
    ):
        with pytest.raises(ValueError, match=f"it lacks {BLOCK}"):
            load()


def test_no_other_way_leads_to_a_model():
    """`from_pretrained` of a model class is called in one place, but for models that are changed on purpose."""
    pattern = re.compile(
        r"\b\w*(?:Model|ForCausalLM|Generation|ImageTextToText|Detection|model_class)\.from_pretrained\("
    )
    files = [file for folder in ("agevlm", "data", "trainer", "evaluation", "examples", "research") for file in (ROOT / folder).rglob("*.py")]  # fmt: skip
    found = {file.relative_to(ROOT).as_posix(): len(pattern.findall(file.read_text())) for file in files}
    # A delta's tensors are checked as a checkpoint's are, `fresh_model` has other blocks than its checkpoint, and `text_loss`
    # reads the language model alone.
    expected = {"agevlm/hub.py": 1, "agevlm/deltas.py": 1, "research/runs.py": 2}
    assert {file: count for file, count in found.items() if count} == expected
