# SPDX-License-Identifier: Apache-2.0
"""Deltas: what training has changed, and nothing else, gives the whole model back to the last bit; other parts are refused."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from command_line import check_refused, run
from fake_hub import fake_hub
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from tiny_models import open_gates, tiny_llama, tiny_vision, write_gguf

from agevlm import AgeVlmForConditionalGeneration, from_parts
from agevlm.build import build_checkpoint, load_timm
from agevlm.deltas import (
    TRAINED_FILE,
    is_delta,
    load_trained,
    load_trained_into,
    save_trained,
    write_as_delta,
    write_whole,
)
from agevlm.hub import load_processor
from agevlm.inference.generation import load_model
from agevlm.inference.grounding import trained_fingerprint
from agevlm.parts import PARTS_FILE, base_models, read_fingerprint, read_parts
from agevlm.trainer.stages import LORA_TARGET_MODULES, freeze

pytestmark = pytest.mark.slow

FRESH = ("model.multi_modal_projector.", "model.language_model.cross_attn.")
BLOCK = "model.vision_tower.encoder.stages.1."
TIMM = "test_efficientnet"  # with batch norms, whose statistics are buffers


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Text models, tied and not, one also as GGUF, and vision models in folders and as timm's weights."""
    folder, tokenizer = tmp_path_factory.mktemp("parts"), tiny_tokenizer()
    for name, tied in (("text", False), ("tied", True)):
        llama = tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=tied)
        llama.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_gguf(tiny_llama(vocab_size=len(tokenizer), tie_word_embeddings=True), folder / "text.gguf", tokenizer)
    tiny_vision().save_pretrained(folder / "vision")
    torch.manual_seed(3)
    state = timm.create_model(TIMM).state_dict()
    torch.save({f"w{number}": value for number, value in enumerate(state.values())}, folder / "timm.pth")
    return folder


def build(parts: Path, out: Path, text: str = "text", vision: str = "vision", **kwargs):
    tower = str(parts / vision)
    if vision == "timm.pth":
        tower = load_timm(TIMM, parts / vision, by_order=True)
    build_checkpoint(str(parts / text), tower, out, image_size=64, **kwargs)
    return open_gates(AgeVlmForConditionalGeneration.from_pretrained(out))


def is_fresh(name: str) -> bool:
    return name.startswith(FRESH)


@torch.no_grad()
def change(model, *names: str) -> set[str]:
    """Changes tensors whose names begin so, each by the least that its type can hold in one value; returns their names."""
    found = {name for name in model.state_dict() if name.startswith(names)} if names else set()
    for name in found:
        tensor = model.state_dict()[name].view(-1)
        tensor[0] = torch.nextafter(tensor[0], tensor[0] + 1) if tensor.is_floating_point() else tensor[0] + 1
    return found


def check_equal(model, other) -> None:
    """Weights, all buffers, settings and types of two models are the same, to the last bit."""
    for values in (lambda m: m.state_dict(), lambda m: dict(m.named_buffers())):
        first, second = values(model), values(other)
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert value.dtype == second[name].dtype, name
            assert torch.equal(value, second[name]), name
    settings = [{**m.config.to_dict(), "_name_or_path": "", "auto_map": None} for m in (model, other)]
    assert settings[0] == settings[1]
    assert model.generation_config.to_dict() == other.generation_config.to_dict()
    assert model.training == other.training
    tied = [m.lm_head.weight is m.get_input_embeddings().weight for m in (model, other)]
    assert tied[0] == tied[1]


def train_merged(model) -> set[str]:
    """LoRA on two kinds of layers, merged into them; returns the names of what it has changed."""
    config = LoraConfig(r=2, target_modules=r".*language_model\.layers\.[01]\.(self_attn\.q_proj|mlp\.up_proj)")
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.merge_and_unload()
    layers = [f"model.language_model.layers.{layer}." for layer in (0, 1)]
    return {f"{layer}{name}.weight" for layer in layers for name in ("self_attn.q_proj", "mlp.up_proj")}


