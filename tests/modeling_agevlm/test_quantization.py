# SPDX-License-Identifier: Apache-2.0
"""Quantized models: only the Llama's layers are quantized, whatever the back-end and the user's list, and images are read."""

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from command_line import run
from optimum.quanto import QuantizedTransformersModel, qint8
from peft import LoraConfig, get_peft_model
from tiny_models import batch, tiny_age_vlm
from tiny_quantized import BACK_ENDS, INT8, NF4, QUANTO, TORCHAO, WIDE, dequantized, load_quantized, quantized
from tiny_training import dataset, picture, tiny_processor, tiny_trainable
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizers_utils import should_convert_module

from agevlm import AgeVlmForConditionalGeneration, AgeVlmModel, AgeVlmTextModel
from agevlm.inference.generation import load_model
from agevlm.resume import fingerprint
from agevlm.trainer.arguments import AgeVlmTrainingArguments
from agevlm.trainer.stages import LORA_TARGET_MODULES, freeze, lora_modules_to_save
from agevlm.trainer.trainer import AgeVlmTrainer

pytestmark = pytest.mark.slow

WRITTEN = ["multi_modal_projector", "vision_tower", "cross_attn", "lm_head"]  # what people write


def wide_model() -> AgeVlmForConditionalGeneration:
    """With sinks, whose keys are made by a linear layer."""
    return tiny_age_vlm(llama=WIDE, cross_attention_sink=True, visual_position_embedding=True)


@pytest.fixture(scope="module")
def model() -> AgeVlmForConditionalGeneration:
    return wide_model()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


def llama_layers(model: nn.Module) -> set[str]:
    """By hand: the seven linear layers of each Llama layer."""
    prefix = {
        AgeVlmForConditionalGeneration: "model.language_model.",
        AgeVlmModel: "language_model.",
        AgeVlmTextModel: "",
    }
    names = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    return {f"{prefix[type(model)]}layers.{i}.{name}" for i in range(6) for name in names}


def inputs() -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch().items() if name != "position_ids"}


def queries(ids: torch.Tensor) -> torch.Tensor:
    """A phrase that stands after all images of each row."""
    asked = torch.zeros(ids.shape[0], 1, ids.shape[1], dtype=torch.bool)
    asked[..., -2:] = True
    return asked


@pytest.mark.parametrize("settings", BACK_ENDS.values(), ids=BACK_ENDS)
@pytest.mark.parametrize("skip", [None, WRITTEN, ["lm_head"]], ids=["none", "written", "lm_head"])
def test_only_the_llamas_layers_are_quantized(checkpoint, settings, skip):
    model = load_quantized(checkpoint, settings, skip=skip)
    assert quantized(model) == llama_layers(model)


@pytest.mark.parametrize("model_class", [AgeVlmModel, AgeVlmTextModel])
def test_parts_of_the_model_are_quantized_alike(model, tmp_path, model_class):
    part = model.model if model_class is AgeVlmModel else model.model.language_model
    part.save_pretrained(tmp_path)
    assert quantized(load_quantized(tmp_path, NF4, model_class)) == llama_layers(part)


