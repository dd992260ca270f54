# SPDX-License-Identifier: Apache-2.0
"""The file of trained weights: what is in it, and that it gives the model back."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_training import tiny_processor, tiny_trainable

from agevlm.build import load_trained_weights
from research import weights
from research.weights import save_trained, trained_parameters

pytestmark = pytest.mark.slow

SHIPPED = Path(__file__).resolve().parents[2] / "examples" / "weights" / "demo.safetensors"


def test_weights_give_the_model_back(tmp_path):
    model = tiny_trainable()
    save_trained(model, tmp_path / "trained.safetensors", {"classes": "dog,cat"})
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained_parameters(other).values():
            parameter.mul_(-0.5)
    assert load_trained_weights(other, tmp_path / "trained.safetensors") == {"classes": "dog,cat"}
    trained = trained_parameters(model)
    for name, value in other.state_dict().items():
        before = model.state_dict()[name]
        assert torch.equal(value, before.bfloat16().to(value.dtype) if name in trained else before), name
    groups = {name.split(".")[1] for name in trained}
    assert groups == {"multi_modal_projector", "language_model", "vision_tower"}
    assert not [name for name in trained if ".self_attn." in name or ".mlp." in name]


def test_the_shipped_file_holds_what_the_stages_train_and_nothing_else():
    assert SHIPPED.stat().st_size <= 16 * 2**20
    allowed = (
        "model.multi_modal_projector.",
        "model.language_model.cross_attn.",
        "model.vision_tower.timm_model.blocks_4.2.",
    )
    tensors = load_file(SHIPPED)
    assert all(name.startswith(allowed) and tensor.dtype == torch.bfloat16 for name, tensor in tensors.items())
    assert all(any(name.startswith(prefix) for name in tensors) for prefix in allowed)


def test_the_command_writes_down_the_classes_of_the_scenes(tmp_path, monkeypatch, capsys):
    from datasets import Dataset, DatasetDict

    tiny_trainable().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    rows = [
        {"scene": 0, "kind": "objects", "answers": ["dog, cat"], "images": []},
        {"scene": 0, "kind": "existence", "answers": ["Yes", "No"], "images": []},
        {"scene": 1, "kind": "objects", "answers": ["sofa"], "images": []},
    ]
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(tmp_path / "scenes")
    file = tmp_path / "trained.safetensors"
    words = ["weights", tmp_path / "model", file, "--scenes", tmp_path / "scenes"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    weights.main()
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["classes"] == "cat,dog,sofa"
    assert metadata["scenes"] == "2"
    assert f"torch {torch.__version__.partition('+')[0]}" in metadata["versions"]
    assert "3 classes" in capsys.readouterr().out


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