CASES = {
    "adapter": {"train": lambda model: set()},
    "last tower block": {"train": lambda model: change(model, BLOCK)},
    "merged LoRA": {"train": train_merged},
    "tied embeddings": {"text": "tied", "train": lambda model: change(model, "model.language_model.embed_tokens.")},
    "head": {"train": lambda model: change(model, "lm_head.")},
    "everything": {"train": lambda model: change(model, "model.", "lm_head.")},
    "GGUF": {"text": "text.gguf", "train": lambda model: change(model, "model.language_model.norm.")},
    "a buffer": {
        "vision": "timm.pth",
        "train": lambda model: change(
            model,
            *(name for name, _ in model.named_buffers() if name.endswith(("running_mean", "num_batches_tracked"))),
        ),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_delta_is_the_whole_checkpoint_to_the_last_bit(case, parts, tmp_path):
    text, vision = CASES[case].get("text", "text"), CASES[case].get("vision", "vision")
    model = build(parts, tmp_path / "untrained", text, vision)
    trained = CASES[case]["train"](model)
    model.save_pretrained(tmp_path / "whole")
    save_trained(model, tmp_path / "delta")
    saved = load_file(tmp_path / "delta" / TRAINED_FILE)
    assert saved.keys() == {name for name in model.state_dict() if is_fresh(name)} | (
        trained - ({"lm_head.weight"} if text != "text" else set())
    )
    for dtype in ("auto", torch.float32, torch.bfloat16):
        whole = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=dtype)
        check_equal(load_trained(tmp_path / "delta", parts / text, parts / vision, dtype=dtype), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_part_that_was_rounded_is_not_trained(dtype, parts, tmp_path):
    """The parts are float32, the frozen ones were trained beside in half precision, and the tower's last block in float32."""
    build(parts, tmp_path / "untrained")
    model = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "untrained", dtype=dtype)
    freeze(model, "guide")  # the tower is float32 now, with rounded values
    trained = change(model, BLOCK)
    model.save_pretrained(tmp_path / "whole")
    save_trained(model, tmp_path / "delta")
    assert {name for name in load_file(tmp_path / "delta" / TRAINED_FILE) if not is_fresh(name)} == trained
    for loaded in ("auto", torch.float32):
        whole = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=loaded)
        check_equal(load_trained(tmp_path / "delta", str(parts / "text"), str(parts / "vision"), dtype=loaded), whole)


def test_parts_in_half_precision_may_be_loaded_in_float32(parts, tmp_path):
    build(parts, tmp_path / "untrained", dtype="bfloat16")
    model = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "untrained", dtype=torch.float32)
    trained = change(model, BLOCK)
    model.save_pretrained(tmp_path / "whole")
    save_trained(model, tmp_path / "delta")
    assert {name for name in load_file(tmp_path / "delta" / TRAINED_FILE) if not is_fresh(name)} == trained
    whole = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "whole")
    check_equal(load_trained(tmp_path / "delta", str(parts / "text"), str(parts / "vision")), whole)


def test_digests_are_of_shape_and_values(parts):
    """Computed again by other means, for one tensor of each part."""
    model = from_parts(str(parts / "text"), str(parts / "vision"), image_token_id=5)
    for part, begin in (
        ("text_model", ("lm_head.", "model.language_model.")),
        ("vision_model", ("model.vision_tower.",)),
    ):
        names = sorted(name for name in model.state_dict() if name.startswith(begin) and not is_fresh(name))
        digests = model.config.parts[part]["digests"]
        for number, name in enumerate(names):
            value = model.state_dict()[name]
            for kind, rounded in (("exact", value), ("bfloat16", value.bfloat16()), ("float16", value.half())):
                data = f"{tuple(value.shape)}".encode() + rounded.float().numpy().tobytes()
                assert digests[kind][12 * number :].startswith(hashlib.sha256(data).hexdigest()[:12])
        assert len(digests["exact"]) == 12 * len(names)


