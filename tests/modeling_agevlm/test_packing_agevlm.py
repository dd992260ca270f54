# SPDX-License-Identifier: Apache-2.0
"""Several texts in one row against each text alone, in float64."""

import itertools

import pytest
import torch
from datasets import Dataset
from tiny_models import COUNTS, IMAGE, NUM_VISUAL, PAD, ROWS, VOCAB, images, text, tiny_age_vlm, tiny_llama
from tiny_training import tiny_processor, tiny_trainable
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from agevlm.modeling_agevlm.modeling_agevlm import NEVER, visible_images
from agevlm.trainer import AgeVlmSFTConfig, AgeVlmSFTTrainer

# Two rows of three texts with one, no and two images, and with no, two and one. Both rows have 20 tokens.
PACKED = [
    [text(7, 1, (2,)), text(4, 2), text(9, 3, (0, 5))],
    [text(5, 4), text(8, 5, (3, 4)), text(7, 6, (1,))],
]
TEXTS = [row_text for row in PACKED for row_text in row]
PIXELS = images(6).double().split([int((row_text == IMAGE).sum()) for row_text in TEXTS])
ATOL = 1e-5  # norms and softmax are float32 in any Llama
LENGTH = 20

both_sinks = pytest.mark.parametrize("model", [False, True], indirect=True, ids=["", "sink"])
both_implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


@pytest.fixture(scope="module")
def model(request):
    return tiny_age_vlm(cross_attention_sink=getattr(request, "param", False)).double()


def positions(rows: list[list[torch.Tensor]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(len(row_text)) for row_text in row]) for row in rows])


def text_numbers(rows: list[list[torch.Tensor]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.full((len(x),), i) for i, x in enumerate(row)]) for row in rows])


def boundaries(texts: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(len(row_text) for row_text in texts)], dtype=torch.int32)


def block_mask() -> torch.Tensor:
    numbers = text_numbers(PACKED)
    return ((numbers[:, :, None] == numbers[:, None]) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())[:, None]


def packed_inputs(form: str) -> dict[str, torch.Tensor]:
    """The texts in the forms in which packing comes. The order of tokens that are not padding is the same in all."""
    ids, ones = torch.stack([torch.cat(row) for row in PACKED]), torch.ones(2, LENGTH, dtype=torch.long)
    if form == "positions":
        inputs = {"input_ids": ids, "position_ids": positions(PACKED)}
    elif form == "positions and ones":
        inputs = {"input_ids": ids, "position_ids": positions(PACKED), "attention_mask": ones}
    elif form == "positions and padding":  # on either side, with position ids as padding may have them
        inputs = {
            "input_ids": nn_pad(ids, PAD),
            "position_ids": nn_pad(positions(PACKED), 1),
            "attention_mask": nn_pad(ones, 0),
        }
    elif form == "boundaries":
        inputs = {"input_ids": ids.view(1, -1), "cu_seq_lens_q": boundaries(TEXTS)}
    elif form == "boundaries of rows":
        inputs = {"input_ids": ids, "cu_seq_lens_q": boundaries(TEXTS), "attention_mask": ones}
    elif form == "numbers":
        inputs = {"input_ids": ids, "seq_idx": text_numbers(PACKED).int()}
    elif form == "bool mask":
        inputs = {"input_ids": ids, "position_ids": positions(PACKED), "attention_mask": block_mask()}
    elif form == "float mask":
        mask = torch.zeros(2, 1, LENGTH, LENGTH).double().masked_fill(~block_mask(), -torch.inf)
        inputs = {"input_ids": ids, "position_ids": positions(PACKED), "attention_mask": mask}
    elif form == "TRL":
        collator = DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)
        rows = [
            {"input_ids": torch.cat(row).tolist(), "seq_lengths": [len(row_text) for row_text in row]}
            for row in PACKED
        ]
        inputs = collator(rows)
    elif form == "flattening":
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")
        inputs = collator([{"input_ids": row_text.tolist()} for row_text in TEXTS])
    return {**inputs, "pixel_values": torch.cat(PIXELS)}


