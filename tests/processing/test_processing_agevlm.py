# SPDX-License-Identifier: Apache-2.0
"""Processor: Transformers' common tests, then what AGE-VLM adds, then loading without the package."""

import json
import os
import subprocess
import sys
import textwrap
import unittest

import numpy as np
import pytest
import torch
from jinja2.exceptions import TemplateError
from PIL import Image
from tiny import BOS, EOS, EOT, IMAGE, PAD, register_processors, tiny_tokenizer
from transformers import AutoImageProcessor, AutoProcessor
from transformers_tests import load

from agevlm.processing.image_processing_agevlm import AgeVlmImageProcessor, AgeVlmImageProcessorPil
from agevlm.processing.processing_agevlm import DEFAULT_CHAT_TEMPLATE, AgeVlmProcessor, add_image_support

common = load("test_processing_common")
register_processors()

SMOLLM_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Has what makes Llama 3.2's template hard: leading output, whitespace control, reassigned messages, trimmed contents,
# tools, calls of tools without content, and the date.
LLAMA_TEMPLATE = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {%- set first_user_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' -}}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
        {{- '{"name": "' + message.tool_calls[0].function.name + '"}<|eot_id|>' }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" + message.content | tojson + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""


def tokenizer(**kwargs):
    return tiny_tokenizer(extra_special_tokens={"image_token": IMAGE}, **kwargs)


def image_processor(**kwargs):
    return AgeVlmImageProcessor(size={"height": 16, "width": 16}, **kwargs)


@pytest.fixture
def processor():
    return AgeVlmProcessor(image_processor(), tokenizer(chat_template=DEFAULT_CHAT_TEMPLATE))


def picture(value=0):
    return Image.new("RGB", (16, 12), (value, value, value))


def text_part(text):
    return {"type": "text", "text": text}


class AgeVlmProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    # No common test is excluded; tests of videos and audio skip themselves, because the processor takes neither.
    processor_class = AgeVlmProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return tokenizer(chat_template=LLAMA_TEMPLATE)

    @classmethod
    def _setup_image_processor(cls):
        return image_processor()

    @staticmethod
    def prepare_processor_dict():
        return {"image_token": IMAGE}


def test_returns_one_token_per_image_and_all_images_in_order(processor):
    texts = [f"{IMAGE}{IMAGE} two cats", "no cat", f"one cat {IMAGE}"]
    images = [picture(value) for value in (0, 100, 200)]
    outputs = processor(images=[images[:2], [], images[2:]], text=texts, padding=True, return_tensors="pt")
    assert set(outputs) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    assert (outputs.input_ids == processor.image_token_id).sum(1).tolist() == [2, 0, 1]
    expected = processor.image_processor(images, return_tensors="pt")
    assert torch.equal(outputs.pixel_values, expected.pixel_values)
    assert torch.equal(outputs.image_sizes, expected.image_sizes)
    assert outputs.image_sizes.tolist() == [[12, 16]] * 3

    for same in (images, [images[:2], None, images[2:]]):
        again = processor(images=same, text=texts, padding=True, return_tensors="pt")
        for key, value in outputs.items():
            assert torch.equal(value, again[key])


def test_without_padded_images_there_are_no_sizes(processor):
    outputs = processor(images=picture(), text=IMAGE, do_pad=False, return_tensors="pt")
    assert set(outputs) == {"input_ids", "attention_mask", "pixel_values"}


@pytest.mark.parametrize("images", [None, [], [[], []], [None, None]])
def test_text_only(processor, images):
    outputs = processor(images=images, text=["a dog", "two dogs"], padding=True, return_tensors="pt")
    assert set(outputs) == {"input_ids", "attention_mask"}


def test_images_only(processor):
    outputs = processor(images=[picture(), picture()], return_tensors="pt")
    assert set(outputs) == {"pixel_values", "image_sizes"}


def test_kinds_of_images(processor, tmp_path):
    picture(100).save(tmp_path / "image.png")
    array = np.array(picture(100))
    expected = processor(images=picture(100), text=IMAGE, return_tensors="pt").pixel_values
    for image in (str(tmp_path / "image.png"), array, torch.from_numpy(array), array[..., 0]):
        for images in (image, [image], [[image]]):
            actual = processor(images=images, text=IMAGE, return_tensors="pt").pixel_values
            assert torch.equal(actual, expected)
    stacked = processor(images=np.stack([array, array]), text=IMAGE * 2, return_tensors="pt").pixel_values
    assert torch.equal(stacked, torch.cat([expected, expected]))


def test_token_types_are_not_returned():
    generic = tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    processor = AgeVlmProcessor(image_processor(), generic)
    assert "token_type_ids" in generic("a dog")
    assert "token_type_ids" not in processor(text="a dog")
    assert "token_type_ids" not in processor.model_input_names


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (0, [f"a {IMAGE}", "b"], r"text 0 has 1, but there are no images"),
        (1, ["a", "b"], r"the texts have \[0, 0\], 0 in all, but there are 1 images"),
        (3, [f"a {IMAGE}", f"b {IMAGE}"], r"the texts have \[1, 1\], 2 in all, but there are 3 images"),
        ([1, 1], [f"a {IMAGE * 2}", "b"], r"text 0 has 2, but 1 images"),
        ([0, 2], ["a", f"b {IMAGE}"], r"text 1 has 1, but 2 images"),
        ([1], [f"a {IMAGE}", "b"], r"got 1 lists of images for 2 texts"),
        ([1, 1, 1], [f"a {IMAGE}", f"b {IMAGE}"], r"got 3 lists of images for 2 texts"),
    ],
)
def test_mismatch_of_tokens_and_images_raises(processor, images, text, message):
    if isinstance(images, list):
        images = [[picture()] * count for count in images]
    else:
        images = [picture()] * images or None
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Text 0 of 1 is empty"),
        (["a", ""], "Text 1 of 2 is empty"),
        ([], "empty list"),
        ([1], "list of strings"),
        (None, "Pass `text`, `images` or both"),
    ],
)
def test_bad_text_raises(processor, text, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text)


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_never_removes_an_image_token(processor, side):
    processor.tokenizer.truncation_side = side
    text = f"{IMAGE} a brown dog" if side == "left" else f"a brown dog {IMAGE}"
    with pytest.raises(ValueError, match=r"Mismatch in `image` token count.*truncation"):
        processor(images=picture(), text=text, truncation=True, max_length=4)
    kept = f"a brown dog {IMAGE}" if side == "left" else f"{IMAGE} a brown dog"
    assert len(processor(images=picture(), text=kept, truncation=True, max_length=4).input_ids[0]) == 4


