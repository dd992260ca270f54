# SPDX-License-Identifier: Apache-2.0
"""Quantized models: only the Llama's layers are quantized, whatever the back-end and the user's list, and images are read."""

import bitsandbytes as bnb
import pytest
import torch
from tiny_models import batch, tiny_age_vlm
from tiny_quantized import INT8, NF4, WIDE, dequantized, load_quantized, quantized
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizers_utils import should_convert_module

from agevlm import AgeVlmForConditionalGeneration, AgeVlmModel, AgeVlmTextModel

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


@pytest.mark.parametrize("settings", [NF4, INT8], ids=["4bit", "8bit"])
@pytest.mark.parametrize("skip", [None, WRITTEN, ["lm_head"]], ids=["none", "written", "lm_head"])
def test_only_the_llamas_layers_are_quantized(checkpoint, settings, skip):
    model = load_quantized(checkpoint, {**settings, "llm_int8_skip_modules": skip})
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


def test_an_8_bit_model_answers_like_the_model(checkpoint, model):
    found, given = load_quantized(checkpoint, INT8), inputs()
    with torch.no_grad():
        got, expected = found(**given).logits, model(**given).logits
        other = found(**{**given, "pixel_values": given["pixel_values"].flip(0)}).logits
    error = (got - expected).norm() / expected.norm()
    assert error < 0.1
    assert (other - got)[1:].norm() / expected.norm() > 2 * error, "other images, other answers"
    assert found.generate(**given, max_new_tokens=3).shape[1] == given["input_ids"].shape[1] + 3


@pytest.mark.parametrize("settings", [NF4, INT8], ids=["4bit", "8bit"])
def test_a_quantized_model_is_saved_and_loaded(checkpoint, tmp_path, settings):
    model = load_quantized(checkpoint, settings).train()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).train()
    assert quantized(again) == quantized(model)
    torch.testing.assert_close(again(**inputs()).logits, model(**inputs()).logits)


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
@pytest.mark.parametrize(
    "method", ["quanto", "torchao", "eetq", "higgs", "compressed-tensors", "spqr", "vptq", "fbgemm_fp8"]
)
def test_back_ends_that_are_not_installed_are_asked_the_same(model, method, skip):
    """All of them convert the linear layers that Transformers' own rule leaves."""
    quantizer = AUTO_QUANTIZER_MAPPING[method]
    left_out = quantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name in linear if should_convert_module(name, left_out)} == llama_layers(model)