def nn_pad(rows: torch.Tensor, value: int) -> torch.Tensor:
    return torch.stack(
        [torch.nn.functional.pad(row, (3 - side, side), value=value) for row, side in zip(rows, (0, 2), strict=True)]
    )


def tokens_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Indices of the tokens that are not padding, in the flattened batch."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim == 4:
        mask = torch.ones_like(inputs["input_ids"])
    return mask.flatten().nonzero().flatten()


def alone(model, i: int, **kwargs):
    inputs = {"pixel_values": PIXELS[i]} if len(PIXELS[i]) else {}
    return model(TEXTS[i][None], **inputs, **kwargs)


FORMS = [
    "positions",
    "positions and ones",
    "positions and padding",
    "boundaries",
    "boundaries of rows",
    "numbers",
    "bool mask",
    "float mask",
    "TRL",
    "flattening",
]


# Llama's eager attention adds its mask to the scores, and in float64 it is NaN at left padding.
FORMS_AND_IMPLEMENTATIONS = [
    (form, implementation)
    for form in FORMS
    for implementation in ("eager", "sdpa")
    if implementation == "sdpa" or form not in ("bool mask", "positions and padding")
]


@both_sinks
@pytest.mark.parametrize(("form", "implementation"), FORMS_AND_IMPLEMENTATIONS)
@torch.no_grad()
def test_each_packed_text_is_as_it_is_alone(model, implementation, form):
    model.set_attn_implementation({"text_config": implementation})
    inputs = packed_inputs(form)
    logits = model(**inputs).logits.flatten(0, 1)[tokens_of(inputs)]
    expected = torch.cat([alone(model, i).logits[0] for i in range(len(TEXTS))])
    torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)
    plain = tiny_llama().double()(TEXTS[1][None]).logits[0]
    torch.testing.assert_close(logits[7:11], plain, atol=ATOL, rtol=0)  # a text without image, after one with an image
    if form in ("positions", "boundaries", "TRL", "flattening"):
        unpacked = model(inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits.flatten(0, 1)
        assert (unpacked - expected)[7:11].abs().max() > 0.1, "else nothing would be kept apart"


@torch.no_grad()
def test_eager_attention_keeps_packed_texts_with_padding_apart():
    model, inputs = tiny_age_vlm(), packed_inputs("positions and padding")
    inputs["pixel_values"] = inputs["pixel_values"].float()
    logits = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation({"text_config": implementation})
        logits[implementation] = model(**inputs).logits.flatten(0, 1)[tokens_of(inputs)]
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=5e-5, rtol=1e-5)


@torch.no_grad()
def test_visible_images_of_a_block_mask():
    """As of the same mask as a tensor. With a cache, a mask function counts its queries from the first new one."""
    numbers, texts = text_numbers(PACKED), torch.arange(LENGTH)
    where = torch.tensor([[2, 11, 16, NEVER], [8, 9, 14, NEVER]])

    def same_text(batch_idx, head_idx, q_idx, kv_idx):
        return (numbers[batch_idx, q_idx + 8] == numbers[batch_idx, kv_idx]) & (kv_idx <= q_idx + 8)

    block_mask = create_block_mask(same_text, 2, None, 12, LENGTH, device="cpu")
    visible = visible_images(block_mask, texts[8:], where)
    tensor = (numbers[:, :, None] == numbers[:, None]) & (texts <= texts[:, None])
    assert torch.equal(visible, visible_images(tensor[:, None, 8:], texts[8:], where))
    assert visible.any(-1).tolist() == [[False] * 3 + [True] * 9, [True] * 5 + [False] + [True] * 6]


