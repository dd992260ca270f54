import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import segment_anything
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from PIL import Image
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from agevlm.data.masks import add_masks
from agevlm.data.teachers import (
    GrabCutTeacher,
    GroundedSamTeacher,
    Prompt,
    Sam3Teacher,
    SamTeacher,
    load_sam,
    load_teacher,
)
from agevlm.plots import draw_masks
from agevlm.processing.rows import mask_from_rle, mask_to_rle, row_features
from research.mask_quality import boxes_from_masks, mask_quality

SIDE = 64  # of the tiny SAM's square input, in pixels
SIZES = [(90, 50), (40, 120), (64, 64)]  # of the images: width, height


def build_tiny_sam(width: int = 32) -> Sam:
    """A SAM with all the parts of the official ones; one block has windows (of 3 x 3, so padded), one looks everywhere."""
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=SIDE,
            patch_size=8,
            embed_dim=width,
            depth=2,
            num_heads=2,
            out_chans=32,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=32, image_embedding_size=(8, 8), input_image_size=(SIDE, SIDE), mask_in_chans=16
        ),
        mask_decoder=MaskDecoder(
            transformer=TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=64, num_heads=2),
            transformer_dim=32,
            iou_head_hidden_dim=32,
        ),
    )


def randomize(module: nn.Module, seed: int, scale: float) -> nn.Module:
    """Random values for every parameter and buffer, for some start as zeros and would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    state_dict = module.state_dict()
    for tensor in state_dict.values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    module.load_state_dict(state_dict)
    return module.eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A `.pth` file like the official ones, of a tiny SAM whose masks depend on the box, and whose scores are below 1."""
    path = tmp_path_factory.mktemp("sam") / "sam_tiny.pth"
    sam = randomize(build_tiny_sam(), seed=6, scale=0.5)
    for parameter in sam.mask_decoder.iou_prediction_head.layers[-1].parameters():
        parameter.data *= 0.05
    torch.save(sam.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def tiny_sam_type(monkeypatch):
    """Stands beside the official types, which stay: finding the right one is part of loading."""
    monkeypatch.setitem(segment_anything.sam_model_registry, "tiny", build_tiny_sam)


def photograph(seed, size):
    """An image of a few smooth waves: JPEG-free and different everywhere."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(0, 0.3, (3, 3))]
    return Image.fromarray(np.uint8(np.stack(waves, -1) * 127 + 128))


# --- SAM against Transformers' SAM ---

SAM_TO_TRANSFORMERS = [
    ("image_encoder.blocks.", "vision_encoder.layers."),
    ("image_encoder.patch_embed.proj.", "vision_encoder.patch_embed.projection."),
    ("image_encoder.neck.0.", "vision_encoder.neck.conv1."),
    ("image_encoder.neck.1.", "vision_encoder.neck.layer_norm1."),
    ("image_encoder.neck.2.", "vision_encoder.neck.conv2."),
    ("image_encoder.neck.3.", "vision_encoder.neck.layer_norm2."),
    ("image_encoder.", "vision_encoder."),
    ("pe_layer.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    ("point_embeddings.", "point_embed."),
    ("mask_downscaling.0.", "mask_embed.conv1."),
    ("mask_downscaling.1.", "mask_embed.layer_norm1."),
    ("mask_downscaling.3.", "mask_embed.conv2."),
    ("mask_downscaling.4.", "mask_embed.layer_norm2."),
    ("mask_downscaling.6.", "mask_embed.conv3."),
    ("output_upscaling.0.", "upscale_conv1."),
    ("output_upscaling.1.", "upscale_layer_norm."),
    ("output_upscaling.3.", "upscale_conv2."),
    (".norm_final_attn.", ".layer_norm_final_attn."),
    *((f".norm{i}.", f".layer_norm{i}.") for i in range(1, 5)),
]


def to_transformers(state_dict):
    """The weights of a `segment_anything` SAM under the names of Transformers' `SamModel`."""
    renamed = {}
    for name, tensor in state_dict.items():
        for old, new in SAM_TO_TRANSFORMERS:
            name = name.replace(old, new)
        if "hypernetworks" in name or "iou_prediction_head" in name:  # three linear layers each
            for old, new in (("layers.0.", "proj_in."), ("layers.1.", "layers.0."), ("layers.2.", "proj_out.")):
                if old in name:
                    name = name.replace(old, new)
                    break
        renamed[name] = tensor
    renamed["shared_image_embedding.positional_embedding"] = renamed[
        "prompt_encoder.shared_embedding.positional_embedding"
    ]
    return renamed


@pytest.fixture(scope="module")
def reference(checkpoint):
    """Transformers' `SamModel` and `SamProcessor` with the tiny SAM's weights."""
    from transformers import SamConfig, SamModel, SamProcessor
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    config = SamConfig(
        vision_config={
            "hidden_size": 32,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
            "window_size": 3,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": SIDE, "patch_size": 8},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 32,
            "layer_norm_eps": 1e-5,
        },
    )
    model = SamModel(config).eval()
    missing = model.load_state_dict(to_transformers(torch.load(checkpoint)), strict=True)
    assert not missing.missing_keys
    # The official package scales images with Pillow too.
    processor = SamProcessor(
        SamImageProcessorPil(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})
    )
    return model, processor


BOXES = [[[5, 5, 60, 40], [30, 10, 90, 50]], [[0, 0, 40, 30], [3.5, 50, 30, 111.25], [2, 3, 9, 10]], [[8, 8, 50, 60]]]


