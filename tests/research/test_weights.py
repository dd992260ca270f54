# SPDX-License-Identifier: Apache-2.0
"""The demo's delta: what is in it, and how it is made."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import tiny_llama, tiny_vision
from tiny_training import tiny_processor
from transformers import AutoProcessor

from agevlm import from_parts
from agevlm.deltas import TRAINED_FILE, load_trained
from research import weights

pytestmark = pytest.mark.slow

SHIPPED = Path(__file__).resolve().parents[2] / "examples" / "weights" / "demo"


def test_the_shipped_file_holds_what_the_stages_train_and_nothing_else():
    assert (SHIPPED / TRAINED_FILE).stat().st_size <= 16 * 2**20
    allowed = (
        "model.multi_modal_projector.",
        "model.language_model.cross_attn.",
        "model.vision_tower.timm_model.blocks_4.2.",
    )
    tensors = load_file(SHIPPED / TRAINED_FILE)
    assert all(name.startswith(allowed) and tensor.dtype == torch.bfloat16 for name, tensor in tensors.items())
    assert all(any(name.startswith(prefix) for name in tensors) for prefix in allowed)


def test_the_command_writes_down_the_classes_of_the_scenes(tmp_path, monkeypatch, capsys):
    from datasets import Dataset, DatasetDict

    parts = tiny_llama(vocab_size=len(tiny_processor().tokenizer)), tiny_vision()
    model = from_parts(*(copy.deepcopy(part) for part in parts), image_token_id=tiny_processor().image_token_id)
    changed = "model.vision_tower.encoder.stages.1.layers.0.pwconv1.weight"
    torch.nn.init.normal_(model.get_parameter(changed))
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    rows = [
        {"scene": 0, "kind": "objects", "answers": ["dog, cat"], "images": []},
        {"scene": 0, "kind": "existence", "answers": ["Yes", "No"], "images": []},
        {"scene": 1, "kind": "objects", "answers": ["sofa"], "images": []},
    ]
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(tmp_path / "scenes")
    folder = tmp_path / "delta"
    words = ["weights", tmp_path / "model", folder, "--scenes", tmp_path / "scenes"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    weights.main()
    with safe_open(folder / TRAINED_FILE, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["classes"] == "cat,dog,sofa"
    assert metadata["scenes"] == "2"
    assert f"torch {torch.__version__.partition('+')[0]}" in metadata["versions"]
    assert "3 classes" in capsys.readouterr().out
    assert not list(folder.glob("*.py"))
    assert AutoProcessor.from_pretrained(folder).tokenizer.get_vocab() == tiny_processor().tokenizer.get_vocab()
    tensors = load_file(folder / TRAINED_FILE)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    names = [name for name in model.state_dict() if "cross_attn" in name or "multi_modal_projector" in name]
    assert tensors.keys() == {*names, changed}
    loaded = load_trained(folder, *parts).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value.bfloat16().float() if name in tensors else value), name


@pytest.mark.parametrize("missing", ["model", "scenes"])
def test_missing_folders_are_named(missing, tmp_path, monkeypatch, capsys):
    if missing == "scenes":
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
    words = ["weights", tmp_path / "model", tmp_path / "file", "--scenes", tmp_path / "scenes"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit) as stop:
        weights.main()
    assert stop.value.code == 2
    assert f"in {tmp_path / missing}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("option", "least"), [("--layers", 1), ("--text-tokens", 9)])
def test_the_benchmark_of_guidance_names_numbers_that_are_too_small(option, least):
    script = SHIPPED.parents[2] / "benchmarks" / "guidance.py"
    done = subprocess.run(
        [sys.executable, script, option, str(least - 1)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"{option} must be at least {least}, got {least - 1}" in done.stderr