# ---------------------------------------------------------------------------------------- where parts are


@pytest.fixture(scope="module")
def delta(parts, tmp_path_factory) -> Path:
    """A folder with a delta whose last tower block was trained, the whole checkpoint beside it, and the processor in both."""
    folder = tmp_path_factory.mktemp("delta")
    model = build(parts, folder / "whole")
    change(model, BLOCK)
    model.save_pretrained(folder / "whole")
    save_trained(model, folder / "delta", load_processor(folder / "whole"), metadata={"classes": "cat,dog"})
    return folder / "delta"


def in_cache(monkeypatch, tmp_path: Path, name: str, folder: Path, commit: str) -> None:
    """Puts a model of the Hub into the cache, as a download leaves it."""
    place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_parts_of_the_hub_come_at_their_revision(parts, tmp_path, monkeypatch):
    fake_hub(monkeypatch, down=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    old, new = "a" * 40, "b" * 40
    in_cache(monkeypatch, tmp_path, "someone/llama", parts / "text", old)
    in_cache(monkeypatch, tmp_path, "someone/tower", parts / "vision", old)
    model, _ = build_checkpoint("someone/llama", "someone/tower", tmp_path / "whole", image_size=64)
    model = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "whole")  # the configuration carries it
    for part, name in (("text_model", "someone/llama"), ("vision_model", "someone/tower")):
        assert (model.config.parts[part]["hub_id"], model.config.parts[part]["revision"]) == (name, old)
    save_trained(model, tmp_path / "delta")
    assert base_models(read_parts(tmp_path / "delta")) == base_models(read_parts(tmp_path / "whole"))
    check_equal(load_trained(tmp_path / "delta"), model)
    tiny_llama(7, vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path / "newer")
    in_cache(monkeypatch, tmp_path, "someone/llama", tmp_path / "newer", new)
    check_equal(load_trained(tmp_path / "delta"), model)
    with pytest.raises(ValueError, match=rf"is not the text model .* was trained on.*someone/llama at revision {old}"):
        load_trained(tmp_path / "delta", "someone/llama")  # which is the newer one
    shutil.rmtree(tmp_path / "hub" / "models--someone--llama" / "snapshots" / old)
    with pytest.raises(OSError, match=r"someone/llama.*connect to the Hub"):
        load_trained(tmp_path / "delta")


def test_parts_in_packages_are_found(parts, tmp_path, monkeypatch):
    package = tmp_path / "site" / "some_parts"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for file in ("text.gguf", "timm.pth"):
        shutil.copy(parts / file, package)
    monkeypatch.syspath_prepend(tmp_path / "site")
    tower = load_timm(TIMM, "package:some_parts/timm.pth", by_order=True)
    build_checkpoint("package:some_parts/text.gguf", tower, tmp_path / "whole", image_size=64)
    model = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert base_models(model.config.parts) == []
    save_trained(model, tmp_path / "delta")
    check_equal(load_trained(tmp_path / "delta"), model)
    (package / "text.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"The package 'some_parts' has no file 'text.gguf'"):
        load_trained(tmp_path / "delta")


def test_no_path_is_published(delta, parts):
    text = (
        "".join(file.read_text() for file in delta.glob("*.json"))
        + (delta.parent / "whole" / "config.json").read_text()
    )
    assert str(parts) not in text
    assert read_parts(delta).keys() == {"text_model", "vision_model"}


# ---------------------------------------------------------------------------------------- folders that every command takes


def test_every_loader_takes_a_delta_whose_parts_are_found(delta, parts, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(delta, folder)
    site = tmp_path / "site" / "my_parts"
    shutil.copytree(parts, site)
    (site / "__init__.py").touch()
    fake_hub(monkeypatch, down=True)
    in_cache(monkeypatch, tmp_path, "someone/llama", parts / "text", "c" * 40)
    in_cache(monkeypatch, tmp_path, "someone/tower", parts / "vision", "c" * 40)
    description = json.loads((folder / PARTS_FILE).read_text())
    for part, name in (("text_model", "someone/llama"), ("vision_model", "someone/tower")):
        description[part] |= {"hub_id": name, "revision": "c" * 40}
    (folder / PARTS_FILE).write_text(json.dumps(description))
    model, processor = load_model(folder, "cpu")
    whole, other = load_model(delta.parent / "whole", "cpu")
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
    assert processor.to_dict() == other.to_dict()
    assert is_delta(folder)
    assert not is_delta(delta.parent / "whole")
    assert model.name_or_path == str(folder)

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=LORA_TARGET_MODULES, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    loaded, _ = load_model(tmp_path / "adapter", "cpu")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits)
        assert not torch.equal(loaded(input_ids=ids).logits, whole(input_ids=ids).logits)
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.endswith("0.self_attn.q_proj.lora_B.weight")},
        file,
    )
    with pytest.raises(ValueError, match=r"lacks .*lora_B"):
        load_model(tmp_path / "adapter", "cpu")


