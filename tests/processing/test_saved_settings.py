# SPDX-License-Identifier: Apache-2.0
"""What is set on a processor is there after saving and loading, so that a loaded checkpoint answers in batches as one by one."""

from pathlib import Path

import pytest
from datasets import Dataset, Image, List
from evaluation_cases import picture
from tiny import BOS, EOT, IMAGE, tiny_tokenizer
from tiny_models import open_gates, tiny_llama, tiny_vision, write_gguf
from tiny_training import dataset, preferences, row
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaForCausalLM, pipeline
from trl import GRPOConfig, GRPOTrainer

from agevlm import AgeVlmForConditionalGeneration, AgeVlmImageProcessor, AgeVlmProcessor
from agevlm.build import build_checkpoint
from agevlm.evaluation.answers import Question, answer
from agevlm.trainer.arguments import AgeVlmTrainingArguments
from agevlm.trainer.trainer import AgeVlmTrainer
from agevlm.trainer.trl_trainers import AgeVlmDPOConfig, AgeVlmDPOTrainer, AgeVlmSFTConfig, AgeVlmSFTTrainer

pytestmark = pytest.mark.slow

DEMO_TEMPLATE = Path(__file__).parents[2] / "examples" / "recipes" / "demo" / "chat_template.jinja"
TEXTS = ["Is there a dog?", "Is there a white cat on the red sofa in this image, please?", "Cat?"]
GREEDY = {"max_new_tokens": 8, "do_sample": False}
SETTINGS = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
SETTINGS |= {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-6}


def forgetful_tokenizer(**kwargs):
    """A tokenizer as it is loaded from files that name no side of padding."""
    tokenizer = tiny_tokenizer(**kwargs)
    del tokenizer.init_kwargs["padding_side"]
    return tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A Llama as a folder and as a GGUF file, and a tower."""
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = forgetful_tokenizer(pad_token=None)
    tokenizer.padding_side = "right"
    tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    write_gguf(LlamaForCausalLM.from_pretrained(folder / "llama"), folder / "llama.gguf", tiny_tokenizer())
    tiny_vision().save_pretrained(folder / "tower")
    return folder


def build(parts, out, text: str = "llama", **kwargs):
    options = {"image_size": 32, "image_token": IMAGE, **kwargs}
    model, processor = build_checkpoint(str(parts / text), str(parts / "tower"), out, **options)
    open_gates(model).save_pretrained(out)
    return model, processor


def from_folder(parts, out):
    build(parts, out)
    return out


def from_gguf(parts, out):
    """As the demo's, with its chat template."""
    build(parts, out, "llama.gguf", chat_template=DEMO_TEMPLATE.read_text())
    return out


def saved_by_hand(parts, out):
    model, built = build(parts, out / "built")
    tokenizer = forgetful_tokenizer(chat_template=built.tokenizer.chat_template)
    tokenizer.padding_side = "left"
    model.save_pretrained(out)
    AgeVlmProcessor(built.image_processor, tokenizer, IMAGE).save_pretrained(out)
    return out


def saved_by(trainer_class, config_class, data, **kwargs):
    def save(parts, out):
        build(parts, out / "built")
        model = AutoModelForImageTextToText.from_pretrained(out / "built")
        settings = {**SETTINGS, "per_device_train_batch_size": 2, **kwargs.get("settings", {})}
        trainer_class(
            model=model, args=config_class(str(out), **settings), train_dataset=data(),
            processing_class=AutoProcessor.from_pretrained(out / "built"), **kwargs.get("more", {}),
        ).train()  # fmt: skip
        return out / "checkpoint-1"

    save.__name__ = trainer_class.__name__
    return save


def questions() -> Dataset:
    examples = [{"prompt": [{"role": "user", "content": "What?"}], "images": row(i)["images"]} for i in range(2)]
    return Dataset.from_list(examples).cast_column("images", List(Image()))


