# SPDX-License-Identifier: Apache-2.0
"""Transformers' common tests of models and configurations, and the parts of a default AGE-VLM."""

import copy
import re
import unittest
from unittest.mock import patch

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import (
    ConvNextConfig,
    ConvNextV2Config,
    DINOv3ConvNextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TimmWrapperConfig,
)
from transformers import initialization as init
from transformers.models.auto import modeling_auto
from transformers_tests import load

from agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration, AgeVlmModel, AgeVlmPreTrainedModel, AgeVlmTextConfig
from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmCrossAttention

common = load("test_modeling_common")
TensorParallelTesterMixin = load("test_tensor_parallel_mixin").TensorParallelTesterMixin
TrainingTesterMixin = load("test_training_mixin").TrainingTesterMixin
# It loads Transformers once more from a file that the source distribution lacks, and does not use it.
with patch("transformers.utils.direct_transformers_import"):
    ConfigTester = load("test_configuration_common").ConfigTester

IMAGE = 21  # neither in the pattern of the training test (1 to 19) nor cut off when embeddings shrink
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "cross_attention_layers": [0, 2],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # at the usual 0.02 an image moves the outputs of so small a model by 1e-5
}
CONVNEXT = ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1])
TIMM_CONVNEXT = TimmWrapperConfig(architecture="test_convnext", do_pooling=False)


def tiny_config(vision_config, **text_config):
    return AgeVlmConfig(
        text_config={**TEXT, **text_config}, vision_config=copy.deepcopy(vision_config), image_token_id=IMAGE
    )


class AgeVlmModelTester:
    causal_lm_class = AgeVlmForConditionalGeneration
    is_training = True
    batch_size = 7  # to which some tests extend smaller ones, without images for the new rows
    seq_length = 7
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4

    def __init__(self, vision_config, cross_attention_sink):
        self.vision_config = vision_config
        self.cross_attention_sink = cross_attention_sink

    def get_config(self):
        return tiny_config(self.vision_config, cross_attention_sink=self.cross_attention_sink)

    def prepare_config_and_inputs_for_common(self):
        input_ids = common.ids_tensor((self.batch_size, self.seq_length), TEXT["vocab_size"])
        input_ids[:, 1] = IMAGE
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": common.floats_tensor((self.batch_size, 3, 64, 64)),
        }
        return self.get_config(), inputs


class AgeVlmModelTest(common.ModelTesterMixin, TensorParallelTesterMixin, TrainingTesterMixin, unittest.TestCase):
    """With a ConvNext of Transformers' own.

    Besides the exclusions below, tests skip themselves where something is missing: an accelerator, FlashAttention,
    DeepSpeed, the kernels library, or, in the model, experts, encoder and decoder, sliding windows, position
    embeddings, modules kept in float32, checkpoint conversions, a vision tower with attention.
    `TensorParallelTesterMixin` runs its distributed tests for a few listed models only. `FSDPTesterMixin`,
    `PipelineTesterMixin` and `GenerationTesterMixin` are not in the source distribution, or not complete there.
    """

    all_model_classes = (AgeVlmModel, AgeVlmForConditionalGeneration)
    additional_model_inputs = ["pixel_values"]
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # for it reads the year in a copyright line
    vision_config = CONVNEXT
    cross_attention_sink = False
    num_vision_hidden_states = 5

    # It looks for a name of the width that configurations of convolutional towers lack; see `test_visual_tokens`.
    skip_test_image_features_output_shape = True

    @unittest.skip("A convolutional tower has no attentions.")
    def test_get_image_features_attentions(self):
        pass

    @unittest.skip("The list leaves modules out of quantization; its float32 is undone in `_get_dtype_plan`.")
    def test_keep_in_fp32_modules(self):
        pass

    @unittest.skip("GenerationTesterMixin is not in the source distribution; see test_generation_agevlm.py instead.")
    def test_generation_tester_mixin_inheritance(self):
        pass

    def setUp(self):
        self.model_tester = AgeVlmModelTester(self.vision_config, self.cross_attention_sink)

        # Many tests leave out, or take for another kind, what these tables do not name.
        for names, model_class in [
            (modeling_auto.MODEL_MAPPING_NAMES, AgeVlmModel),
            (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AgeVlmForConditionalGeneration),
        ]:
            if "agevlm" not in names:  # where the model is in Transformers' own tree, it is registered
                self.enterContext(patch.dict(names, agevlm=model_class.__name__))

        # Closed gates would let no image through, and so test little.
        original_init = AgeVlmPreTrainedModel._init_weights

        def init_weights(self, module):
            original_init(self, module)
            if isinstance(module, AgeVlmCrossAttention):
                init.ones_(module.gate)

        self.enterContext(patch.object(AgeVlmPreTrainedModel, "_init_weights", init_weights))

        # An image token that comes by chance has no image.
        original_ids = common.ids_tensor

        def ids_tensor(*args, **kwargs):
            ids = original_ids(*args, **kwargs)
            return ids.masked_fill(ids == IMAGE, IMAGE + 1)

        self.enterContext(patch.object(common, "ids_tensor", ids_tensor))

    def _image_features_get_expected_num_hidden_states(self, model_tester=None):
        return self.num_vision_hidden_states

    def test_config(self):
        tester = ConfigTester(
            self, AgeVlmConfig, has_text_modality=False, common_properties=["image_token_id", "projector_hidden_act"]
        )
        tester.run_common_tests()

    def test_training_overfit(self):
        # The original asks the outer configuration for the size of the vocabulary.
        with patch.object(AgeVlmConfig, "vocab_size", TEXT["vocab_size"], create=True):
            super().test_training_overfit()

    @torch.no_grad()
    def test_images_matter(self):
        """Else the tests above would hardly test them."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = AgeVlmModel(config).eval()
        outputs = model(**inputs).last_hidden_state
        swapped = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).last_hidden_state
        changes = (outputs - swapped).abs().amax(-1)
        assert (changes[:, 0] == 0).all()  # before the image
        middle = self.model_tester.batch_size // 2  # which keeps its own image
        assert (changes[middle] < 1e-5).all()
        assert (changes[torch.arange(len(changes)) != middle, 1:] > 0.05).all()

    def test_all_parameters_have_gradients(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = AgeVlmForConditionalGeneration(config)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


class AgeVlmTimmModelTest(AgeVlmModelTest):
    """With a ConvNeXt of timm's, and attention sinks in the blocks."""

    vision_config = TIMM_CONVNEXT
    cross_attention_sink = True
    num_vision_hidden_states = 4


