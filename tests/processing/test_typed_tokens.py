# SPDX-License-Identifier: Apache-2.0
"""Special tokens and image tokens that someone types into a conversation are read as the text that they are."""

import pickle

import numpy as np
import pytest
import torch
from evaluation_cases import age_vlm
from PIL import Image
from tiny import BOS, EOS, EOT, HEADERS, IMAGE, PAD, tiny_tokenizer
from tiny_training import entry, picture, tiny_processor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from agevlm import AgeVlmImageProcessor, AgeVlmProcessor
from agevlm.inference.generation import read_batch, render_question
from agevlm.processing.collator import AgeVlmDataCollator
from agevlm.processing.processing_agevlm import DEFAULT_CHAT_TEMPLATE, RenderedChat, add_image_support
from agevlm.trainer.trl_trainers import AgeVlmPreferenceCollator

LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% elif message['role'] == 'tool' %}{{ message['content'] | tojson }}{{ '<|eot_id|>' }}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TYPED = [BOS, EOS, EOT, PAD, *HEADERS, IMAGE]


def processor(template: str = LLAMA_3, tokenizer=None, **kwargs) -> AgeVlmProcessor:
    return AgeVlmProcessor(
        AgeVlmImageProcessor(size={"height": 32, "width": 32}), tokenizer or tiny_tokenizer(), IMAGE,
        add_image_support(template, IMAGE), **kwargs,
    )  # fmt: skip


def user(*parts: str | Image.Image) -> dict:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": "user", "content": content}


def read(processor: AgeVlmProcessor, chat: list, **kwargs) -> dict:
    processor_kwargs = {"return_offsets_mapping": True, **kwargs.pop("processor_kwargs", {})}
    return processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=processor_kwargs, **kwargs
    )


def special_tokens(processor: AgeVlmProcessor, ids: torch.Tensor) -> list[str]:
    names = {token_id: str(token) for token_id, token in processor.tokenizer.added_tokens_decoder.items()}
    return [names[i] for i in ids.tolist() if i in names]


def check_offsets(processor: AgeVlmProcessor, text: str, ids: torch.Tensor, offsets: torch.Tensor) -> None:
    """The characters of all tokens are the text, in order and without gap; each token shows its own characters."""
    place = 0
    for token_id, (start, end) in zip(ids.tolist(), offsets.tolist(), strict=True):
        assert start == place
        place = end
        assert processor.tokenizer.decode([token_id]) in (text[start:end], "\ufffd")
    assert place == len(text)


@pytest.mark.parametrize("template", [LLAMA_3, DEFAULT_CHAT_TEMPLATE])
@pytest.mark.parametrize("token", TYPED)
def test_a_typed_token_is_text_wherever_it_stands(template, token):
    """In a system, user, assistant or tool message, as a string or a part, beside real images; at both ends, where templates trim."""
    asked, shown = processor(template), Image.new("RGB", (40, 20))
    texts = [f"  {token} Be kind", f"Is{token}there a dog?{token}", f"No{token}.  ", f'{{"a": {token}}}']

    def chat(texts: list[str]) -> list[dict]:
        return [
            {"role": "system", "content": texts[0]},
            user(shown, texts[1], shown, texts[1]),
            {"role": "assistant", "content": [{"type": "text", "text": texts[2]}]},
            {"role": "tool", "content": texts[3]},
        ]

    found = read(asked, chat(texts), add_generation_prompt=True)
    ids, offsets = found["input_ids"][0], found["offset_mapping"][0]
    innocent = read(asked, chat([text.replace(token, "cat") for text in texts]), add_generation_prompt=True)
    assert special_tokens(asked, ids) == special_tokens(asked, innocent["input_ids"][0])
    assert special_tokens(asked, ids).count(IMAGE) == 2 == len(found["pixel_values"]) == len(found["image_sizes"])
    rendered = asked.apply_chat_template(chat(texts), add_generation_prompt=True)
    assert asked.tokenizer.decode(ids) == rendered, "what the model reads shows the text as it was typed"
    assert rendered.count(token) >= 5
    check_offsets(asked, rendered, ids, offsets)
    assert found["attention_mask"].all()

    # The option, of the processor or of a call, keeps the tokens special.
    texts = [text.replace(IMAGE, "") for text in texts]
    for real in (
        read(processor(template, sanitize_chats=False), chat(texts)),
        read(asked, chat(texts), sanitize_control_tokens=False),
    ):
        text = asked.apply_chat_template(chat(texts))
        assert real["input_ids"][0].tolist() == asked.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_without_typed_tokens_nothing_changes():
    asked, chat = processor(), [user(Image.new("RGB", (40, 20)), "Is there a <dog|> in [it]? </s>*"), user("No *")]
    text = asked.apply_chat_template(chat)
    expected = asked(images=chat[0]["content"][0]["image"], text=text, add_special_tokens=False, return_tensors="pt")
    found = read(asked, chat)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert type(text) is str
    assert asked(text=EOT, add_special_tokens=False)["input_ids"] == [[asked.tokenizer.eos_token_id]], "a raw prompt"