def test_image_token_of_argument_or_tokenizer():
    with pytest.raises(ValueError, match=r"no image token.*existing special token"):
        AgeVlmProcessor(image_processor(), tiny_tokenizer())
    assert AgeVlmProcessor(image_processor(), tokenizer()).image_token == IMAGE
    processor = AgeVlmProcessor(image_processor(), tiny_tokenizer(), image_token=IMAGE)
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids(IMAGE)
    assert AgeVlmProcessor(image_processor(), tokenizer(), image_token=EOS).image_token == EOS


@pytest.mark.parametrize("image_token", ["<image>", "dog", f"{IMAGE}{IMAGE}", "", BOS, EOT, PAD])
def test_image_token_must_be_a_special_token_without_another_role(image_token):
    with pytest.raises(ValueError, match="existing special token"):
        AgeVlmProcessor(image_processor(), tiny_tokenizer(), image_token=image_token)


def test_saved_processor_is_loaded_as_it_was(processor, tmp_path):
    processor = AgeVlmProcessor(image_processor(do_pad=False), tiny_tokenizer(), IMAGE, "template of {{ messages }}")
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "template of {{ messages }}"
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is AgeVlmProcessor
    assert loaded.to_dict() == processor.to_dict()
    assert (loaded.image_token, loaded.image_token_id) == (IMAGE, processor.image_token_id)
    assert loaded.chat_template == processor.chat_template
    assert loaded.image_processor.do_pad is False


# Chat templates


@pytest.mark.parametrize("template", [SMOLLM_TEMPLATE, LLAMA_TEMPLATE, DEFAULT_CHAT_TEMPLATE, "\n  {{ messages }}\n"])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_text_only_conversations_render_as_by_the_language_model(template, add_generation_prompt):
    processor = AgeVlmProcessor(image_processor(), tokenizer(chat_template=template))
    messages = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "How many cats?\n"},
        {"role": "assistant", "content": "Two."},
    ]
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "date_string": "1 Jan 2026"}
    for start in (0, 1):
        expected = processor.tokenizer.apply_chat_template(messages[start:], **options)
        assert processor.apply_chat_template(messages[start:], **options) == expected
        if "messages }}" in template:
            continue  # would show the difference between a string and a list
        lists = [{**message, "content": [text_part(message["content"])]} for message in messages[start:]]
        assert processor.apply_chat_template(lists, **options) == expected