TRAVELS = (
    "grounding.json",
    "training.json",
    "scenes/results.json",
    "scenes/plot.png",
    ".eval_results/pope.yaml",
    "LICENSE",
)
STAYS = (
    "training_args.bin",
    "optimizer.pt",
    "checkpoint-1/model.safetensors",
    "runs/events.out.tfevents.1",
    ".cache/x.lock",
)


def with_others(folder: Path, copy: Path) -> Path:
    """A copy of a folder, with files beside its weights that travel, and others that do not."""
    shutil.copytree(folder, copy)
    for name in (*TRAVELS, *STAYS):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(json.dumps({"file": name}))
    return copy


def test_other_files_travel_in_both_directions(delta, parts, tmp_path):
    """From a whole checkpoint into a delta, and from a delta into a whole one, the same ones."""
    write_as_delta(with_others(delta.parent / "whole", tmp_path / "whole"), tmp_path / "delta")
    write_whole(with_others(delta, tmp_path / "other"), tmp_path / "made", parts / "text", parts / "vision")
    for made in (tmp_path / "delta", tmp_path / "made"):
        assert all(json.loads((made / name).read_text()) == {"file": name} for name in TRAVELS)
        assert not [name for name in STAYS if (made / name).exists()]
    assert not (tmp_path / "delta" / "model.safetensors").exists()
    assert not {PARTS_FILE, TRAINED_FILE} & {file.name for file in (tmp_path / "made").iterdir()}
    check_equal(
        load_trained(tmp_path / "delta", parts / "text", parts / "vision"),
        AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "made"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fingerprint_is_that_of_the_weights_in_any_form(dtype, delta, parts, tmp_path):
    model = load_trained(delta, parts / "text", parts / "vision", dtype=dtype)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    found = {read_fingerprint(folder) for folder in (delta, delta.parent / "whole", tmp_path / "shards")}
    assert found == {trained_fingerprint(model)}
    gate = next(weight for name, weight in model.named_parameters() if name.endswith("gate"))
    torch.nn.init.constant_(gate, 0.25)
    save_trained(model, tmp_path / "later")
    assert {read_fingerprint(tmp_path / "later")} == {trained_fingerprint(model)} != found
    assert read_fingerprint(parts / "text") is None


def test_a_delta_becomes_a_whole_checkpoint(delta, parts, tmp_path, monkeypatch, capsys):
    options = ["--text", parts / "text", "--vision", parts / "vision", "--out", tmp_path / "whole"]
    code, printed = run(monkeypatch, capsys, "build", "--delta", delta, *options)
    assert code == 0, printed
    whole = delta.parent / "whole"
    made, model = (AgeVlmForConditionalGeneration.from_pretrained(folder) for folder in (tmp_path / "whole", whole))
    check_equal(made, model)
    assert load_processor(tmp_path / "whole").to_dict() == load_processor(whole).to_dict()
    save_trained(made, tmp_path / "again")  # what it was made from is not lost
    assert (tmp_path / "again" / PARTS_FILE).read_text() == (delta / PARTS_FILE).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "text"], "knows its vision model by digests alone"),
        (["--text", "text", "--vision", "tied"], "is not the vision model"),
        (["--text", "missing", "--vision", "vision"], "there is no folder"),
        (["--text", "tied", "--vision", "vision"], "is not the text model"),
        (
            ["--text", "text", "--vision", "vision", "--image-size", "64"],
            "--image-size goes with an assembly of parts",
        ),
    ],
)
def test_mistakes_with_build_are_named(options, message, delta, parts, tmp_path, monkeypatch, capsys):
    values = [str(parts / word) if word in ("text", "tied", "vision") else word for word in options]
    check_refused(
        monkeypatch, capsys, tmp_path, message, "build", "--delta", delta, *values, "--out", tmp_path / "out"
    )