def test_sam_gives_the_logits_and_masks_of_transformers_sam(checkpoint, reference):
    model, processor = reference
    teacher = SamTeacher(checkpoint)
    images = [photograph(i, size) for i, size in enumerate(SIZES)]
    embeddings = teacher.encode(images)
    answers = teacher.masks(images, [[Prompt("", tuple(box)) for box in boxes] for boxes in BOXES])
    varied = 0
    for image, boxes, embedding, image_answers in zip(images, BOXES, embeddings, answers, strict=True):
        inputs = processor(
            images=image, input_boxes=[[[float(side) for side in box] for box in boxes]], return_tensors="pt"
        )
        with torch.no_grad():
            outputs = model(
                pixel_values=inputs["pixel_values"],
                input_boxes=inputs["input_boxes"].float(),
                multimask_output=False,
            )
        expected = processor.post_process_masks(
            outputs.pred_masks,
            inputs["original_sizes"],
            inputs["reshaped_input_sizes"],
            binarize=False,
            pad_size={"height": SIDE, "width": SIDE},
        )[0][:, 0]
        logits, iou = teacher.decode(embedding, boxes)
        assert logits.shape == (len(boxes), image.height, image.width)
        scale = expected.abs().max()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * scale)
        moved, _ = teacher.decode(embedding, np.array(boxes) + 1)
        assert (moved - expected).abs().max() > 1e-3 * scale  # a box that is a pixel off would be seen
        torch.testing.assert_close(iou, outputs.iou_scores[0, :, 0], rtol=1e-4, atol=1e-4)
        for (mask, score), wanted, wanted_iou in zip(
            image_answers, expected, outputs.iou_scores[0, :, 0], strict=True
        ):
            clear = (wanted.abs() > 1e-4 * scale).numpy()
            assert mask.dtype == bool
            np.testing.assert_array_equal(mask[clear], (wanted > 0).numpy()[clear])
            assert score == pytest.approx(wanted_iou.item(), abs=1e-4)
            varied += mask.any() and not mask.all()
    assert varied == 6  # masks that are all one colour would prove little


def test_sam_encodes_each_image_once_and_decodes_many_boxes(checkpoint, monkeypatch):
    teacher = SamTeacher(checkpoint)
    batches = []
    forward = teacher.model.image_encoder.forward
    monkeypatch.setattr(
        teacher.model.image_encoder, "forward", lambda x: batches.append(len(x)) or forward(x), raising=True
    )
    images = [photograph(i, size) for i, size in enumerate(SIZES)]
    boxes = [(float(i), 2.0, 30.0 + i, 40.0) for i in range(35)]  # more than go through the decoder together
    many = teacher.masks(images, [[Prompt("", box) for box in boxes], [], [Prompt("", boxes[0])]])
    assert batches == [2]  # one batch, and not the image without prompts
    assert [len(answers) for answers in many] == [35, 0, 1]
    alone = teacher.masks(images[:1], [[Prompt("", boxes[20])]])[0][0]
    assert alone[1] == pytest.approx(many[0][20][1], abs=1e-5)
    assert np.mean(alone[0] != many[0][20][0]) < 1e-3


def test_sam_in_bfloat16_is_near_float32(checkpoint):
    image, prompts = photograph(0, SIZES[0]), [[Prompt("", tuple(box)) for box in BOXES[0]]]
    exact, rough = (
        SamTeacher(checkpoint, dtype=t).masks([image], prompts)[0] for t in (torch.float32, torch.bfloat16)
    )
    for (mask, score), (rough_mask, rough_score) in zip(exact, rough, strict=True):
        assert np.mean(mask != rough_mask) < 0.05
        assert rough_score == pytest.approx(score, abs=0.1)