def test_smollm_template_with_images():
    processor = AgeVlmProcessor(image_processor(), tokenizer(chat_template=SMOLLM_TEMPLATE))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, text_part("What"), {"type": "image"}, text_part(" is this?")]},
        {"role": "assistant", "content": [text_part("Two dogs.")]},
        {"role": "user", "content": "Sure?"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}What{IMAGE} is this?<|im_end|>\n"
        "<|im_start|>assistant\nTwo dogs.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_llama_template_with_images_and_tools():
    processor = AgeVlmProcessor(image_processor(), tokenizer(chat_template=LLAMA_TEMPLATE))
    call = {"type": "function", "function": {"name": "count", "arguments": {}}}
    messages = [
        {"role": "user", "content": [{"type": "image"}, text_part("How many dogs? ")]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": [text_part("2")]},
    ]
    tools = [{"type": "function", "function": {"name": "count"}}]
    rendered = processor.apply_chat_template(messages, tools=tools, date_string="1 Jan 2026")
    assert rendered == (
        f"{BOS}<|start_header_id|>system<|end_header_id|>\n\nToday Date: 1 Jan 2026\n\n{EOT}"
        f"<|start_header_id|>user<|end_header_id|>\n\n{json.dumps(tools[0], indent=4)}\n\n{IMAGE}How many dogs?{EOT}"
        f'<|start_header_id|>assistant<|end_header_id|>\n\n{{"name": "count"}}{EOT}'
        f'<|start_header_id|>ipython<|end_header_id|>\n\n"2"{EOT}'
    )


def test_add_image_support_is_idempotent_and_takes_any_token():
    once = add_image_support(SMOLLM_TEMPLATE, IMAGE)
    assert once.endswith(SMOLLM_TEMPLATE)
    assert add_image_support(once, IMAGE) == once
    odd = "<｜'im\"age\\'｜🖼>"
    processor = AgeVlmProcessor(image_processor(), tokenizer())
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    rendered = processor.apply_chat_template(messages, chat_template=add_image_support("{{ messages }}", odd))
    assert rendered == str([{"role": "user", "content": odd}])


def test_other_keys_of_messages_are_kept(processor):
    message = {"role": "tool", "content": [{"type": "image"}, text_part("2")], "tool_call_id": "7", "name": "count"}
    rendered = processor.apply_chat_template([message], chat_template=add_image_support("{{ messages[0] }}", IMAGE))
    assert rendered == str({**message, "content": f"{IMAGE}2"})


def test_unknown_parts_raise(processor):
    with pytest.raises(TemplateError, match="type text or image, got video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


def test_templates_by_name_all_take_images():
    templates = {"default": SMOLLM_TEMPLATE, "plain": "{{ messages[0]['content'] }}"}
    processor = AgeVlmProcessor(image_processor(), tokenizer(chat_template=templates))
    messages = [{"role": "user", "content": [{"type": "image"}, text_part("a")]}]
    assert processor.apply_chat_template(messages, chat_template="plain") == f"{IMAGE}a"
    assert f"{IMAGE}a<|im_end|>" in processor.apply_chat_template(messages)


def test_apply_chat_template_with_images(processor, tmp_path):
    picture(200).save(tmp_path / "image.png")
    path = str(tmp_path / "image.png")
    conversations = [
        [{"role": "user", "content": [text_part("Cats?"), {"type": "image", "image": picture(0)}]}],
        [{"role": "user", "content": "Dogs?"}, {"role": "assistant", "content": [text_part("No.")]}],
        [
            {"role": "user", "content": [{"type": "image", "path": path}, {"type": "image", "image": picture(100)}]},
            {"role": "assistant", "content": [text_part("Two.")]},
            {"role": "user", "content": [{"type": "image", "url": path}, text_part("More?")]},
        ],
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    outputs = processor.apply_chat_template(conversations, processor_kwargs={"padding": True}, **options)
    assert (outputs.input_ids == processor.image_token_id).sum(1).tolist() == [1, 0, 3]
    assert (outputs.input_ids == processor.tokenizer.bos_token_id).sum(1).tolist() == [1, 1, 1]
    expected = processor.image_processor([picture(v) for v in (0, 200, 100, 200)], return_tensors="pt").pixel_values
    assert torch.equal(outputs.pixel_values, expected)

    single = processor.apply_chat_template(conversations[2], **options)
    assert torch.equal(single.pixel_values, expected[1:])
    assert single.input_ids[0].tolist() == outputs.input_ids[2][outputs.attention_mask[2].bool()].tolist()
    assert "pixel_values" not in processor.apply_chat_template(conversations[1], **options)
    assert processor.decode(single.input_ids[0]) == processor.apply_chat_template(conversations[2])


def test_assistant_mask_of_default_template(processor):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture()}, text_part("How many cats are there?")]},
        {"role": "assistant", "content": [text_part("Two cats.")]},
    ]
    outputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    assert processor.decode(outputs.input_ids[outputs.assistant_masks.bool()]) == f"Two cats.{EOT}"