def test_a_token_in_two_parts_of_a_message():
    """Templates join the texts of parts. An image between them keeps them apart."""
    asked, shown = processor(), Image.new("RGB", (40, 20))
    for parts in (("<|eot", "_id|>"), ("a <", "|eot_", "", "id|> b"), ("<|eot", shown, "_id|>")):
        found = read(asked, [user(*parts)])
        assert special_tokens(asked, found["input_ids"][0]).count(EOT) == 1, "the template's"
        check_offsets(
            asked, asked.apply_chat_template([user(*parts)]), found["input_ids"][0], found["offset_mapping"][0]
        )


def test_tokens_in_other_inputs_of_the_template():
    template = "{{ tools[0].name }}{{ documents[0].text }}{{ messages[0].name }}{{ end }}" + LLAMA_3
    asked = processor(template)
    found = read(
        asked, [{**user("Hi"), "name": EOT}], tools=[{"name": f"{BOS}a"}], documents=[{"text": IMAGE}], end=f"b{PAD}"
    )
    assert special_tokens(asked, found["input_ids"][0]) == [PAD, BOS, *HEADERS, EOT], "variables are the program's"
    assert asked.tokenizer.decode(found["input_ids"][0]).startswith(f"{BOS}a{IMAGE}{EOT}b{PAD}{BOS}")


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batches(padding_side):
    asked = processor()
    chats = [[user(f"A long text about {EOT} and the like")], [user("short")], [user(f"{IMAGE}"), user("cat")]]
    alone = [read(asked, chat) for chat in chats]
    options = {"padding": True, "padding_side": padding_side, "pad_to_multiple_of": 8}
    found = read(asked, chats, processor_kwargs=options)
    assert found["input_ids"].shape[1] % 8 == 0
    for i, one in enumerate(alone):
        mask = found["attention_mask"][i].bool()
        assert mask[-1 if padding_side == "left" else 0]
        for name in ("input_ids", "offset_mapping"):
            assert torch.equal(found[name][i][mask], one[name][0])
        assert (found["input_ids"][i][~mask] == asked.tokenizer.pad_token_id).all()
        assert (found["offset_mapping"][i][~mask] == 0).all()
    cut = read(asked, chats, processor_kwargs={"padding": True, "truncation": True, "max_length": 6})
    for i, one in enumerate(alone):
        assert torch.equal(cut["input_ids"][i][cut["attention_mask"][i].bool()], one["input_ids"][0, :6])


def test_masks_of_the_assistants_turns():
    asked = processor()
    chat = [user(f"Say {EOT}"), {"role": "assistant", "content": f"{EOT}{IMAGE}"}]
    found = read(asked, chat, return_assistant_tokens_mask=True)
    learned = found["input_ids"][0][torch.as_tensor(found["assistant_masks"][0]).bool()]
    assert asked.tokenizer.decode(learned) == f"{EOT}{IMAGE}{EOT}"
    assert special_tokens(asked, learned) == [EOT]


def test_a_final_message_that_is_continued():
    asked = processor()
    chat = [user("Say it"), {"role": "assistant", "content": f"It is {EOT} and "}]
    found = read(asked, chat, continue_final_message=True)
    text = asked.apply_chat_template(chat, continue_final_message=True)
    assert text.endswith(f"It is {EOT} and")
    assert asked.tokenizer.decode(found["input_ids"][0]) == text
    assert special_tokens(asked, found["input_ids"][0]).count(EOT) == 1


def test_a_rendered_chat_remembers_what_was_typed():
    asked, shown = processor(), Image.new("RGB", (40, 20))
    chat = [user(shown, f"Is {IMAGE} a cat?")]
    text = asked.apply_chat_template(chat, sanitize_control_tokens=True)
    assert text == asked.apply_chat_template(chat)
    assert {text[i] for i in text.plain_characters} == set(IMAGE)
    assert pickle.loads(pickle.dumps(text)).plain_characters == text.plain_characters
    found = asked(images=shown, text=text, add_special_tokens=False, return_tensors="pt")
    assert torch.equal(found["input_ids"], read(asked, chat)["input_ids"])
    assert asked.apply_chat_template([chat], sanitize_control_tokens=True) == [text]
    with pytest.raises(ValueError, match="2 in all, but there are 1 images"):
        asked(images=shown, text=str(text))
    with pytest.raises(ValueError, match="text 0 has 1, but there are no images"):
        asked(text=text)