def test_a_4_bit_model_is_the_float_model_of_its_stored_values(checkpoint, model):
    # In training mode: with weights of 4 bits, some CPUs infer in bfloat16.
    found = load_quantized(checkpoint, NF4).train()
    expected, given = dequantized(found, model), inputs()
    got, reference = (m(**given, map_queries=queries(given["input_ids"])) for m in (found, expected))
    torch.testing.assert_close(got.logits, reference.logits, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(got.cross_attention_maps, reference.cross_attention_maps, atol=1e-5, rtol=1e-4)
    # And that is near the model, as far as 4 bits go: the first block stands before the first layer.
    with torch.no_grad():
        original = model(**given, map_queries=queries(given["input_ids"]))
        first, outputs = original.cross_attention_maps[0], found.eval()(**given).logits
    torch.testing.assert_close(got.cross_attention_maps[0], first, atol=1e-5, rtol=1e-4)
    assert (got.logits - original.logits).norm() / original.logits.norm() < 0.5
    assert (outputs - reference.logits).norm() / reference.logits.norm() < 0.05
    tokens = found.generate(**given, max_new_tokens=3)
    assert tokens.shape[1] == given["input_ids"].shape[1] + 3


@pytest.mark.parametrize("settings", [INT8, TORCHAO, QUANTO], ids=["8bit", "torchao", "quanto"])
def test_an_8_bit_model_answers_like_the_model(checkpoint, model, settings):
    found, given = load_quantized(checkpoint, settings), inputs()
    with torch.no_grad():
        got, expected = found(**given).logits, model(**given).logits
        other = found(**{**given, "pixel_values": given["pixel_values"].flip(0)}).logits
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < 0.1
    assert (other - got)[1:].norm() / expected.norm() > 2 * error, "other images, other answers"
    assert found.generate(**given, max_new_tokens=3).shape[1] == given["input_ids"].shape[1] + 3


@pytest.mark.parametrize("settings", [TORCHAO, QUANTO], ids=["torchao", "quanto"])
def test_a_model_of_8_bit_weights_is_the_float_model_of_its_stored_values(checkpoint, model, settings):
    found, given = load_quantized(checkpoint, settings), inputs()
    expected = dequantized(found, model)
    with torch.no_grad():
        got, reference = (m(**given, map_queries=queries(given["input_ids"])) for m in (found, expected))
    torch.testing.assert_close(got.logits, reference.logits, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(got.cross_attention_maps, reference.cross_attention_maps, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------- saving


def check_equal(again, model) -> None:
    """The same weights as they are stored, and outputs equal to the last bit."""
    assert quantized(again) == quantized(model)
    assert fingerprint(again) == fingerprint(model)
    for tensor in (*again.parameters(), *model.parameters()):
        if type(tensor) is nn.Parameter:  # at any place of a file; matrix products depend on it in the last bit
            tensor.data = tensor.data.clone()
    for mode in (True, False):
        with torch.no_grad():
            got, expected = again.train(mode)(**inputs()).logits, model.train(mode)(**inputs()).logits
        assert torch.equal(got, expected)


@pytest.mark.parametrize("settings", [NF4, INT8, TORCHAO], ids=["4bit", "8bit", "torchao"])
def test_a_quantized_model_is_saved_and_loaded(checkpoint, tmp_path, settings):
    model = load_quantized(checkpoint, settings)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    check_equal(again, model)
    assert fingerprint(model) != fingerprint(load_quantized(checkpoint, QUANTO))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path, checkpoint)]
    assert sizes[0] < 0.8 * sizes[1]


def test_transformers_saves_no_model_of_quanto_and_quanto_does(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="quantized with quanto and is not serializable"):
        load_quantized(checkpoint, QUANTO).save_pretrained(tmp_path / "transformers")
    assert not (tmp_path / "transformers").exists()

    class QuantizedAgeVlm(QuantizedTransformersModel):  # as in docs/quantization.md
        auto_class = AutoModelForImageTextToText

    plain = AutoModelForImageTextToText.from_pretrained(checkpoint)
    small = QuantizedAgeVlm.quantize(plain, weights=qint8, include="model.language_model.layers.*")
    small.save_pretrained(tmp_path / "quanto")
    check_equal(QuantizedAgeVlm.from_pretrained(tmp_path / "quanto")._wrapped, load_quantized(checkpoint, QUANTO))


@pytest.mark.parametrize("settings", [NF4, INT8, TORCHAO], ids=["4bit", "8bit", "torchao"])
def test_commands_take_a_saved_quantized_model(tmp_path, settings, monkeypatch, capsys):
    tiny_trainable(llama=WIDE).save_pretrained(tmp_path / "plain")
    load_quantized(tmp_path / "plain", settings).save_pretrained(tmp_path / "small")
    tiny_processor().save_pretrained(tmp_path / "small")
    picture(np.random.default_rng(0), 40, 40)[0].save(tmp_path / "image.png")
    asked = ("--image", tmp_path / "image.png", "Is there a dog?", "--max-new-tokens", 3)
    code, printed = run(monkeypatch, capsys, "ask", "--model", tmp_path / "small", *asked)
    assert code == 0, printed
    assert "MatMul8bitLt" not in printed
    assert quantized(load_model(tmp_path / "small")[0])


# ---------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("name", "settings"), BACK_ENDS.items(), ids=BACK_ENDS)
def test_quantized_weights_do_not_train(tmp_path, name, settings):
    tiny_trainable(llama=WIDE).save_pretrained(tmp_path / "plain")
    model = load_quantized(tmp_path / "plain", settings)
    with pytest.raises(
        ValueError, match=r"'self_attention' has weights of 4 or 8 bits, which do not train: train LoRA"
    ):
        freeze(model, "full")
    freeze(model, "instruct")  # no weight of it is quantized
    method = {"torchao": "torchao", "quanto": "quanto"}.get(name, "bitsandbytes")
    for stage in ("full", "align", None):
        args = AgeVlmTrainingArguments(str(tmp_path / "out"), stage=stage, use_cpu=True, bf16=False, report_to="none")
        with pytest.raises(
            ValueError, match=rf"quantized \({method}\), and trains beside LoRA only: .*get_peft_model"
        ):
            AgeVlmTrainer(model=model, args=args, train_dataset=dataset(4), processing_class=tiny_processor())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [TORCHAO, QUANTO], ids=["torchao", "quanto"])