CHECKPOINTS = [
    from_folder,
    from_gguf,
    saved_by_hand,
    saved_by(AgeVlmTrainer, AgeVlmTrainingArguments, lambda: dataset(2)),
    saved_by(AgeVlmSFTTrainer, AgeVlmSFTConfig, lambda: dataset(2)),
    saved_by(AgeVlmDPOTrainer, AgeVlmDPOConfig, lambda: preferences(2)),
    saved_by(
        GRPOTrainer, GRPOConfig, questions,
        settings={"num_generations": 2, "max_completion_length": 3},
        more={"reward_funcs": lambda completion_ids, **kwargs: [0.0, 1.0]},
    ),
]  # fmt: skip


@pytest.mark.parametrize("make", CHECKPOINTS, ids=lambda make: make.__name__)
def test_a_loaded_checkpoint_answers_in_batches_as_one_by_one(make, parts, tmp_path):
    folder = make(parts, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert processor.tokenizer.padding_side == "left"
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture(i)}, {"type": "text", "text": text}]}]
        for i, text in enumerate(TEXTS)
    ]

    def generate(chats) -> list[str]:
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        )  # fmt: skip
        tokens = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(tokens, skip_special_tokens=True)

    alone = [generate([chat])[0] for chat in chats]
    assert len(set(alone)) == 3
    assert generate(chats) == alone

    ask = pipeline("image-text-to-text", model=str(folder))
    answers = ask(text=chats, batch_size=3, return_full_text=False, generate_kwargs=GREEDY)
    assert [given[0]["generated_text"] for given in answers] == alone

    asked = [Question(key=f"{i}", text=text, load_image=lambda i=i: picture(i)) for i, text in enumerate(TEXTS)]
    options = {"settings": {}, "max_new_tokens": 8, "progress": None}
    batched = answer(model, processor, asked, tmp_path / "answers.jsonl", batch_size=3, **options)
    assert [given["answer"] for given in batched.values()] == [text.strip() for text in alone]


def test_settings_of_the_tokenizer_survive(tmp_path):
    tokenizer = forgetful_tokenizer()
    values = {
        "padding_side": "left", "truncation_side": "left", "split_special_tokens": True, "model_max_length": 77,
        "pad_token": EOT, "eos_token": BOS, "clean_up_tokenization_spaces": True, "model_input_names": ["input_ids"],
    }  # fmt: skip
    assert all(getattr(tokenizer, name) != value for name, value in values.items() if name != "padding_side")
    processor = AgeVlmProcessor(AgeVlmImageProcessor(), tokenizer, IMAGE)
    for name, value in values.items():
        setattr(tokenizer, name, value)
    processor.chat_template = {"default": "{{ messages }}", "other": "{{ tools }}"}
    for folder in (tmp_path / "once", tmp_path / "twice"):
        processor.save_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
        assert {name: getattr(processor.tokenizer, name) for name in values} == values
        assert processor.chat_template == {"default": "{{ messages }}", "other": "{{ tools }}"}


def test_settings_of_the_image_processor_survive(tmp_path):
    values = {
        "size": {"height": 48, "width": 40}, "do_pad": False, "do_resize": False, "do_rescale": False, "resample": 2,
        "rescale_factor": 0.5, "do_normalize": False, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],
        "return_image_sizes": False, "do_convert_rgb": False,
    }  # fmt: skip
    images = AgeVlmImageProcessor()
    assert all(getattr(images, name) != value for name, value in values.items())
    for name, value in values.items():
        setattr(images, name, value)
    AgeVlmProcessor(images, tiny_tokenizer(), IMAGE).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path).image_processor
    for name, value in values.items():
        found = getattr(loaded, name)
        assert (list(found) if isinstance(value, list) else found) == value, name


def test_how_a_built_model_generates_survives(parts, tmp_path):
    build(parts, tmp_path / "out")
    model = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    llama = LlamaForCausalLM.from_pretrained(parts / "llama")
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token, "the Llama's has none"
    assert model.generation_config.suppress_tokens == [processor.image_token_id]
    assert model.generation_config.eos_token_id == llama.generation_config.eos_token_id is not None