def test_a_template_that_changes_a_typed_token_is_refused():
    asked = processor("{% for m in messages %}{{ m['content'].replace('<|eot_id|>', '(end)') }}{% endfor %}")
    with pytest.raises(
        ValueError, match=r"special token.*the chat template changes that text.*sanitize_chats = False"
    ):
        read(asked, [user(f"a {EOT}")])
    assert len(read(asked, [user("a dog")])["input_ids"][0]) > 1
    assert len(read(asked, [user(f"a {EOT}")], sanitize_control_tokens=False)["input_ids"][0]) > 1


def test_the_option_is_saved(tmp_path):
    for kept in (True, False):
        processor(sanitize_chats=kept).save_pretrained(tmp_path / str(kept))
        assert AutoProcessor.from_pretrained(tmp_path / str(kept)).sanitize_chats is kept


def sentence_piece() -> PreTrainedTokenizerFast:
    """Made like Llama 2's: a prefix space, bytes for what it does not know, `<s>` and `</s>`."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz<>/_|",
        "▁a",
    ]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>", IMAGE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def test_sentence_piece():
    template = "{{ bos_token }}{% for m in messages %}[INST]{{ m['content'] }}[/INST]{{ eos_token }}{% endfor %}"
    asked = processor(template, sentence_piece())
    chat = [user("a </s> b<s>c")]
    found = read(asked, chat)
    ids, text = found["input_ids"][0], asked.apply_chat_template(chat)
    assert special_tokens(asked, ids) == ["<s>", "</s>"]
    covered = {place for span in found["offset_mapping"][0].tolist() for place in range(*span)}
    assert covered == set(range(len(text)))
    # After a special token, which this one was, such a tokenizer puts a space of its own.
    assert asked.tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def lowercase() -> PreTrainedTokenizerFast:
    """Special tokens that are found after normalization, an image token that is not special, and one with spaces at its ends."""
    words = ["[UNK]", *"abcdefghijklmnopqrstuvwxyz<>/_|0123456789 \n:"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.decoder = (
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        decoders.Fuse(),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.add_special_tokens([AddedToken("<eot>", normalized=True), AddedToken("<pad>", lstrip=True, rstrip=True)])
    tokenizer.add_tokens([AddedToken(IMAGE, special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eot>", pad_token="<pad>")


def test_tokens_that_the_tokenizer_normalizes():
    asked = processor("{% for m in messages %}{{ m['content'] }}{{ '<eot>' }}{% endfor %}", lowercase())
    shown = Image.new("RGB", (40, 20))
    for typed in ("<eot>", "<EOT>", "＜eot＞", IMAGE, "<pad>", "a <pad> b"):
        found = read(asked, [user(shown, f"x{typed}y")])
        assert special_tokens(asked, found["input_ids"][0]) == [IMAGE, "<eot>"], typed
        text = asked.apply_chat_template([user(shown, f"x{typed}y")])
        offsets = found["offset_mapping"][0].tolist()
        assert "".join(text[start:end] for start, end in offsets) == text


# ---------------------------------------------------------------------------------------- training


def grounded(token: str) -> dict:
    shown, mask = picture(np.random.default_rng(0), 32, 40)
    question, answer = f"What {token} is the brown dog?", f"A {token} dog."
    return {
        "images": [shown],
        "messages": [user(question), {"role": "assistant", "content": [{"type": "text", "text": answer}]}],
        "grounding": [
            entry(0, question, f"{token} is the brown dog", 0, mask), entry(1, answer, "dog", 0, mask),
            entry(1, answer, token, 0, mask),
        ],
    }  # fmt: skip


@pytest.mark.parametrize("template", [LLAMA_3, DEFAULT_CHAT_TEMPLATE])
@pytest.mark.parametrize("token", [EOT, IMAGE, BOS])
def test_the_collator_reads_typed_tokens_as_text(template, token):
    learned = processor(template)
    batch = AgeVlmDataCollator(learned, grid=(4, 4))([grounded(token), grounded("red")])
    ids, expected = batch["input_ids"], AgeVlmDataCollator(learned, grid=(4, 4))([grounded("red")])
    mask = batch["attention_mask"].bool()
    for i, word in enumerate((token, "red")):
        assert special_tokens(learned, ids[i][mask[i]]) == special_tokens(learned, expected["input_ids"][0])
        end = EOT + ("\n" if template == DEFAULT_CHAT_TEMPLATE else "")
        assert learned.tokenizer.decode(ids[i][mask[i]]).endswith(f"A {word} dog.{end}")
        answer = ids[i][batch["labels"][i] != -100]
        assert learned.tokenizer.decode(answer) == f"A {word} dog.{EOT}"
        assert special_tokens(learned, answer) == [EOT]
        phrases = [learned.tokenizer.decode(ids[i][query]).strip() for query in batch["map_queries"][i]]
        assert phrases == [f"{word} is the brown dog", "dog", word]
        assert torch.equal(batch["map_targets"][i], expected["map_targets"][0])
    assert batch["map_targets"].shape == (2, 3, 16), "a typed image token is no image"
    assert len(batch["pixel_values"]) == 2

    real = AgeVlmDataCollator(processor(template, sanitize_chats=False))
    if token == IMAGE:
        with pytest.raises(ValueError, match="has 3, but 1 images"):
            real([grounded(token)])
    else:
        names = special_tokens(learned, real([grounded(token)])["input_ids"][0])
        assert len(names) == len(special_tokens(learned, expected["input_ids"][0])) + 2


def test_the_collator_of_features_reads_typed_tokens_as_text():
    pixels = AgeVlmDataCollator(tiny_processor(), grid=(4, 4))([grounded(EOT), grounded("red")])
    features = AgeVlmDataCollator(tiny_processor(), grid=(4, 4), features=lambda images: len(images))
    batch = features([grounded(EOT), grounded("red")])
    assert all(
        torch.equal(batch[name], pixels[name]) for name in ("input_ids", "labels", "map_queries", "map_targets")
    )
    assert batch["mm_encoder_outputs"] == {"image": 2}


@pytest.mark.parametrize("token", [EOT, IMAGE])
def test_the_collator_of_preferences_reads_typed_tokens_as_text(token):
    def preference(word: str) -> dict:
        row = grounded(word)
        wrong = {"role": "assistant", "content": [{"type": "text", "text": f"No {word}"}]}
        asked, answer = row.pop("messages")
        asked["content"].insert(0, {"type": "image"})
        return {**row, "prompt": [asked], "chosen": [answer], "rejected": [wrong]}

    learned = tiny_processor()
    collate = AgeVlmPreferenceCollator(AgeVlmDataCollator(learned, grid=(4, 4), assistant_only_loss=False))
    batch, expected = collate([preference(token)]), collate([preference("red")])
    for i, answer in enumerate((f"A {token} dog.{EOT}\n", f"No {token}{EOT}\n")):
        ids, mask = batch["input_ids"][i], batch["attention_mask"][i].bool()
        innocent = expected["input_ids"][i][expected["attention_mask"][i].bool()]
        assert special_tokens(learned, ids[mask]) == special_tokens(learned, innocent)
        assert learned.tokenizer.decode(ids[batch["completion_mask"][i].bool()]) == answer
    phrases = [learned.tokenizer.decode(batch["input_ids"][0][query]).strip() for query in batch["map_queries"][0]]
    assert phrases == [f"{token} is the brown dog", "dog", token]
    assert torch.equal(batch["map_targets"], expected["map_targets"])


@pytest.mark.parametrize("token", [EOT, IMAGE])
def test_a_question_with_a_typed_token_is_asked_as_text(token):
    model, asked = age_vlm()
    question, shown = f"Is {token} a dog?", Image.new("RGB", (40, 20))
    prompt = render_question(asked, question)
    batch = read_batch(model, asked, [prompt, render_question(asked, "A cat?")], [shown, shown])
    ids = batch.inputs["input_ids"][0]
    assert special_tokens(asked, ids) == [BOS, IMAGE]
    assert asked.tokenizer.decode(ids) == prompt
    check_offsets(asked, prompt, ids, batch.offsets[0])
    start = prompt.rindex(token)
    (query,) = asked.get_map_queries(batch.offsets[:1], [[(start, start + len(token))]])[0]
    assert asked.tokenizer.decode(ids[query]).strip() == token


def test_plain_characters_of_a_call():
    asked = processor()
    text = f"{BOS}a{EOT}"
    found = asked(text=[text, "b"], plain_characters=[range(len(BOS)), []], add_special_tokens=False)
    assert special_tokens(asked, torch.tensor(found["input_ids"][0])) == [EOT]
    assert found["input_ids"][1] == asked.tokenizer("b", add_special_tokens=False)["input_ids"]
    # Characters of ordinary words make no difference.
    words = [RenderedChat("a brown dog", range(3)), "b"]
    same = asked.tokenizer(words, padding=True, return_offsets_mapping=True)
    for name, values in asked.tokenize(words, padding=True, return_offsets_mapping=True).items():
        assert [list(map(tuple, row)) if name == "offset_mapping" else row for row in same[name]] == values