class AgeVlmTextConfigTest(unittest.TestCase):
    def test_config(self):
        ConfigTester(self, AgeVlmTextConfig, **TEXT).run_common_tests()


@pytest.mark.parametrize("vision_config", [CONVNEXT, TIMM_CONVNEXT], ids=["convnext", "timm"])
def test_training_reads_the_image(vision_config):
    """Two rows that differ in nothing but the image and the answer, learned from shut gates on."""
    torch.manual_seed(0)
    model = AgeVlmForConditionalGeneration(tiny_config(vision_config)).train()
    assert all(module.gate == 0 for module in model.modules() if isinstance(module, AgeVlmCrossAttention))
    inputs = {
        "input_ids": torch.tensor([[1, IMAGE, 3, 4, 5], [1, IMAGE, 3, 4, 6]]),
        "labels": torch.tensor([[-100] * 4 + [5], [-100] * 4 + [6]]),
        "pixel_values": torch.randn(2, 3, 64, 64),
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1  # the best guess without the image gives log(2) = 0.69


@pytest.fixture(scope="module")
def default_model():
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        return AgeVlmForConditionalGeneration(AgeVlmConfig())


def test_default_blocks_stand_where_the_paper_puts_them(default_model):
    config = default_model.config.text_config
    text_model = default_model.model.language_model
    assert config.cross_attention_layers == [2, 7, 12, 17]
    assert len(text_model.layers) == 16
    assert list(text_model.cross_attn) == ["2", "6", "10", "14"]
    blocks = [["block"] if str(i) in text_model.cross_attn else [] for i in range(16)]
    merged = [name for block in blocks for name in (*block, "layer")]
    assert [i for i, name in enumerate(merged) if name == "block"] == [2, 7, 12, 17]


def test_default_size_is_that_of_llama_and_four_blocks(default_model):
    config = default_model.config.text_config
    values = {name: value for name, value in config.to_dict().items() if name in LlamaConfig().to_dict()}
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        llama = LlamaForCausalLM(LlamaConfig(**{**values, "model_type": "llama"}))
    text_model = default_model.model.language_model
    added = count(text_model.cross_attn)

    width, head_dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    block = 2 * width * queries + 2 * width * keys + width + 2 * head_dim + 1  # q and o, k and v, three norms, gate
    assert added == 4 * block == 41_951_748
    assert default_model.lm_head.weight is text_model.embed_tokens.weight
    assert count(text_model) - added == count(llama) == 1_235_814_400


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_default_tokens(default_model):
    features = default_model.get_image_features(torch.empty(1, 3, 768, 768, device="meta"))
    assert features.grid == (24, 24)
    assert features.last_hidden_state.shape == (1, 576, 1536)
    assert features.pooler_output.shape == (1, 576, 2048)


# timm's names of a ConvNeXt's weights, and Transformers'.
CONVNEXT_NAMES = [
    (r"^head\.norm\.", "layernorm."),
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"^stages\.(\d+)\.", r"encoder.stages.\1."),
    (r"\.downsample\.", ".downsampling_layer."),
    (r"\.blocks\.", ".layers."),
    (r"\.gamma$", ".layer_scale_parameter"),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.norm\.", ".layernorm."),
    (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
    (r"\.mlp\.grn\.", ".grn."),
]


def to_transformers(state_dict):
    names = {}
    for name in state_dict:
        names[name] = name
        for pattern, replacement in CONVNEXT_NAMES:
            names[name] = re.sub(pattern, replacement, names[name])
    return {names[name]: value for name, value in state_dict.items()}


@pytest.mark.parametrize(
    ("architecture", "config_class"), [("convnext_tiny", ConvNextConfig), ("convnextv2_tiny", ConvNextV2Config)]
)
@torch.no_grad()
def test_visual_tokens(architecture, config_class):
    """timm's and Transformers' implementations give the same tokens with the same weights."""
    torch.manual_seed(0)
    depths, widths = (2, 1, 2, 1), (8, 16, 24, 32)
    timm_config = TimmWrapperConfig(
        architecture=architecture, model_args={"depths": depths, "dims": widths}, do_pooling=False
    )
    a = AgeVlmModel(tiny_config(timm_config)).eval()
    b = AgeVlmModel(tiny_config(config_class(depths=list(depths), hidden_sizes=list(widths)))).eval()
    for parameter in a.vision_tower.parameters():
        parameter.uniform_(-0.5, 0.5)  # initial layer scale and response normalization would hide what they scale
    weights = to_transformers(a.vision_tower.timm_model.state_dict())
    targets = b.vision_tower.state_dict()
    assert weights.keys() == targets.keys()
    b.vision_tower.load_state_dict({name: weights[name].view_as(target) for name, target in targets.items()})
    b.multi_modal_projector.load_state_dict(a.multi_modal_projector.state_dict())

    pixel_values = torch.randn(2, 3, 64, 128)
    a, b = a.get_image_features(pixel_values), b.get_image_features(pixel_values)
    assert a.grid == b.grid == (2, 4)
    assert a.last_hidden_state.shape == (2, 8, 32)
    assert a.last_hidden_state.std() > 0.01
    torch.testing.assert_close(a.last_hidden_state, b.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a.pooler_output, b.pooler_output, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_visual_tokens_without_class_token():
    vision_config = DINOv3ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16])
    model = AgeVlmModel(tiny_config(vision_config)).eval()
    pixel_values = torch.randn(2, 3, 64, 128)
    tower = model.vision_tower(pixel_values)
    features = model.get_image_features(pixel_values)
    assert tower.last_hidden_state.shape == (2, 1 + 8, 16)
    assert features.grid == (2, 4)
    assert torch.equal(features.last_hidden_state, tower.last_hidden_state[:, 1:])
    assert not torch.allclose(features.last_hidden_state[:, 0], tower.pooler_output)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([2, 7, 12, 20], r"\[2, 7, 12, 20\].*0\.\.19"),
        ([2, 7, 12, 19], r"\[2, 7, 12, 19\].*Llama layer after it"),
        ([-1, 7], r"\[-1, 7\].*0\.\.17"),
        ([7, 2], r"\[7, 2\].*increasing"),
        ([2, 2], r"\[2, 2\].*without repeats"),
        ([2, 3], r"\[2, 3\].*two blocks before one Llama layer"),
    ],
)
def test_invalid_cross_attention_layers(layers, message):
    with pytest.raises(StrictDataclassClassValidationError, match=rf"(?s)cross_attention_layers={message}"):
        AgeVlmTextConfig(cross_attention_layers=layers)
    with pytest.raises(StrictDataclassClassValidationError, match=rf"(?s)cross_attention_layers={message}"):
        AgeVlmConfig(text_config={"cross_attention_layers": layers})


@pytest.mark.parametrize("image_token_id", [-1, 99])
def test_invalid_image_token(image_token_id):
    with pytest.raises(
        StrictDataclassClassValidationError, match=f"image_token_id={image_token_id} is outside the vocabulary of 99"
    ):
        AgeVlmConfig(text_config=dict(TEXT), vision_config=CONVNEXT, image_token_id=image_token_id)