def test_lora_beside_8_bit_weights_gets_the_gradients_of_the_stored_values(checkpoint, model, settings):
    found = load_quantized(checkpoint, settings)
    gradients = []
    for base in (dequantized(found, model), found):
        lora = LoraConfig(
            r=4, target_modules=LORA_TARGET_MODULES, modules_to_save=lora_modules_to_save(base.config),
            init_lora_weights=False,
        )  # fmt: skip
        torch.manual_seed(0)
        peft = get_peft_model(base, lora).train()
        given = inputs()
        peft(**given, labels=given["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in peft.named_parameters() if p.requires_grad})
    expected, got = gradients
    assert expected.keys() == got.keys()
    assert any("lora_A" in name for name in got)
    assert any("cross_attn" in name for name in got)
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert (got[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


# ---------------------------------------------------------------------------------------- types and other back-ends


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_left_out_has_the_type_that_is_asked_for(checkpoint, dtype):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    small = load_quantized(checkpoint, {**NF4, "bnb_4bit_compute_dtype": dtype}, dtype=dtype)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype, torch.uint8}
    with torch.no_grad():
        assert small(**inputs()).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_layers_of_blocks_and_adapter_may_be_quantized(dtype):
    """Nothing takes the type of a linear layer's weight for that of its inputs, or gives it a vector."""
    found, expected = wide_model().to(dtype), wide_model().to(dtype)
    for name, module in list(found.named_modules()):
        if type(module) is nn.Linear and ("projector" in name or "cross_attn" in name):
            small = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, quant_type="nf4"
            )
            small.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            small.bias = module.bias
            found.set_submodule(name, small.to("cpu"))
            state = small.weight.quant_state
            expected.get_submodule(name).weight.data = bnb.functional.dequantize_4bit(small.weight.data, state).to(
                dtype
            )
    assert len(quantized(found)) == 2 + 4 * 4
    with torch.no_grad():
        got, reference = found(**inputs()).logits, expected(**inputs()).logits
    assert (got - reference).norm() / reference.norm() < (0.2 if dtype == torch.bfloat16 else 1e-4)


def test_a_float32_model_with_blocks_in_bfloat16_runs(model):
    """As GRPO trains the copies beside LoRA in 4 bits: in bfloat16."""
    mixed = wide_model()
    mixed.model.language_model.cross_attn.to(torch.bfloat16)
    mixed.model.multi_modal_projector.to(torch.bfloat16)
    with torch.no_grad():
        got, expected = mixed(**inputs()).logits, model(**inputs()).logits
    assert got.dtype == torch.float32
    assert 0 < (got - expected).norm() / expected.norm() < 0.1


SKELETONS = ["bitnet", "fp8"]  # they replace modules without a library of their own


@pytest.mark.parametrize("skip", [None, WRITTEN], ids=["none", "written"])
@pytest.mark.parametrize("method", SKELETONS)
def test_other_back_ends_replace_the_same_layers(method, skip):
    config = AUTO_QUANTIZATION_CONFIG_MAPPING[method](modules_to_not_convert=skip)
    with torch.device("meta"):
        model = AgeVlmForConditionalGeneration(wide_model().config)
    before = {name: type(module) for name, module in model.named_modules()}
    AUTO_QUANTIZER_MAPPING[method](config)._process_model_before_weight_loading(model)
    changed = {name for name, module in model.named_modules() if type(module) is not before[name]}
    assert changed == llama_layers(model)


@pytest.mark.parametrize("skip", [None, WRITTEN], ids=["none", "written"])
@pytest.mark.parametrize("method", ["eetq", "higgs", "compressed-tensors", "spqr", "vptq", "fbgemm_fp8"])
def test_back_ends_that_are_not_installed_are_asked_the_same(model, method, skip):
    """All of them convert the linear layers that Transformers' own rule leaves."""
    quantizer = AUTO_QUANTIZER_MAPPING[method]
    left_out = quantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name in linear if should_convert_module(name, left_out)} == llama_layers(model)