def test_build_needs_parts_or_a_delta(parts, tmp_path, monkeypatch, capsys):
    check_refused(
        monkeypatch,
        capsys,
        tmp_path,
        "--text and --vision",
        "build",
        "--text",
        parts / "text",
        "--out",
        tmp_path / "out",
    )


# ---------------------------------------------------------------------------------------- refusals


@torch.no_grad()
def other_part(parts: Path, folder: Path, part: str, kind: str) -> str:
    """A part that is nearly the right one."""
    model = tiny_llama(vocab_size=len(tiny_tokenizer())) if part == "text_model" else tiny_vision()
    if kind == "one value":
        next(iter(model.parameters())).view(-1)[0] += 1e-6
    elif kind == "a layer less":
        model = tiny_llama(vocab_size=len(tiny_tokenizer()), num_hidden_layers=5)
    elif kind == "another shape":
        model = tiny_llama(vocab_size=len(tiny_tokenizer()), intermediate_size=56)
    elif kind == "rounded":
        model.to(torch.bfloat16)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        ("text_model", "one value", r"1 of its 57 tensors have other values or shapes"),
        ("text_model", "a layer less", "it has 48 tensors and not 57"),
        ("text_model", "another shape", "44 of its 57 tensors have other values or shapes"),
        ("vision_model", "one value", "is not the vision model"),
        ("vision_model", "rounded", "is not the vision model"),
    ],
)
def test_other_parts_are_refused(part, kind, message, delta, parts, tmp_path):
    given = {"text_model": str(parts / "text"), "vision_model": str(parts / "vision")}
    given[part] = other_part(parts, tmp_path / "other", part, kind)
    with pytest.raises(ValueError, match=message):
        load_trained(delta, **given)