@both_sinks
@pytest.mark.parametrize(
    ("form", "implementation"),
    [("positions", "eager"), ("positions", "sdpa"), ("positions and padding", "sdpa"), ("boundaries of rows", "sdpa")],
)
def test_maps_and_gradients_of_packed_texts(model, implementation, form):
    """A phrase in each text. Its map, and the gradients of maps and logits, are those of the texts alone."""
    model.set_attn_implementation({"text_config": implementation})
    inputs = packed_inputs(form)
    where = tokens_of(inputs).view(2, LENGTH) % inputs["input_ids"].shape[1]
    queries = torch.zeros(2, 3, inputs["input_ids"].shape[1], dtype=torch.bool)
    weights = torch.randn(2 * LENGTH, VOCAB, generator=torch.Generator().manual_seed(0)).double()
    starts = [int(start) for start in boundaries(TEXTS)]
    for row, number in itertools.product(range(2), range(3)):
        start, end = (x - row * LENGTH for x in starts[3 * row + number :][:2])
        queries[row, number, where[row, start + 2 : end]] = True

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    out = model(**inputs, map_queries=queries)
    logits = out.logits.flatten(0, 1)[tokens_of(inputs)]
    actual = gradients((logits * weights).sum() + (out.cross_attention_maps**2).sum())

    loss = 0
    for i, row_text in enumerate(TEXTS):
        row, number = divmod(i, 3)
        query = torch.zeros(1, 1, len(row_text), dtype=torch.bool)
        query[..., 2:] = True
        single = alone(model, i, map_queries=query)
        before = sum(len(p) for p in PIXELS[3 * row : i]) * NUM_VISUAL
        own = slice(before, before + len(PIXELS[i]) * NUM_VISUAL)
        packed_map = out.cross_attention_maps[:, row, number]
        torch.testing.assert_close(packed_map[:, own], single.cross_attention_maps[:, 0, 0], atol=1e-6, rtol=0)
        others = torch.cat([packed_map[:, : own.start], packed_map[:, own.stop :]], dim=1)
        assert not others.any(), "nothing of another text's image"
        loss = loss + (single.logits[0] * weights[starts[i] : starts[i + 1]]).sum()
        loss = loss + (single.cross_attention_maps**2).sum()
    expected = gradients(loss)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():  # the maps are float32
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_the_sft_trainer_packs_texts(tmp_path):
    """`packing=True` is for texts without images, in TRL. The loss is that of the texts alone."""
    model = tiny_trainable()
    sentences = ["There is a dog in this image.", "No.", "What is the brown cat?", "There is a sofa."]
    encoded = [tiny_processor().tokenizer(sentence)["input_ids"] for sentence in sentences]
    losses = [model(torch.tensor([ids]), labels=torch.tensor([ids])).loss * (len(ids) - 1) for ids in encoded]
    expected = sum(losses) / sum(len(ids) - 1 for ids in encoded)
    args = AgeVlmSFTConfig(
        str(tmp_path), packing=True, max_length=1 + max(map(len, encoded)), per_device_train_batch_size=4, max_steps=1,
        bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list([{"input_ids": ids} for ids in encoded])
    trainer = AgeVlmSFTTrainer(model=model, args=args, train_dataset=data, processing_class=tiny_processor())
    assert len(trainer.train_dataset) < len(encoded), "some rows have several texts"
    with torch.enable_grad():
        trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


# ---------------------------------------------------------------------------------------- what is no packing


@torch.no_grad()
def test_padding_and_gaps_are_no_packing(model):
    """Padding within a row, as a conversation of a batch has it, and position ids that skip some: one text, one image."""
    row = text(9, 7, (1,))
    expected = model(row[None], pixel_values=images(1).double()).logits[0]
    gap = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0], dtype=torch.bool)
    ids = torch.full((1, len(gap)), PAD)
    ids[0, gap] = row
    inputs = {"input_ids": ids, "attention_mask": gap[None].long(), "pixel_values": images(1).double()}
    for position_ids in ((gap.cumsum(0) - 1).clamp(min=0), (gap.cumsum(0) - 1).masked_fill(~gap, 1)):
        out = model(**inputs, position_ids=position_ids[None])
        assert out.cache is not None
        torch.testing.assert_close(out.logits[0, gap], expected, atol=ATOL, rtol=0)
    skipping = {**inputs, "position_ids": torch.arange(len(gap))[None]}
    change = model(**skipping).logits - model(**{**skipping, "pixel_values": images(1, seed=9).double()}).logits
    assert change[0, gap][1:].abs().amax(-1).min() > 1e-3, "all of the text sees the image"
    llama_inputs = {name: value for name, value in skipping.items() if name != "pixel_values"}
    llama_inputs["input_ids"] = ids.masked_fill(ids == IMAGE, 5)
    expected = tiny_llama().double()(**llama_inputs).logits
    torch.testing.assert_close(model(**llama_inputs).logits, expected, atol=ATOL, rtol=0)


