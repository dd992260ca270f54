# SPDX-License-Identifier: Apache-2.0
"""Mask teachers: compared with Transformers, with fake parts, and with known shapes."""

import os
import sys
from functools import partial

import numpy as np
import pytest
import segment_anything
import torch
from grounded_rows import disc_on_stripes, filled, photograph
from PIL import Image
from tiny_sam import SIDE, build_tiny_sam, randomize

from agevlm.data.teachers import (
    GrabCutTeacher,
    GroundedSamTeacher,
    Prompt,
    Sam3Teacher,
    SamTeacher,
    load_sam,
    load_teacher,
)

pytestmark = pytest.mark.usefixtures("tiny_sam_type")

SIZES = [(90, 50), (40, 120), (64, 64)]  # of the images: width, height

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
    assert varied == 6  # constant masks would prove little


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


def test_invalid_checkpoints(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="no SAM checkpoint"):
        load_sam(tmp_path / "missing.pth")
    torch.save({"image_encoder.pos_embed": Attack(tmp_path / "harm")}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="pickled code"):
        load_sam(tmp_path / "code.pth")
    assert not (tmp_path / "harm").exists()
    torch.save(build_tiny_sam(width=64).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the weights of a SAM of the types vit_h"):
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
            self.boxes = [[p.box for p in image_prompts] for image_prompts in prompts]
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
    assert teacher.sam.boxes == [[(1, 0, 3, 2), (8, 5, 9, 9), (5, 1, 7, 3), (4, 4, 6, 6)], []]
    (dogs, cat, boxed, car), second = answers
    np.testing.assert_array_equal(dogs[0], filled(image, (1, 0, 3, 2)) | filled(image, (8, 5, 9, 9)))
    assert dogs[1] == pytest.approx(0.8 * 0.5)  # the better of 0.1 * 0.9 and 0.8 * 0.5
    assert cat == (None, 0.0)
    assert second == [(None, 0.0)]
    np.testing.assert_array_equal(boxed[0], filled(image, (5, 1, 7, 3)))
    assert boxed[1] == pytest.approx(0.5)  # no detection to doubt
    assert car[1] == pytest.approx(0.4 * 0.7)


def test_invalid_teachers(checkpoint, sam3, tmp_path):
    for arguments, message in (
        ({"name": "sam2"}, "there is no mask teacher 'sam2'; choose one of: sam, sam3, grounded-sam"),
        ({"name": "grounded-sam"}, "grounded-sam needs a detector"),
        ({"name": "sam", "detector": "x"}, "grounded-sam needs a detector"),
        ({"name": "sam", "threshold": 0.5}, "reject bad masks with min_score"),
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


def test_settings_depend_on_the_weights_and_not_on_their_file(checkpoint, tmp_path):
    """The fingerprint is of the weights, wherever they are stored."""
    (tmp_path / "copy.pth").write_bytes(checkpoint.read_bytes())
    torch.save(randomize(build_tiny_sam(), seed=7, scale=0.5).state_dict(), tmp_path / "other.pth")
    same, moved, other = (SamTeacher(p).settings for p in (checkpoint, tmp_path / "copy.pth", tmp_path / "other.pth"))
    assert same == moved != other
    assert SamTeacher(checkpoint, dtype=torch.bfloat16).settings != same


# --- GrabCut ---


def test_grabcut_separates_an_object_by_color_and_repeats_its_mask():
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


def test_grabcut_finds_nothing_without_background():
    image, _ = disc_on_stripes()
    assert GrabCutTeacher().masks([image], [[Prompt(phrase="all", box=[0.0, 0.0, 96.0, 96.0])]]) == [[(None, 0.0)]]