def test_official_types_load(tmp_path, monkeypatch):
    """The official registry's own builder and weights: `vit_b`, here with fewer blocks, is found among all the types."""
    build = partial(sys.modules["segment_anything.build_sam"]._build_sam, 48, 1, 4, [0])
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", build)
    torch.save(build().half().state_dict(), tmp_path / "sam.pth")
    model = load_sam(tmp_path / "sam.pth")
    assert model.image_encoder.img_size == 1024
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_checkpoints_that_are_none(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="no SAM checkpoint"):
        load_sam(tmp_path / "missing.pth")
    torch.save({"image_encoder.pos_embed": Attack(tmp_path / "harm")}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="pickled code"):
        load_sam(tmp_path / "code.pth")
    assert not (tmp_path / "harm").exists()
    torch.save(build_tiny_sam(width=64).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not those of a SAM of the types vit_h"):
        load_sam(tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a file of PyTorch weights"):
        load_sam(tmp_path / "cut.pth")


# --- SAM 3 and the detectors against Transformers ---


@pytest.fixture(scope="module")
def sam3(tmp_path_factory):
    """A folder with a tiny SAM 3 of random weights, as `save_pretrained` writes it."""
    from tiny import tiny_tokenizer
    from transformers import Sam3Config, Sam3ImageProcessor, Sam3Model, Sam3Processor

    folder = tmp_path_factory.mktemp("sam3")
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    backbone = {
        **small,
        "model_type": "sam3_vit_model",
        "num_hidden_layers": 2,
        "image_size": 56,
        "window_size": 2,
        "global_attn_indexes": [1],
        "pretrain_image_size": 28,
    }
    text = {
        **small,
        "model_type": "clip_text_model",
        "vocab_size": 500,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 32,
        "bos_token_id": 393,
        "eos_token_id": 395,
    }
    config = Sam3Config(
        vision_config={
            "backbone_config": backbone,
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config=text,
        geometry_encoder_config={**small, "num_layers": 1},
        detr_encoder_config={**small, "num_layers": 1},
        detr_decoder_config={**small, "num_layers": 2, "num_queries": 6},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    randomize(Sam3Model(config), seed=1, scale=0.15).save_pretrained(folder)
    image_processor = Sam3ImageProcessor(size={"height": 56, "width": 56})
    Sam3Processor(image_processor, tiny_tokenizer(padding_side="right")).save_pretrained(folder)
    return folder


def middle(scores):
    """A threshold in the widest gap between scores, so that rounding does not decide which are above it."""
    ordered = np.sort(np.concatenate([np.ravel(s) for s in scores]))
    widest = np.diff(ordered).argmax()
    return float(ordered[widest : widest + 2].mean())


def test_sam3_gives_what_transformers_gives(sam3):
    from transformers import Sam3Model, Sam3Processor

    model, processor = Sam3Model.from_pretrained(sam3).eval(), Sam3Processor.from_pretrained(sam3)
    images = [photograph(i, size) for i, size in enumerate(SIZES)]
    phrases = [["dog", "a white cat"], ["the red sofa"], ["cat", "dog", "brown"]]

    def direct(image, phrase, threshold):
        inputs = processor(images=image, text=phrase, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**{key: inputs[key] for key in ("pixel_values", "input_ids", "attention_mask")})
        return processor.post_process_instance_segmentation(
            outputs, threshold=threshold, target_sizes=[(image.height, image.width)]
        )[0]

    threshold = middle(
        [direct(image, p, 0.0)["scores"].numpy() for image, ps in zip(images, phrases, strict=True) for p in ps]
    )
    teacher = Sam3Teacher(sam3, threshold=threshold)
    answers = teacher.masks(images, [[Prompt(phrase) for phrase in some] for some in phrases])
    counts = []
    for image, some, image_answers in zip(images, phrases, answers, strict=True):
        for phrase, (mask, score) in zip(some, image_answers, strict=True):
            expected = direct(image, phrase, threshold)
            counts.append(len(expected["scores"]))
            if not counts[-1]:
                assert (mask, score) == (None, 0.0)
                continue
            assert mask.shape == (image.height, image.width)
            assert np.mean(mask != expected["masks"].numpy().any(0)) < 1e-3
            assert score == pytest.approx(expected["scores"].max().item(), abs=1e-5)
    assert max(counts) > 1  # a union
    assert Sam3Teacher(sam3, threshold=0.999).masks(images[:1], [[Prompt("dog")]]) == [[(None, 0.0)]]


def test_sam3_cuts_phrases_that_are_too_long(sam3):
    mask, _ = Sam3Teacher(sam3, threshold=0.0).masks([photograph(0, (30, 20))], [[Prompt("a red sofa " * 40)]])[0][0]
    assert mask.shape == (20, 30)


def bert_tokenizer():
    """Whole words, with the special tokens where BERT has them: Grounding DINO knows these numbers."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}
    words |= dict(enumerate(["[PAD]", "[UNK]", "dog", "a", "white", "cat", "the", "red", "sofa"]))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in words.items()}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def build_grounding_dino(folder, kind):
    import transformers
    from transformers import BertConfig, GroundingDinoImageProcessor, GroundingDinoProcessor, SwinConfig

    config = getattr(transformers, f"{kind}Config")(
        backbone_config=SwinConfig(
            embed_dim=16,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 1, 1],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=1100,
            max_position_embeddings=64,
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=6,
        max_text_len=64,
        disable_custom_kernels=True,
    )
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForObjectDetection")(config).save_pretrained(folder)
    image_processor = GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})
    GroundingDinoProcessor(image_processor, bert_tokenizer()).save_pretrained(folder)


def build_owl(folder):
    from tiny import tiny_tokenizer
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config={**small, "vocab_size": 500, "max_position_embeddings": 16},
        vision_config={**small, "image_size": 48, "patch_size": 16},
        projection_dim=32,
    )
    randomize(Owlv2ForObjectDetection(config), seed=0, scale=0.2).save_pretrained(folder)
    image_processor = Owlv2ImageProcessor(size={"height": 48, "width": 48})
    tokenizer = tiny_tokenizer(padding_side="right", model_max_length=16)
    Owlv2Processor(image_processor, tokenizer).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["GroundingDino", "MMGroundingDino", "Owlv2"])
def test_detectors_give_the_boxes_transformers_gives(kind, checkpoint, tmp_path):
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    build_owl(tmp_path) if kind == "Owlv2" else build_grounding_dino(tmp_path, kind)
    detector = AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    phrases = ["dog", "a white cat", "the red sofa"]

    def direct(image, phrase, threshold):
        inputs = processor(images=image, text=[[phrase]], return_tensors="pt")
        with torch.no_grad():
            outputs = detector(**inputs)
        return processor.post_process_grounded_object_detection(
            outputs, threshold=threshold, target_sizes=[(image.height, image.width)]
        )[0]

    images = [photograph(i, size) for i, size in enumerate(SIZES)]
    threshold = middle([direct(image, p, 0.0)["scores"].numpy() for image in images for p in phrases])
    teacher = GroundedSamTeacher(SamTeacher(checkpoint), tmp_path, threshold=threshold)
    answers = teacher.masks(images, [[Prompt(phrase) for phrase in phrases]] * 3)
    counts = []
    for image, image_answers in zip(images, answers, strict=True):
        limit = np.tile([image.width, image.height], 2)
        for phrase, (boxes, scores), (mask, score) in zip(
            phrases, teacher.detect(image, phrases), image_answers, strict=True
        ):
            expected = direct(image, phrase, threshold)
            wanted = np.clip(expected["boxes"].numpy(), 0, limit)
            inside = (wanted[:, 2:] > wanted[:, :2]).all(-1)
            np.testing.assert_allclose(np.reshape(boxes, (-1, 4)), wanted[inside], atol=1e-3)
            np.testing.assert_allclose(scores, expected["scores"].numpy()[inside], atol=1e-5)
            counts.append(len(boxes))
            # And SAM masks exactly these boxes.
            by_box = teacher.sam.masks([image], [[Prompt("", tuple(box)) for box in boxes]])[0]
            if by_box:
                assert np.mean(mask != np.any([m for m, _ in by_box], axis=0)) < 1e-3
                best = max(iou * s for (_, iou), s in zip(by_box, scores, strict=True))
                assert score == pytest.approx(best, abs=1e-4)
            else:
                assert (mask, score) == (None, 0.0)
    assert sum(counts)
    assert teacher.detect(images[0], ["Mr. red. sofa " * 40])  # full stops, and longer than its text encoder


def test_grounded_sam_joins_the_boxes_of_a_phrase():
    """Which answer of SAM belongs to which phrase, with a detector and a SAM that are made up."""

    class Sam:
        def masks(self, images, prompts):
            self.seen = [[p.box for p in image_prompts] for image_prompts in prompts]
            return [
                [(filled(image, p.box), p.box[0] / 10) for p in ps] for image, ps in zip(images, prompts, strict=True)
            ]

    teacher = GroundedSamTeacher.__new__(GroundedSamTeacher)
    teacher.sam = Sam()
    found = {"dogs": ([[1, 0, 3, 2], [8, 5, 9, 9]], [0.9, 0.5]), "cat": ([], []), "car": ([[4, 4, 6, 6]], [0.7])}
    teacher.detect = lambda image, phrases: [found[phrase] for phrase in phrases]
    image = Image.new("RGB", (12, 10))
    own = Prompt("boxed", (5, 1, 7, 3))
    answers = teacher.masks([image, image], [[Prompt("dogs"), Prompt("cat"), own, Prompt("car")], [Prompt("cat")]])
    assert teacher.sam.seen == [[(1, 0, 3, 2), (8, 5, 9, 9), (5, 1, 7, 3), (4, 4, 6, 6)], []]
    (dogs, cat, boxed, car), second = answers
    np.testing.assert_array_equal(dogs[0], filled(image, (1, 0, 3, 2)) | filled(image, (8, 5, 9, 9)))
    assert dogs[1] == pytest.approx(0.8 * 0.5)  # the better of 0.1 * 0.9 and 0.8 * 0.5
    assert cat == (None, 0.0)
    assert second == [(None, 0.0)]
    np.testing.assert_array_equal(boxed[0], filled(image, (5, 1, 7, 3)))
    assert boxed[1] == pytest.approx(0.5)  # no detection to doubt
    assert car[1] == pytest.approx(0.4 * 0.7)


def test_teachers_that_are_none(checkpoint, sam3, tmp_path):
    for arguments, message in (
        ({"name": "sam2"}, "there is no mask teacher 'sam2'; there are sam, sam3, grounded-sam"),
        ({"name": "grounded-sam"}, "a detector goes with grounded-sam"),
        ({"name": "sam", "detector": "x"}, "a detector goes with grounded-sam"),
        ({"name": "sam", "threshold": 0.5}, "refuse bad masks with min_score"),
        ({"name": "sam", "device": "tpu"}, "auto, cpu or cuda"),
        ({"name": "grounded-sam", "detector": sam3}, "is a sam3, but the detector must be one of grounding-dino"),
    ):
        with pytest.raises(ValueError, match=message):
            load_teacher(checkpoint=checkpoint, **arguments)
    build_owl(tmp_path)
    with pytest.raises(ValueError, match="is a owlv2, not a sam3"):
        load_teacher("sam3", tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA GPU"):
            load_teacher("sam", checkpoint, device="cuda")


def test_missing_package(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(ImportError, match="pip install segment-anything"):
        load_sam(checkpoint)


# --- data sets ---


def filled(image, box):
    x0, y0, x1, y1 = (max(0, round(side)) for side in box)
    mask = np.zeros((image.height, image.width), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


class BoxTeacher:
    """The mask is the box, the score is in the phrase; "nothing" is not found, and "empty" gives no pixel."""

    settings = {"teacher": "box"}

    def __init__(self):
        self.calls = []

    def takes(self, prompt):
        return prompt.box is not None

    def masks(self, images, prompts):
        self.calls.append([[prompt.phrase for prompt in image_prompts] for image_prompts in prompts])
        return [[self.mask(image, p) for p in some] for image, some in zip(images, prompts, strict=True)]

    def mask(self, image, prompt):
        assert image.mode == "RGB"
        if prompt.phrase == "nothing":
            return None, 0.0
        if prompt.phrase == "empty":
            return np.zeros((image.height, image.width), dtype=bool), 0.9
        return filled(image, prompt.box), float(prompt.phrase)


def make_row(image, *entries, text="Look: "):
    """A row about one image, with a phrase for each of `entries`: `(phrase, box, mask)`."""
    grounding = []
    for phrase, box, mask in entries:
        start = len(text)
        text += phrase
        grounding.append(
            {"message": 0, "start": start, "end": len(text), "image": 0, "box": box, "mask": mask, "score": None}
        )
        text += ", "
    content = [{"type": "image", "text": None}, {"type": "text", "text": text}]
    return {"images": [image], "messages": [{"role": "user", "content": content}], "grounding": grounding}


def make_dataset(rows, **columns):
    """A data set as others would have saved it, with a column of their own."""
    features = row_features()
    for name, values in columns.items():
        features[name] = Dataset.from_dict({name: values}).features[name]
        rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
    return Dataset.from_list(rows, features=features)


def bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_masks_where_they_are_wanted_and_rows_as_they_were(tmp_path):
    first, second = photograph(0, (40, 30)), photograph(1, (20, 50))
    kept = mask_to_rle(filled(first, (0, 0, 5, 5)))
    rows = [
        make_row(first, ("0.9", [1, 2, 11, 12], None), ("has one", [1, 1, 2, 2], kept), ("0.9", [1, 2, 11, 12], None)),
        make_row(first, ("0.3", [1, 2, 11, 12], None), ("1.5", [-3, 2, 11, 12], None)),
        make_row(second, ("no box", None, None), ("nothing", [1, 2, 11, 12], None), ("empty", [1, 2, 9, 9], None)),
        make_row(second),
    ]
    dataset = make_dataset(rows, source=["a", "b", "c", "d"])
    teacher = BoxTeacher()
    output, outcomes = add_masks(dataset, teacher, tmp_path / "out", min_score=0.5, attribution="by", progress=False)
    assert outcomes == {"masked": 2 + 1, "kept": 1, "refused": 3, "not asked": 1}
    # one batch; an image that two rows share is one image, and a prompt that comes twice is asked once
    assert teacher.calls == [[["0.9", "0.3", "1.5"], ["nothing", "empty"]]]

    assert output.column_names == dataset.column_names
    assert output["source"] == dataset["source"]
    assert output["messages"] == dataset["messages"]
    assert (tmp_path / "out" / "ATTRIBUTION.md").read_text() == "by"
    for before, after in zip(dataset, output, strict=True):
        assert np.array_equal(before["images"][0], after["images"][0])
        for entry, wanted in zip(after["grounding"], before["grounding"], strict=True):
            assert {**entry, "mask": None, "score": None} == {**wanted, "mask": None, "score": None}
    grounding = output["grounding"]
    np.testing.assert_array_equal(mask_from_rle(grounding[0][0]["mask"]), filled(first, (1, 2, 11, 12)))
    assert grounding[0][0] | {"start": 0, "end": 0} == grounding[0][2] | {"start": 0, "end": 0}
    assert grounding[0][1]["mask"] == kept
    scores = [[entry["score"] for entry in entries] for entries in grounding]
    assert scores == [
        [pytest.approx(0.9), None, pytest.approx(0.9)],
        [pytest.approx(0.3), 1.0],
        [None, 0.0, pytest.approx(0.9)],
        [],
    ]
    found = [[entry["mask"] is not None for entry in entries] for entries in grounding]
    assert found == [[True, True, True], [False, True], [False, False, False], []]
    assert not (tmp_path / "out.partial").exists()

    again, outcomes = add_masks(output, BoxTeacher(), tmp_path / "again", progress=False)
    assert outcomes == {"kept": 4, "masked": 1, "refused": 2, "not asked": 1}
    assert again["grounding"][1][0]["mask"] is not None  # what was refused is asked again


def test_overwrite(tmp_path):
    image = photograph(0, (40, 30))
    old = mask_to_rle(filled(image, (0, 0, 5, 5)))
    dataset = make_dataset([make_row(image, ("0.9", [1, 2, 11, 12], old), ("no box", None, old))])
    output, outcomes = add_masks(dataset, BoxTeacher(), tmp_path / "out", overwrite=True, progress=False)
    assert outcomes == {"masked": 1, "not asked": 1}
    new, other = output["grounding"][0]
    np.testing.assert_array_equal(mask_from_rle(new["mask"]), filled(image, (1, 2, 11, 12)))
    assert other["mask"] == old


def test_splits_selections_and_rows_without_the_new_columns(tmp_path):
    """What people have: data set dictionaries, shuffled ones, formatted ones, grounding that never heard of masks."""
    rows = [make_row(photograph(i, (30 + i, 20)), ("0.5", [0, 0, 10 + i, 10], None)) for i in range(7)]
    for row in rows:
        for entry in row["grounding"]:
            del entry["mask"], entry["score"]
    for part in rows:
        part["images"] = [{"bytes": png(part["images"][0]), "path": None}]
    plain = Dataset.from_list(rows).cast_column("images", row_features()["images"])
    parts = DatasetDict(train=plain.shuffle(seed=0).with_format("numpy"), test=plain.select([4, 2]))
    output, outcomes = add_masks(parts, BoxTeacher(), tmp_path / "out", save_every=2, batch_size=1, progress=False)
    assert outcomes == {"masked": 9}
    assert {split: len(part) for split, part in output.items()} == {"train": 7, "test": 2}
    for split, part in output.items():
        for before, after in zip(parts[split].with_format(None), part, strict=True):
            assert np.array_equal(before["images"][0], after["images"][0])
            box = before["grounding"][0]["box"]
            mask = mask_from_rle(after["grounding"][0]["mask"])
            np.testing.assert_array_equal(mask, filled(after["images"][0], box))
    concatenated = concatenate_datasets([output["test"], output["test"]])
    assert add_masks(concatenated, BoxTeacher(), tmp_path / "next", progress=False)[1] == {"kept": 4}


def png(image):
    import io

    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_preference_data(tmp_path):
    row = make_row(photograph(0, (40, 30)), ("0.5", [0, 0, 10, 10], None))
    chosen = [{"role": "assistant", "content": [{"type": "text", "text": "It is 0.7."}]}]
    entry = row["grounding"][0] | {"message": 1, "start": 6, "end": 9}
    row = {"images": row["images"], "prompt": row["messages"], "chosen": chosen, "rejected": chosen}
    features = row_features()
    features |= dict.fromkeys(("prompt", "chosen", "rejected"), features["messages"])
    del features["messages"]
    dataset = Dataset.from_list([row | {"grounding": [entry]}], features=features)
    output, _ = add_masks(dataset, BoxTeacher(), tmp_path / "out", progress=False)
    assert output["grounding"][0][0]["score"] == pytest.approx(0.7)


def test_rows_that_are_wrong(tmp_path):
    good = photograph(0, (40, 30))
    broken = {"bytes": png(good)[:200], "path": None}
    box = [0, 0, 9, 9]
    folders = (tmp_path / str(i) / "out" for i in range(100))
    for row, message in (
        (make_row(broken, ("0.5", box, None)), "row 1, grounding entry 0: its image cannot be read"),
        (make_row(good, ("0.5", box, None), ("0.5", [5, 5, 5, 9], None)), r"row 1, grounding entry 1: its box is \[5"),
        (make_row(good, ("0.5", [0, 0, float("nan"), 9], None)), "its box is"),
        (make_row(good, ("0.5", [0, 0, 9], None)), "its box is"),
        (make_row(good, ("0.5", [50, 0, 60, 9], None)), "lies outside its image of 40 x 30"),
        (make_row(good, ("  ", box, None)), "are no phrase"),
    ):
        dataset = make_dataset([make_row(good, ("0.5", box, None)), row])
        with pytest.raises(ValueError, match=message):
            add_masks(dataset, BoxTeacher(), next(folders), progress=False)
    for change, message in (
        ({"end": 99}, "are no phrase"),
        ({"message": 3}, "is about message 3 of a row with 1 messages"),
        ({"image": 1}, "is about image 1 of a row with 1 images"),
    ):
        row = make_row(good, ("0.5", box, None))
        row["grounding"][0] |= change
        with pytest.raises(ValueError, match=message):
            add_masks(make_dataset([row]), BoxTeacher(), next(folders), progress=False)


def test_calls_that_are_wrong(tmp_path):
    dataset = make_dataset([make_row(photograph(0, (40, 30)), ("0.5", None, None))])
    with pytest.raises(ValueError, match=r"none of the 1 phrases without a mask has a box.*grounded-sam or sam3"):
        add_masks(dataset, BoxTeacher(), tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []  # nor unfinished work, which would be in another teacher's way
    with pytest.raises(ValueError, match="lacks the column"):
        add_masks(dataset.remove_columns("grounding"), BoxTeacher(), tmp_path / "out")
    for wrong in ({"batch_size": 0}, {"save_every": 0}, {"min_score": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .* but must be"):
            add_masks(dataset, BoxTeacher(), tmp_path / "out", **wrong)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(FileExistsError, match="already exists"):
        add_masks(dataset, BoxTeacher(), tmp_path / "out")


def test_other_settings_do_not_continue(tmp_path):
    rows = [make_row(photograph(i, (40, 30)), ("0.5", [0, 0, 10, 10], None)) for i in range(4)]
    dataset = make_dataset(rows)

    class Stops(BoxTeacher):
        def masks(self, images, prompts):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().masks(images, prompts)

    with pytest.raises(KeyboardInterrupt):
        add_masks(dataset, Stops(), tmp_path / "out", save_every=1, progress=False)
    assert len(list((tmp_path / "out.partial").glob("0*.arrow"))) == 2
    other = BoxTeacher()
    other.settings = {"teacher": "box", "weights": "other"}
    changed = make_dataset([*rows[:3], make_row(photograph(9, (40, 30)), ("0.5", [0, 0, 10, 10], None))])
    for data, teacher, options, named in (
        (dataset, other, {"save_every": 1}, "weights was None and is other"),
        (dataset, BoxTeacher(), {"save_every": 1, "min_score": 0.2}, "min_score was 0.0 and is 0.2"),
        (dataset, BoxTeacher(), {"save_every": 2}, "save_every was 1 and is 2"),
        (changed, BoxTeacher(), {"save_every": 1}, "dataset was"),
    ):
        with pytest.raises(FileExistsError, match=f"begun otherwise .*{named}.*delete"):
            add_masks(data, teacher, tmp_path / "out", progress=False, **options)
    teacher = BoxTeacher()
    add_masks(dataset, teacher, tmp_path / "out", save_every=1, batch_size=3, progress=False)
    assert len(teacher.calls) == 2  # the two that were missing


def test_weights_decide_whether_work_is_continued(checkpoint, tmp_path):
    """The fingerprint is of the weights, wherever they lie."""
    (tmp_path / "copy.pth").write_bytes(checkpoint.read_bytes())
    torch.save(randomize(build_tiny_sam(), seed=7, scale=0.5).state_dict(), tmp_path / "other.pth")
    same, moved, other = (SamTeacher(p).settings for p in (checkpoint, tmp_path / "copy.pth", tmp_path / "other.pth"))
    assert same == moved != other
    assert SamTeacher(checkpoint, dtype=torch.bfloat16).settings != same


# --- the command, killed and shared ---

COMMAND = """
import os, sys, time
sys.path.insert(0, {tests!r})
import segment_anything
from test_masks import build_tiny_sam
from agevlm.data.teachers import SamTeacher

segment_anything.sam_model_registry["tiny"] = build_tiny_sam
masks = SamTeacher.masks

def logged(self, images, prompts):
    time.sleep(float(os.environ.get("DELAY", 0)))
    with open({log!r}, "a") as log:
        log.write(f"{{os.environ.get('RANK', 0)}} {{len(images)}}\\n")
    return masks(self, images, prompts)

SamTeacher.masks = logged
from agevlm.cli import main

main()
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved data set of 13 rows with boxes, in two splits."""
    folder = tmp_path_factory.mktemp("data") / "rows"
    rows = [make_row(photograph(i, (30 + i, 40)), ("a dog", [2, 3, 20 + i, 30], None)) for i in range(13)]
    DatasetDict(train=make_dataset(rows[:9]), test=make_dataset(rows[9:])).save_to_disk(folder)
    (folder / "ATTRIBUTION.md").write_text("waves")
    return folder


@pytest.fixture
def command(saved, checkpoint, tmp_path):
    """The command line, with the tiny SAM among the types and a log of what the teacher is asked."""
    script, log = tmp_path / "command.py", tmp_path / "log"
    script.write_text(COMMAND.format(tests=str(Path(__file__).parent), log=str(log)))
    log.touch()
    options = ["--teacher", "sam", "--checkpoint", checkpoint, "--save-every", "2", "--batch-size", "1"]
    return [str(part) for part in (script, "masks", saved, *options, "--device", "cpu", "--out")], log


@pytest.fixture(scope="module")
def uninterrupted(saved, checkpoint, tmp_path_factory):
    """The files of what one process makes of it, undisturbed, in this process."""
    segment_anything.sam_model_registry["tiny"] = build_tiny_sam
    folder = tmp_path_factory.mktemp("whole") / "out"
    text = (saved / "ATTRIBUTION.md").read_text()
    teacher = load_teacher("sam", checkpoint, device="cpu")
    add_masks(load_from_disk(saved), teacher, folder, save_every=2, batch_size=1, attribution=text, progress=False)
    del segment_anything.sam_model_registry["tiny"]
    return bytes_of(folder)


def test_killed_and_run_again(command, uninterrupted, tmp_path):
    arguments, log = command
    out, work = tmp_path / "out", tmp_path / "out.partial"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments, str(out)], env=environment | {"DELAY": "0.4"}, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(done := list(work.glob("*/0*.arrow"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = list(work.glob("*/0*.arrow"))
    assert 3 <= len(done) < 7
    assert not out.exists()
    before = {path: path.stat().st_mtime_ns for path in done}
    (work / "train" / ".000000008.arrow.1").write_bytes(b"half a file")
    log.write_text("")

    result = subprocess.run(
        [sys.executable, *arguments, str(out)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    # Rows of the finished files are not asked again: each file has two rows, but for the last of `train`.
    rows = {path: 1 if path.parts[-2:] == ("train", "000000008.arrow") else 2 for path in before}
    assert len(log.read_text().splitlines()) == 13 - sum(rows.values())
    assert bytes_of(out) == uninterrupted
    assert not work.exists()
    printed = " ".join(result.stdout.split())
    assert "of 13 phrases 13 got a mask, 0 did not" in printed


def test_two_processes_give_what_one_gives(command, uninterrupted, tmp_path):
    arguments, log = command
    out = tmp_path / "out"
    # `accelerate launch` starts processes through torchrun, but on CPUs only one: so here torchrun itself.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    preview = ["--preview", str(tmp_path / "preview.png")]
    result = subprocess.run(
        [*launch, *arguments, str(out), *preview],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    asked = [int(line.split()[0]) for line in log.read_text().splitlines()]
    assert len(asked) == 13
    assert {asked.count(0), asked.count(1)} == {6, 7}
    assert bytes_of(out) == uninterrupted
    assert result.stdout.count("Saved") == 1
    assert Image.open(tmp_path / "preview.png").width > 800


def test_command_mistakes(saved, tmp_path):
    from typer.testing import CliRunner

    from agevlm.cli import app

    common = ["--teacher", "sam", "--checkpoint", "none.pth", "--out", str(tmp_path / "out")]
    for arguments, error, message in (
        ([str(saved), *common], FileNotFoundError, "no SAM checkpoint none.pth"),
        ([str(tmp_path), *common], FileNotFoundError, "is not a data set"),
        ([str(saved), *common, "--dtype", "int8"], ValueError, "--dtype must be"),
        ([str(saved), *common, "--preview", str(tmp_path / "no" / "p.png")], ValueError, "there is no folder"),
        ([str(saved), *common[2:], "--teacher", "dino"], ValueError, "no mask teacher 'dino'"),
    ):
        result = CliRunner().invoke(app, ["masks", *arguments])
        assert isinstance(result.exception, error), result.output
        assert message in str(result.exception)


# --- looking at them ---


def test_preview_shows_masks_and_phrases(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    image = Image.new("RGB", (60, 40), "grey")
    mask = mask_to_rle(filled(image, (10, 10, 30, 30)))
    many = [(f"thing {i}", None, mask) for i in range(12)]
    rows = [make_row(image, ("a $5 dog", None, mask), ("a cat", None, None)), make_row(image), make_row(image, *many)]
    rows[0]["grounding"][0]["score"] = 0.876
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    draw_masks(make_dataset(rows), tmp_path / "preview.png")
    first, second = figures[0].axes
    assert [first.get_title(loc="left"), second.get_title(loc="left")] == ["row 0", "row 2"]
    assert [text.get_text() for text in first.get_legend().get_texts()] == [r"a \$5 dog  0.88", "a cat  (no mask)"]
    assert [text.get_text() for text in second.get_legend().get_texts()][-2:] == ["thing 7", "and 4 more"]
    overlay = first.get_images()[1].get_array()
    np.testing.assert_array_equal(np.asarray(overlay)[..., 3] > 0, filled(image, (10, 10, 30, 30)))
    with pytest.raises(ValueError, match="no row has a mask"):
        draw_masks(make_dataset([make_row(image)]), tmp_path / "none.png")


# --- GrabCut, and the boxes it starts from ---


def disc_on_stripes(
    size: int = 96, radius: int = 20, centre: tuple[int, int] = (40, 56)
) -> tuple[Image.Image, np.ndarray]:
    """A noisy red disc on noisy grey stripes, and its mask; `centre` is row, column."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size]
    mask = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2
    pixels = np.where(columns[..., None] // 6 % 2, 90, 130) + rng.normal(0, 6, (size, size, 3))
    pixels[mask] = np.array([200, 40, 30]) + rng.normal(0, 6, (mask.sum(), 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def exact_rows() -> tuple[Dataset, np.ndarray]:
    image, mask = disc_on_stripes()
    where = {"message": 0, "start": 13, "end": 17, "image": 0}
    row = {
        "images": [image],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "text": None}, {"type": "text", "text": "Where is the disc?"}],
            }
        ],
        "grounding": [{**where, "box": None, "mask": mask_to_rle(mask), "score": None}],
    }
    return Dataset.from_list([row], features=row_features()), mask


def test_grabcut_finds_a_thing_by_its_colours_and_does_so_again():
    image, mask = disc_on_stripes()
    box = [34.0, 18.0, 79.0, 63.0]  # left, top, right, bottom; a bit loose
    teacher = load_teacher("grabcut")
    assert isinstance(teacher, GrabCutTeacher)
    prompt = Prompt(phrase="disc", box=box)
    ((first,),), ((second,),) = (teacher.masks([image], [[prompt]]) for _ in range(2))
    found, score = first
    assert (found & mask).sum() / (found | mask).sum() > 0.9
    assert 0.8 < score <= 1
    assert np.array_equal(found, second[0])


def test_grabcut_gives_nothing_where_there_is_no_background():
    image, _ = disc_on_stripes()
    assert GrabCutTeacher().masks([image], [[Prompt(phrase="all", box=[0.0, 0.0, 96.0, 96.0])]]) == [[(None, 0.0)]]


def test_boxes_without_jitter_are_those_around_the_mask():
    rows, mask = exact_rows()
    boxed = boxes_from_masks(rows, jitter=0.0, progress=False)
    (entry,) = boxed[0]["grounding"]
    ys, xs = np.nonzero(mask)
    assert entry["mask"] is None
    assert entry["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_jitter_moves_each_side_by_at_most_its_part_and_again_alike():
    rows, _ = exact_rows()
    exact = np.array(boxes_from_masks(rows, jitter=0.0, progress=False)[0]["grounding"][0]["box"])
    boxes = [
        boxes_from_masks(rows, jitter=0.2, seed=seed, progress=False)[0]["grounding"][0]["box"]
        for seed in (0, 0, 1, 2)
    ]
    assert boxes[0] == boxes[1] != boxes[2] != boxes[3]
    assert np.abs(np.array(boxes) - exact).max() <= 0.2 * 41 + 1e-3  # the disc is 41 pixels wide
    with pytest.raises(ValueError, match=r"jitter is 0\.5"):
        boxes_from_masks(rows, jitter=0.5)


def test_a_teachers_masks_are_held_against_exact_ones(tmp_path):
    rows, _ = exact_rows()
    masked, outcomes = add_masks(
        boxes_from_masks(rows, progress=False), GrabCutTeacher(), tmp_path / "out", progress=False
    )
    assert outcomes["masked"] == 1
    quality = mask_quality(masked, rows, progress=False)
    found, exact = (mask_from_rle(split[0]["grounding"][0]["mask"]) for split in (masked, rows))
    assert quality.mean_iou == pytest.approx((found & exact).sum() / (found | exact).sum())
    assert (quality.phrases, quality.without_mask, quality.below_half) == (1, 0, 0)
    same = mask_quality(rows, rows, progress=False)
    assert same.mean_iou == same.median_iou == 1