@torch.no_grad()
def test_an_image_is_seen_by_whoever_may_attend_to_its_token(model):
    """A caller's 4-D mask hides an image together with its token, from single text tokens."""
    row, pixel_values = text(8, 8, (2,)), images(1).double()
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    mask[5:7, 2] = False
    for implementation, form in (
        ("sdpa", mask),
        ("sdpa", torch.zeros(8, 8).double().masked_fill(~mask, -1e9)),
        ("eager", torch.zeros(8, 8).double().masked_fill(~mask, torch.finfo(torch.float64).min)),
    ):
        model.set_attn_implementation({"text_config": implementation})
        seen = []
        hook = model.model.language_model.cross_attn["0"].register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output[0][0].abs().amax(-1) > 0)
        )
        model(row[None], pixel_values=pixel_values, attention_mask=form[None, None])
        hook.remove()
        assert seen[0].tolist() == [False, False, True, True, True, False, False, True]


# ---------------------------------------------------------------------------------------- caches


@both_implementations
@torch.no_grad()
def test_packed_texts_return_no_cache(model, implementation):
    model.set_attn_implementation({"text_config": implementation})
    assert model(**packed_inputs("positions"), use_cache=True).cache is None
    assert model(ROWS[1][None], pixel_values=images(COUNTS[1]).double(), use_cache=True).cache is not None


@pytest.mark.parametrize("form", ["positions", "positions and ones", "boundaries", "numbers", "TRL"])
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_packed_texts_and_a_cache_are_refused(model, form, static):
    config = model.config.text_config
    cache = StaticCache(config=config, max_cache_len=64) if static else DynamicCache(config=config)
    with pytest.raises(ValueError, match=r"several texts in a row .*without `cache`"):
        model(**packed_inputs(form), cache=cache)
    if form.startswith("positions"):
        for kind in ("dynamic", "static"):
            with pytest.raises(ValueError, match="several texts in a row"):
                model.generate(**packed_inputs(form), cache_implementation=kind, max_new_tokens=1)
    first = text(6, 9, (1,))
    cache = model(first[None], pixel_values=images(1).double(), use_cache=True).cache
    with pytest.raises(ValueError, match="several texts in a row"):
        model(text(5, 10)[None], position_ids=torch.tensor([[6, 7, 8, 0, 1]]), cache=cache)


@torch.no_grad()
def test_a_cached_text_may_be_continued_with_any_positions_that_rise(model):
    first, second = text(6, 11, (1,)), text(5, 12, (3,))
    pixel_values = images(2).double()
    whole = model(torch.cat([first, second])[None], pixel_values=pixel_values).logits[0, 6:]
    for mask in (None, torch.ones(1, 11, dtype=torch.long)):
        cache = model(first[None], pixel_values=pixel_values[:1], use_cache=True).cache
        inputs = {"attention_mask": mask, "position_ids": torch.arange(6, 11)[None], "cache": cache}
        out = model(second[None], pixel_values=pixel_values[1:], **inputs)
        torch.testing.assert_close(out.logits[0], whole, atol=ATOL, rtol=0)
        model(text(3, 13)[None], position_ids=torch.tensor([[11, 14, 20]]), cache=cache)  # Llama takes them too