FILES = {
    "a fresh tensor is missing": (lambda tensors, block, gate: tensors.pop(gate), "it lacks .*gate, which would be random"),
    "a tensor of a part is missing": (lambda tensors, block, gate: tensors.pop(block), f"{TRAINED_FILE} lacks {BLOCK}"),
    "an unknown tensor": (lambda tensors, *_: tensors.update(extra=torch.ones(1)), "it has extra, which"),
    "another tensor of a part": (
        lambda tensors, *_: tensors.update({"lm_head.weight": torch.ones(1)}), "has lm_head.weight, which parts.json does not name"
    ),
    "a shape": (lambda tensors, block, gate: tensors.update({gate: torch.ones(2)}), r"gate has the shape \(2,\), and \(1,\)"),
    "not finite": (lambda tensors, block, gate: tensors[block].view(-1)[0].fill_(float("nan")), f"{BLOCK}.* not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_tensors_that_do_not_fit_are_refused(case, delta, parts, tmp_path):
    shutil.copytree(delta, tmp_path / "delta")
    tensors = load_file(delta / TRAINED_FILE)
    block, gate = (next(name for name in tensors if found in name) for found in (BLOCK, ".gate"))
    FILES[case][0](tensors, block, gate)
    save_file(tensors, tmp_path / "delta" / TRAINED_FILE)
    with pytest.raises(ValueError, match=FILES[case][1]):
        load_trained(tmp_path / "delta", str(parts / "text"), str(parts / "vision"))


@pytest.mark.parametrize("file", [TRAINED_FILE, PARTS_FILE, "config.json", "generation_config.json"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_folders_are_refused(file, damage, delta, parts, tmp_path):
    shutil.copytree(delta, tmp_path / "delta")
    broken = tmp_path / "delta" / file
    broken.write_bytes(broken.read_bytes()[:-50])
    if damage == "missing":
        broken.unlink()
        if file == "generation_config.json":  # a model may have none
            return
    with pytest.raises((ValueError, OSError), match=re.escape(file)):
        load_trained(tmp_path / "delta", str(parts / "text"), str(parts / "vision"))


def test_what_is_no_delta_is_refused(delta, parts, tmp_path, monkeypatch):
    whole = delta.parent / "whole"
    with pytest.raises(ValueError, match=r"is no delta: it has no parts\.json\. A whole checkpoint"):
        load_trained(whole)
    model = AgeVlmForConditionalGeneration.from_pretrained(whole)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=LORA_TARGET_MODULES))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is a PEFT adapter and no delta"):
        load_trained(tmp_path / "adapter")
    for lora in (adapted, adapted.get_base_model()):
        with pytest.raises(ValueError, match="merge_and_unload"):
            save_trained(lora, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
    fake_hub(monkeypatch, down=True)
    with pytest.raises(FileNotFoundError, match="the Hub cannot be asked"):
        load_trained("someone/delta")
    with pytest.raises(ValueError, match=r"knows its text model by digests alone.*text_model=.*agevlm build --delta"):
        load_trained(delta)


def test_models_that_do_not_know_their_parts_are_saved_as_a_whole(delta, tmp_path):
    model = AgeVlmForConditionalGeneration.from_pretrained(delta.parent / "whole")
    del model.config.parts
    with pytest.raises(ValueError, match="does not say which parts"):
        save_trained(model, tmp_path / "delta")
    with pytest.raises(FileExistsError, match="already exists"):
        save_trained(model, delta)


def test_weights_that_are_not_finite_are_not_saved(delta, tmp_path):
    model = AgeVlmForConditionalGeneration.from_pretrained(delta.parent / "whole")
    torch.nn.init.constant_(model.model.language_model.norm.weight, float("inf"))
    with pytest.raises(ValueError, match=r"norm.weight has values that are not finite"):
        save_trained(model, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_a_model_takes_what_was_trained_only_where_it_has_the_same_parts(delta, parts):
    def assembled(text: str = "text"):
        return from_parts(
            str(parts / text), str(parts / "vision"), image_token_id=load_processor(delta).image_token_id
        )

    model, whole = assembled(), AgeVlmForConditionalGeneration.from_pretrained(delta.parent / "whole")
    load_trained_into(model, delta)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="has another text model"):
        load_trained_into(assembled("tied"), delta)
    changed = assembled()
    torch.nn.init.ones_(changed.lm_head.weight)
    with pytest.raises(ValueError, match=r"lacks lm_head.weight, in which the model differs"):
        load_trained_into(changed, delta)


def test_plain_transformers_refuses_a_delta(delta):
    """Instead of giving random values to all that is not in it."""
    with pytest.raises(OSError, match=r"model.safetensors"):
        AgeVlmForConditionalGeneration.from_pretrained(delta)


@pytest.mark.parametrize(
    ("content", "said"), [("{}", "it lacks text_model"), ("[1]", "it lacks text_model"), ("3", "is damaged")]
)
def test_a_list_of_parts_that_is_none_is_named(tmp_path, content, said):
    (tmp_path / PARTS_FILE).write_text(content)
    with pytest.raises(ValueError, match=f"parts.json.*{said}"):
        read_parts(tmp_path)
