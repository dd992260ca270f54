# SPDX-License-Identifier: Apache-2.0
"""Exported graphs compute what the model computes, whatever the sizes, and the example answers as the model does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import skimage
import torch
from command_line import check_refused
from documents import ROOT
from PIL import Image, ImageDraw
from tiny_models import IMAGE_SIZE, batch, images, pad, text, tiny_age_vlm, tiny_llama
from tiny_training import picture, tiny_processor, tiny_trainable
from transformers import DynamicCache, GenerationConfig
from transformers.exporters.base import ExportedModel
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
from transformers.exporters.utils import decompose_for_generation, get_leaf_tensors

from agevlm import cli
from agevlm.cli.commands import app
from agevlm.inference.export import export_model
from agevlm.inference.generation import load_model

pytestmark = pytest.mark.slow

NEVER = 2**63 - 1
QUESTIONS = [("What is the brown dog?", [(24, 40)]), ("Is there a cat?", [(40, 18), (32, 32)]), ("A sofa?", [])]


def tiny(**kwargs):
    return tiny_trainable(llama={"num_hidden_layers": 2}, cross_attention_layers=[1], **kwargs).eval()


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    """A model saved and exported by the command, for ONNX."""
    folder = tmp_path_factory.mktemp("onnx")
    model, processor = tiny(), tiny_processor()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["agevlm", "export", str(folder / "model"), "--out", str(folder / "exported")])
        with pytest.raises(SystemExit, match="0"):
            cli.main()
    return SimpleNamespace(folder=folder / "exported", model=model, processor=processor, checkpoint=folder / "model")


def runtime(folder: Path):
    """A function that runs a graph of a folder: its name and its inputs, to its outputs by name."""
    graphs = json.loads((folder / "graphs.json").read_text())
    loaded = {}
    for name, graph in graphs["graphs"].items():
        file = folder / graph["file"]
        if file.suffix == ".onnx":
            loaded[name] = onnxruntime.InferenceSession(file)
        else:
            loaded[name] = torch.export.load(file).module()

    def call(name: str, **inputs) -> dict[str, torch.Tensor]:
        told = graphs["graphs"][name]
        flat, names = get_leaf_tensors(inputs), [value["name"] for value in told["outputs"]]
        assert list(flat) == [value["name"] for value in told["inputs"]]
        if isinstance(loaded[name], onnxruntime.InferenceSession):
            found = loaded[name].run(names, {key: value.numpy() for key, value in flat.items()})
            outputs = {key: torch.from_numpy(value) for key, value in zip(names, found, strict=True)}
        else:
            outputs = get_leaf_tensors(loaded[name](**inputs))
        said = []
        for value in told["inputs"] + told["outputs"]:  # what the file says of types and sizes is true
            tensor = (flat if value in told["inputs"] else outputs)[value["name"]]
            assert str(tensor.dtype) == f"torch.{value['dtype']}"
            said += zip(map(str, value["shape"]), tensor.shape, strict=True)
        sizes = {size: actual for size, actual in said if size.isidentifier()}
        for size, actual in said:
            assert sum(sizes[part] if part.isidentifier() else int(part) for part in size.split(" + ")) == actual, size
        return outputs

    return call, graphs


def place(visual, visible, ids, offset):
    """Images into the rows of their image tokens: tokens `(B, W, D)` and positions `(B, W)`."""
    rows, image = [], 0
    for row in ids:
        tokens, positions = [], []
        for index in (row == IMAGE_TOKEN).nonzero().flatten().tolist():
            tokens.append(visual[image])
            positions.append(torch.where(visible[image], index + offset, NEVER))
            image += 1
        rows.append(
            (torch.cat(tokens), torch.cat(positions)) if tokens else (visual[:0].flatten(0, 1), torch.empty(0))
        )
    width = max(len(positions) for _, positions in rows)
    states, places = torch.zeros(len(ids), width, visual.shape[-1]), torch.full((len(ids), width), NEVER)
    for i, (tokens, positions) in enumerate(rows):
        states[i, : len(tokens)], places[i, : len(positions)] = tokens, positions
    return states, places


IMAGE_TOKEN = tiny_processor().image_token_id


def rows_of(*lengths_and_images):
    found = []
    for seed, (length, at) in enumerate(lengths_and_images):
        row = text(length, seed)
        row[list(at)] = IMAGE_TOKEN
        found.append(row)
    return pad(found)


# Turns of conversations: of each row the length and the places of its images. The first has no image, one and two.
CONVERSATIONS = {
    "three rows": [[(9, ()), (12, (3,)), (10, (1, 5))], [(1, ())] * 3, [(1, ())] * 3],
    "one row, padded images, a second turn with an image": [[(6, (2,))], [(1, ())], [(5, (3,))], [(1, ())], [(4, ())]],
    "no image": [[(3, ()), (7, ())], [(1, ())] * 2],
    "one token": [[(1, ())], [(1, ())], [(4, (0,))], [(1, ())]],
    "more rows and images than traced": [[(20, (0, 4, 9)), (3, ()), (30, (29,)), (8, (1,)), (2, (0,))], [(1, ())] * 5],
}


@torch.no_grad()
def check_conversation(folder, model, turns, atol=2e-5):
    """Each turn's next token, cache and maps as the eager model's own."""
    call, graphs = runtime(folder)
    maps = any(value["name"] == "map_queries" for value in graphs["graphs"]["decoder"]["inputs"])
    config = model.config.text_config
    cache, mask = DynamicCache(config=config), torch.zeros(len(turns[0]), 0, dtype=torch.long)
    past = [
        {key: torch.zeros(len(turns[0]), config.num_key_value_heads, 0, config.head_dim) for key in ("key", "value")}
        for _ in graphs["cache"]
    ]
    positions = torch.zeros(len(turns[0]), 0, dtype=torch.long)
    for number, turn in enumerate(turns):
        new = rows_of(*turn)
        ids, mask = new["input_ids"], torch.cat([mask, new["attention_mask"]], dim=1)
        count, offset = int((ids == IMAGE_TOKEN).sum()), mask.shape[1] - ids.shape[1]
        queries = torch.rand(len(ids), 2, ids.shape[1], generator=torch.Generator().manual_seed(number)) < 0.7
        queries[:, 0] = True
        eager = {}
        states, added = torch.zeros(len(ids), 0, config.hidden_size), positions[:, :0]
        if count:
            pixels, sizes = images(count, number), torch.tensor([[IMAGE_SIZE, 5 + 9 * i % 28] for i in range(count)])
            eager = {"pixel_values": pixels, "image_sizes": sizes}
            encoded = call("image_encoder", pixel_values=pixels, sizes=sizes)
            features = model.get_image_features(pixels, sizes)
            torch.testing.assert_close(encoded["visual_tokens"], features.pooler_output, atol=atol, rtol=1e-4)
            assert torch.equal(encoded["visible"], features.visual_attention_mask)
            states, added = place(encoded["visual_tokens"], encoded["visible"], ids, offset)
        elif not positions.shape[1]:  # nothing to see yet: one token that nobody sees
            states, added = torch.zeros(len(ids), 1, config.hidden_size), torch.full((len(ids), 1), NEVER)
        positions = torch.cat([positions, added], dim=1)
        inputs = {"input_ids": ids, "attention_mask": mask, "visual_tokens": states, "visual_positions": positions}
        found = call("decoder", **inputs, past_key_values=past, **({"map_queries": queries} if maps else {}))
        past = [{key: found[f"present.{i}.{key}"] for key in ("key", "value")} for i in range(len(past))]
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, offset:]
        expected = model(
            input_ids=ids, attention_mask=mask, position_ids=position_ids, cache=cache, map_queries=queries, **eager
        )
        torch.testing.assert_close(found["logits"], expected.logits[:, -1], atol=10 * atol, rtol=1e-4)
        seen = mask[:, None, :, None].bool()
        for layer, kept in zip(past[: config.num_hidden_layers], cache.layers, strict=False):
            torch.testing.assert_close(layer["key"] * seen, kept.keys * seen, atol=10 * atol, rtol=1e-4)
        if maps and cache.layers[-1].is_initialized and len(cache.layers) > config.num_hidden_layers:
            visible = (cache.layers[-1].positions != NEVER)[:, None]
            here = found["maps"][..., -visible.shape[-1] :] * visible
            torch.testing.assert_close(here, expected.cross_attention_maps * visible, atol=atol, rtol=1e-3)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_graphs_compute_what_the_model_computes(name, onnx):
    check_conversation(onnx.folder, onnx.model, CONVERSATIONS[name])


def test_the_folder_has_what_a_runtime_needs(onnx):
    files = {path.name for path in onnx.folder.iterdir()}
    assert files >= {f"{name}.onnx{end}" for name in ("image_encoder", "decoder") for end in ("", ".data")}
    assert files >= {"export.json", "graphs.json", "config.json", "generation_config.json", "tokenizer.json"}
    assert files >= {"processor_config.json", "chat_template.jinja"}
    graphs = json.loads((onnx.folder / "graphs.json").read_text())
    assert graphs["cache"] == [
        {"layer": 0, "holds": "text"},
        {"layer": 1, "holds": "text"},
        {"before_layer": 1, "holds": "images"},
    ]


def ask_eagerly(model, processor, question, pictures, max_new_tokens):
    content = [{"type": "image", "image": image} for image in pictures] + [{"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"add_special_tokens": False},
    )
    written = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
    return inputs, written[0, inputs["input_ids"].shape[1] :].tolist()


ANSWER = """
import json, sys
sys.path.insert(0, {examples!r})
import export_onnx
from pathlib import Path
from PIL import Image, ImageDraw
found = []
for question, files in json.loads(sys.stdin.read()):
    images = [Image.open(file) for file in files]
    pixels = export_onnx.preprocess(Path(sys.argv[1]), images)
    found.append([export_onnx.answer(Path(sys.argv[1]), question, images, {tokens}), {{k: v.tolist() for k, v in pixels.items()}}])