def test_continue_final_message(processor):
    messages = [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [text_part("Two ca")]},
    ]
    rendered = processor.apply_chat_template(messages, continue_final_message=True)
    assert rendered == f"{BOS}user:\n{IMAGE}\nassistant:\nTwo ca"


def test_sanitized_image_tokens_of_users_are_no_images(processor):
    messages = [{"role": "user", "content": [{"type": "image", "image": picture()}, text_part(f"What is {IMAGE}?")]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for sanitized in ({}, {"sanitize_control_tokens": True}):
        outputs = processor.apply_chat_template(messages, **sanitized, **options)
        assert (outputs.input_ids == processor.image_token_id).sum() == 1
    with pytest.raises(ValueError, match="text 0 has 2, but 1 images"):
        processor.apply_chat_template(messages, sanitize_control_tokens=False, **options)


def test_post_processing(processor):
    ids = processor(images=picture(), text=f"{IMAGE}two cats", return_tensors="pt").input_ids
    assert processor.post_process_image_text_to_text(ids) == ["two cats"]
    assert processor.batch_decode(ids) == [f"{BOS}{IMAGE}two cats"]


# Phrases


def test_map_queries(processor):
    texts = [f"{IMAGE}A brown dog and a white cat", f"{IMAGE}Two cats"]
    spans = [[(texts[0].index(p), texts[0].index(p) + len(p)) for p in ("brown dog", "cat")], []]
    spans[1] = [(texts[1].index("Two"), len(texts[1]))]
    for side in ("left", "right"):
        inputs = processor(
            images=[picture(), picture()],
            text=texts,
            padding=True,
            padding_side=side,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        assert inputs.offset_mapping.shape == (*inputs.input_ids.shape, 2)
        queries = AgeVlmProcessor.get_map_queries(inputs.offset_mapping, spans, inputs.attention_mask, texts)
        assert queries.dtype == torch.bool
        assert queries.shape == (2, 2, inputs.input_ids.shape[1])
        found = [[processor.decode(inputs.input_ids[i][queries[i, j]]) for j in range(2)] for i in range(2)]
        # The first word of a phrase comes with the space before it.
        assert found == [[" brown dog", " cat"], ["Two cats", ""]]


def test_map_queries_take_overlapping_tokens_only():
    #           BOS     "A"     " dog"  "s"     empty   "."     PAD
    offsets = [[(0, 0), (0, 1), (1, 5), (5, 6), (6, 6), (6, 7), (0, 0)]]
    spans = [[(2, 5), (0, 1), (4, 6), (0, 7), (6, 7), (7, 9)]]
    queries = AgeVlmProcessor.get_map_queries(offsets, spans)[0]
    expected = [[2], [1], [2, 3], [1, 2, 3, 5], [5], []]
    assert [row.nonzero().flatten().tolist() for row in queries] == expected
    masked = AgeVlmProcessor.get_map_queries(offsets, spans, attention_mask=torch.tensor([[1, 1, 1, 0, 1, 1, 0]]))[0]
    assert [row.nonzero().flatten().tolist() for row in masked] == [[2], [1], [2], [1, 2, 5], [5], []]
    assert AgeVlmProcessor.get_map_queries(offsets, [[]]).shape == (1, 0, 7)


def test_map_queries_of_truncated_phrases_are_all_false(processor):
    text = "a brown dog and a white cat"
    inputs = processor(text=text, truncation=True, max_length=4, return_offsets_mapping=True, return_tensors="pt")
    spans = [[(text.index("brown"), text.index(" dog")), (text.index("white"), len(text))]]
    queries = AgeVlmProcessor.get_map_queries(inputs.offset_mapping, spans, inputs.attention_mask, [text])
    assert queries.any(-1).tolist() == [[True, False]]


@pytest.mark.parametrize("span", [(-1, 2), (3, 2), (2, 2), (1, 6)])
def test_bad_spans_raise(span):
    with pytest.raises(ValueError, match=r"phrase 1 in text 0 must be 0 <= start < end <= 5"):
        AgeVlmProcessor.get_map_queries([[(0, 5)]], [[(0, 1), span]], text=["A dog"])


def test_spans_of_other_numbers_of_texts_raise():
    with pytest.raises(ValueError, match="1 texts"):
        AgeVlmProcessor.get_map_queries([[(0, 5)]], [[], []])
    with pytest.raises(ValueError, match="1 texts"):
        AgeVlmProcessor.get_map_queries([[(0, 5)]], [[]], text=[])


# Loading where the package is not installed

REMOTE_SCRIPT = """
    import json, sys

    sys.modules["agevlm"] = None
    if {block_torchvision}:
        sys.modules["torchvision"] = None
    try:
        import agevlm
    except ImportError:
        pass
    else:
        raise AssertionError("agevlm can be imported")

    from PIL import Image
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    folder, again = sys.argv[1:]
    result = {{"tokenizer": type(AutoTokenizer.from_pretrained(folder)).__name__}}
    for name, auto_class, kwargs in [
        ("processor", AutoProcessor, {{}}),
        ("pil_processor", AutoProcessor, {{"backend": "pil"}}),
        ("image_processor", AutoImageProcessor, {{}}),
        ("pil", AutoImageProcessor, {{"backend": "pil"}}),
        ("slow", AutoImageProcessor, {{"use_fast": False}}),
    ]:
        loaded = auto_class.from_pretrained(folder, trust_remote_code=True, **kwargs)
        image_processor = getattr(loaded, "image_processor", loaded)
        result[name] = [type(loaded).__module__.split(".")[0], type(image_processor).__name__, image_processor.size.height]
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    messages = [{{"role": "user", "content": [{{"type": "image", "image": Image.new("RGB", (8, 8))}}]}}]
    outputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    result["pixel_values"] = list(outputs.pixel_values.shape)
    # What is loaded can be saved and loaded again.
    processor.save_pretrained(again)
    reloaded = AutoProcessor.from_pretrained(again, trust_remote_code=True)
    assert reloaded.to_dict() == processor.to_dict()
    print(json.dumps(result))
"""


def run_remotely(tmp_path, folder, block_torchvision=False):
    script = textwrap.dedent(REMOTE_SCRIPT.format(block_torchvision=block_torchvision))
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", script, str(folder), str(tmp_path / "again")]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("saved", [AgeVlmImageProcessor, AgeVlmImageProcessorPil])
@pytest.mark.parametrize("block_torchvision", [False, True], ids=["torchvision", "no-torchvision"])
def test_remote_code(processor, tmp_path, saved, block_torchvision):
    processor.image_processor = saved(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "saved")
    result = run_remotely(tmp_path, tmp_path / "saved", block_torchvision)
    default = "AgeVlmImageProcessorPil" if block_torchvision else "AgeVlmImageProcessor"
    remote = "transformers_modules"
    assert result == {
        "tokenizer": "TokenizersBackend",
        "processor": [remote, default, 16],
        "pil_processor": [remote, "AgeVlmImageProcessorPil", 16],
        "image_processor": [remote, default, 16],
        "pil": [remote, "AgeVlmImageProcessorPil", 16],
        "slow": [remote, "AgeVlmImageProcessorPil", 16],
        "pixel_values": [1, 3, 16, 16],
    }


@pytest.mark.parametrize("cls", [AgeVlmImageProcessor, AgeVlmImageProcessorPil])
def test_saved_files_and_auto_maps(processor, tmp_path, cls):
    backends = {
        "torchvision": "image_processing_agevlm.AgeVlmImageProcessor",
        "pil": "image_processing_agevlm.AgeVlmImageProcessorPil",
    }
    cls().save_pretrained(tmp_path / "alone")
    config = json.loads((tmp_path / "alone" / "preprocessor_config.json").read_text())
    assert config["auto_map"] == {"AutoImageProcessor": backends}
    assert (tmp_path / "alone" / "image_processing_agevlm.py").is_file()

    processor.save_pretrained(tmp_path / "both")
    config = json.loads((tmp_path / "both" / "processor_config.json").read_text())
    assert config["auto_map"] == {"AutoProcessor": "processing_agevlm.AgeVlmProcessor"}
    assert config["image_processor"]["auto_map"]["AutoImageProcessor"] == backends
    code = {path.name for path in (tmp_path / "both").glob("*.py")}
    assert code == {"processing_agevlm.py", "image_processing_agevlm.py"}


def test_registered_classes_are_used_without_remote_code(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    for trust in (False, True, None):
        assert type(AutoProcessor.from_pretrained(tmp_path, trust_remote_code=trust)) is AgeVlmProcessor
        assert type(AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=trust)) is AgeVlmImageProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend="pil")) is AgeVlmImageProcessorPil