print(json.dumps([found, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


def check_example(folder, model, processor, asked, tmp_path, max_new_tokens):
    """The example's pixels differ from the processor's by rounding alone, its tokens not at all, and it imports neither
    torch nor Transformers."""
    files = []
    for number, (question, pictures) in enumerate(asked):
        names = [tmp_path / f"{number}_{i}.png" for i in range(len(pictures))]
        for image, name in zip(pictures, names, strict=True):
            image.save(name)
        files.append([question, list(map(str, names))])
    program = ANSWER.format(examples=str(ROOT / "examples"), tokens=max_new_tokens)
    command = [sys.executable, "-c", program, str(folder)]
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run(
        command, input=json.dumps(files), env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answers, modules = json.loads(result.stdout.splitlines()[-1])
    assert not {"torch", "transformers", "agevlm"}.intersection(modules)
    assert {"onnxruntime", "tokenizers"} <= set(modules)
    for (question, pictures), ((tokens, words), pixels) in zip(asked, answers, strict=True):
        inputs, expected = ask_eagerly(model, processor, question, pictures, max_new_tokens)
        assert tokens == expected
        assert words == processor.tokenizer.decode(expected, skip_special_tokens=True)
        if pictures:
            assert pixels["sizes"] == inputs["image_sizes"].tolist()
            steps = (np.array(pixels["pixel_values"]) - inputs["pixel_values"].numpy()) * np.reshape(
                processor.image_processor.image_std, (3, 1, 1)
            )
            assert abs(steps * 255).max() < 2  # Pillow and torchvision round differently
    return answers


def test_the_example_answers_as_the_model_does(onnx, tmp_path):
    rng = np.random.default_rng(0)
    asked = [(question, [picture(rng, *size)[0] for size in sizes]) for question, sizes in QUESTIONS]
    answers = check_example(onnx.folder, onnx.model, onnx.processor, asked, tmp_path, 12)
    assert len({tuple(tokens) for (tokens, _), _ in answers}) == len(asked)  # so that equal answers say something


# ---------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_the_example_reads_no_more_than_8_bits(onnx, mode, monkeypatch):
    """Pillow would clip 16-bit gray to white."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from export_onnx import preprocess

    with pytest.raises(ValueError, match=f"mode {mode}, .*convert it to L"):
        preprocess(onnx.folder, [Image.new(mode, (4, 4), 30000)])


def test_wrong_settings_are_refused(onnx, tmp_path, monkeypatch, capsys):
    check = lambda message, *words: check_refused(  # noqa: E731
        monkeypatch, capsys, tmp_path, message, "export", onnx.checkpoint, "--out", tmp_path / "out", *words
    )
    check("the format must be onnx or torch, got 'tflite'", "--format", "tflite")
    check("an opset is a version of ONNX", "--format", "torch", "--opset", "20")
    check("the dtype must be one of", "--dtype", "int4")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    check("pip install 'agevlm[export]'")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    check(f"{tmp_path / 'out'} already exists")


def test_models_without_graphs_are_refused(onnx, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["gate_proj"]))
    with pytest.raises(ValueError, match="merge them first"):
        export_model(adapted, onnx.processor, tmp_path / "out")
    model = tiny()
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="the model is quantized"):
        export_model(model, onnx.processor, tmp_path / "out")
    with pytest.raises(ValueError, match="LlamaForCausalLM is not an AGE-VLM"):
        export_model(tiny_llama(), onnx.processor, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_and_the_model_as_it_was(onnx, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        assert not model.training
        raise RuntimeError("the exporter fails")

    model = tiny().train()
    monkeypatch.setattr(OnnxExporter, "export", fail)
    with pytest.raises(RuntimeError, match="the exporter fails"):
        export_model(model, onnx.processor, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert model.training
    assert model.model.language_model.config._attn_implementation == "sdpa"


# ---------------------------------------------------------------------------------------- other formats, in minutes


@pytest.mark.minutes
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_graphs_with_maps(format, sink, tmp_path):
    model = tiny(cross_attention_sink=sink)
    export_model(model, tiny_processor(), tmp_path / "out", format, maps=True)
    for turns in CONVERSATIONS.values():
        check_conversation(tmp_path / "out", model, turns)
    if format == "torch":
        loaded = ExportedModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
        pixels, sizes = images(1), torch.tensor([[IMAGE_SIZE, 9]])
        found = loaded.runners["image_encoder"](pixel_values=pixels, sizes=sizes)
        expected = model.get_image_features(pixels, sizes).pooler_output
        torch.testing.assert_close(found["visual_tokens"], expected, atol=2e-5, rtol=1e-4)


def test_no_tensor_of_a_cache_is_twice_an_input_of_a_program():
    model = tiny_age_vlm(llama={"num_hidden_layers": 4})
    cache = model(**batch(), use_cache=True).cache
    tensors = [tensor.data_ptr() for name, tensor in get_leaf_tensors(cache).items() if "positions" not in name]
    assert len(tensors) == len(set(tensors)) == 2 * len(cache.layers)


@pytest.mark.minutes
@torch.no_grad()
def test_decoding_with_a_static_cache_exports_by_transformers_own_exporter():
    model = tiny_age_vlm(llama={"num_hidden_layers": 2}, cross_attention_sink=True)
    inputs = batch()
    del inputs["position_ids"]
    settings = GenerationConfig(cache_implementation="static", max_cache_len=24, pad_token_id=0, do_sample=False)
    decoder, step = decompose_for_generation(model, inputs, generation_config=settings)["decode"]
    for name in ("use_cache", "return_dict"):
        step.pop(name)
    exported = OnnxExporter().export(decoder, dict(step), OnnxConfig(dynamic=True))
    found = exported(**step)
    torch.testing.assert_close(found.logits, model(**step).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.minutes
@pytest.mark.timeout(3600)
def test_the_example_answers_as_the_demo_model_does(tmp_path):
    """Real weights and real pictures: a photograph, an icon with transparency, and both."""
    command = ["build", "--delta", ROOT / "examples" / "weights" / "demo", "--dtype", "float32"]
    app([*map(str, [*command, "--out", tmp_path / "checkpoint"])], standalone_mode=False)
    app(["export", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "exported")], standalone_mode=False)
    model, processor = load_model(tmp_path / "checkpoint", device="cpu")
    photographs = Path(skimage.__file__).parent / "data"
    cat, coffee = (Image.open(photographs / name).convert("RGB") for name in ("chelsea.png", "coffee.png"))
    icon = Image.new("RGBA", (90, 120))
    ImageDraw.Draw(icon).ellipse((10, 10, 80, 90), fill=(200, 30, 30, 128))
    asked = [
        ("Is there a cat in the image?", [cat]),
        ("Is there a dog in the image?", [cat.resize((90, 300))]),
        ("Where is the cup?", [coffee]),
        ("What is in the image?", [icon]),
        ("What is in the images?", [cat, coffee]),
        ("What is the capital of France?", []),
    ]
    check_example(tmp_path / "exported", model, processor, asked, tmp_path, 16)
