# SPDX-License-Identifier: Apache-2.0
"""AGE-VLM in lmms-eval: `lmms-eval --model agevlm --model_args pretrained=FOLDER --tasks pope`.

Needs the extra `lmms`. lmms-eval finds [`manifest`] by the entry point `lmms_eval.models` of this package, whatever model it
runs; so nothing here may import `lmms_eval.models` or the model's code before a model exists. This file must never import
`lmms_eval.evaluator`, which lets PIL read truncated images in the whole process.
"""

import mimetypes
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

with warnings.catch_warnings():  # `lmms_eval.utils` silences all warnings of the process
    from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.utils import Collator

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest
    from transformers import BatchFeature

# What tasks may say about generation. Their other settings are other models' (`image_aspect_ratio`), or the harness's.
_OPTIONS = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
_MAX_NEW_TOKENS = 1024  # where a task names no limit; what most of the harness's models use


def manifest() -> "ModelManifest":
    """What lmms-eval registers as the model `agevlm`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "agevlm",
        chat_class_path=f"{__name__}.{AgeVlmChat.__name__}",
        simple_class_path=f"{__name__}.{AgeVlmSimple.__name__}",
    )


class AgeVlmChat(lmms):
    """AGE-VLM for tasks that generate, by lmms-eval's chat interface: a task writes the whole conversation.

    Under `accelerate launch` each process holds the model and answers its share of the documents.

    Args:
        pretrained: folder or Hub id of an AGE-VLM with its processor, or of an adapter for one.
        device: where one process runs; Accelerate's choice by default, and always with several processes.
        dtype: `"auto"` (that of the checkpoint), `"float32"`, `"bfloat16"` or `"float16"`.
        batch_size: requests that are answered together, on each device.

    Raises:
        ValueError: for any other `dtype` or `batch_size`, if `pretrained` is no AGE-VLM, or if it has no chat template.
    """

    is_simple = False

    def __init__(
        self, pretrained: str, device: str | None = None, dtype: str = "auto", batch_size: int | str = 1
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a whole number, at least 1, got '{batch_size}'.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        alone = self._world_size == 1
        self.device = torch.device(device) if device and alone else self.accelerator.device

        from ..inference.generation import load_model
        from ..modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration

        model, self.processor = load_model(pretrained, "cpu", dtype)
        if not isinstance(model, AgeVlmForConditionalGeneration):
            raise ValueError(
                f"{pretrained} is a {type(model).__name__}, not an AGE-VLM: name the harness's own model for it."
            )
        self.model = model.to(self.device)
        _keep_scores()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers, in the order of the requests.

        An answer ends before the first of the task's `until` strings. A blank line is none: the harness gives it to
        all tasks that name nothing, as the end of an example among several, and a chat's answer ends by its own token.
        Sampling is on if the task says `do_sample`, or says nothing but a temperature, and that is not 0.

        Raises:
            ValueError: if a request shows anything but text and images, or the model's logits are not finite; names its
                task and document.
        """

        def answer(batch: list[Instance]) -> list[GenerationResult]:
            return self._answer(batch, [self._messages(request) for request in batch], "generate_until")

        return self._in_batches(requests, answer, _generation_kwargs)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds, for each request. The task writes each round in view of the answers before it."""
        return [self._rounds(request) for request in tqdm(requests, disable=self.rank != 0, desc="AGE-VLM")]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not of the harness's chat interface: see [`AgeVlmSimple`]."""
        raise NotImplementedError(
            "lmms-eval's chat interface has no log-likelihoods: run multiple choice tasks with --force_simple."
        )

    def _document(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]

    def _messages(self, request: Instance) -> list[dict]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return doc_to_messages(self._document(task, split, doc_id))

    def _rounds(self, request: Instance) -> list[str]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        document = self._document(task, split, doc_id)
        answers: list[str] = []
        messages, information, done, number = doc_to_messages(document), None, False, 0
        while not done:
            (answer,) = self._answer([request], [messages], "generate_until_multi_round")
            number += 1
            # What the task makes of the answers counts: it may add some for rounds that it leaves out.
            messages, done, answers, information = doc_to_messages(
                document,
                round_idx=number,
                previous_output=[*answers, answer.text],
                previous_round_info=information,
            )
        return list(answers)

    def _in_batches(
        self,
        requests: list[Instance],
        work: Callable[[list[Instance]], list],
        group: Callable[[Instance], dict] = lambda request: {},
    ) -> list:
        """What `work` makes of the requests, in batches of the same `group` and about the same length; in order."""
        # The longest first, so that a batch that does not fit into memory fails at the start.
        collator = Collator(requests, lambda request: -len(str(request.args[0])), group_fn=group, grouping=True)
        results: list = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="AGE-VLM") as bar:
            for batch in collator.get_batched(n=self.batch_size):
                results.extend(work(batch))
                bar.update(len(batch))
        return collator.get_original(results)

    def _prompts(
        self, batch: list[Instance], conversations: list[list[dict]]
    ) -> tuple[list[str], list[list[Any]] | None]:
        """The prompts, and each one's images."""
        prompts, images = [], []
        for request, messages in zip(batch, conversations, strict=True):
            shown, rendered = [], []
            for message in messages:
                content = message["content"]
                parts = []
                for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                    if part["type"] == "image":
                        shown.append(part["url"])
                        parts.append({"type": "image"})
                    elif part["type"] == "text":
                        parts.append(part)
                    else:
                        raise ValueError(
                            f"AGE-VLM takes text and images: document {request.doc_id} of task '{request.task_name}' "
                            f"shows something else, by its type: {part['type']}. Leave this task out."
                        )
                rendered.append({"role": message["role"], "content": parts})
            settings = {"tokenize": False, "sanitize_control_tokens": self.processor.sanitize_chats}
            prompts.append(self.processor.apply_chat_template(rendered, add_generation_prompt=True, **settings))
            images.append(shown)
        return prompts, images if any(images) else None

    def _inputs(self, texts: list[str], images: list[list[Any]] | None, **kwargs: Any) -> "BatchFeature":
        # As in training, the chat template has written all special tokens.
        return self.processor(
            images=images,
            text=texts,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
            **kwargs,
        )

    def _answer(self, batch: list[Instance], conversations: list[list[dict]], method: str) -> list[GenerationResult]:
        from ..inference.generation import KEEP_INVALID, FiniteLogits, check_finite

        gen_kwargs = _generation_kwargs(batch[0])
        prompts, images = self._prompts(batch, conversations)
        inputs = self._inputs(prompts, images).to(self.device)
        pad = self.processor.tokenizer.pad_token_id
        finite = FiniteLogits()
        tokens = self.model.generate(
            **inputs, **_options(gen_kwargs), **KEEP_INVALID, pad_token_id=pad, logits_processor=[finite]
        )
        check_finite(self.model, finite.rows, _asked(batch))
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
        until = gen_kwargs.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop and stop != "\n\n"]
        results = []
        for row, text in enumerate(self.processor.batch_decode(tokens, skip_special_tokens=True)):
            text = text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)]
            counts = TokenCounts(int(inputs["attention_mask"][row].sum()), int((tokens[row] != pad).sum()))
            results.append(GenerationResult(text, counts))
            self.cache_hook.add_partial(method, (prompts[row], gen_kwargs), text)
        return results


class AgeVlmSimple(AgeVlmChat):
    """AGE-VLM by lmms-eval's simple interface, `--force_simple`: a task gives images and a text, which follows them.

    The only interface of the harness that has multiple choice by log-likelihood.
    """

    is_simple = True

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Only in the chat interface: see [`AgeVlmChat`]."""
        raise NotImplementedError("AGE-VLM converses by lmms-eval's chat interface: leave --force_simple out.")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each request, in order: the continuation's negative log-likelihood, and if greedy decoding would write it.

        Negative, in nats and summed over the tokens, because lmms-eval takes the choice with the least, whatever the
        method's name says; so its `acc` is the likeliest choice, and `acc_norm` the likeliest by character. The
        continuation stands in the answer's place, without the space that the harness puts before it, and without an
        end of the answer.

        Raises:
            ValueError: as [`~AgeVlmChat.generate_until`].
        """
        _keep_scores()  # once more, for a harness that was imported after this model was made
        return self._in_batches(requests, self._scores)

    def _messages(self, request: Instance) -> list[dict]:
        text = request.args[0]
        doc_to_visual, doc_id, task, split = request.args[2:]
        visuals = doc_to_visual(self._document(task, split, doc_id)) or []
        parts = [{"type": _visual_type(visual), "url": visual} for visual in visuals]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

    @torch.no_grad()
    def _scores(self, batch: list[Instance]) -> list[tuple[float, bool]]:
        from ..inference.generation import check_finite

        prompts, images = self._prompts(batch, [self._messages(request) for request in batch])
        continuations = []
        for request in batch:
            continuation, _, doc_id, task, split = request.args[1:]
            if callable(continuation):
                continuation = continuation(self._document(task, split, doc_id))
            continuations.append(str(continuation).lstrip())
        texts = [prompt + continuation for prompt, continuation in zip(prompts, continuations, strict=True)]
        inputs = self._inputs(texts, images, return_offsets_mapping=True)
        ends = inputs.pop("offset_mapping")[..., 1]
        scored = ends > torch.tensor([len(prompt) for prompt in prompts])[:, None]
        scored &= inputs["attention_mask"].bool()
        inputs, scored = inputs.to(self.device), scored.to(self.device)

        # Rows end together, so the last positions are all that the large vocabulary is needed for.
        last = max(1, int(scored.sum(-1).max()))
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = self.model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=last + 1).logits
        logits, targets, scored = logits[:, :-1].float(), inputs["input_ids"][:, -last:], scored[:, -last:]
        check_finite(self.model, logits.amax(-1).isfinite() | ~scored, _asked(batch))
        losses = -logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        greedy = ((logits.argmax(-1) == targets) | ~scored).all(-1)
        results = list(zip(losses.masked_fill(~scored, 0).sum(-1).tolist(), greedy.tolist(), strict=True))
        for prompt, continuation, result in zip(prompts, continuations, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", (prompt, continuation), result)
        return results


def _generation_kwargs(request: Instance) -> dict[str, Any]:
    """The task's settings: the only dictionary among the arguments, in either interface."""
    return next(argument for argument in request.args if isinstance(argument, dict))


def _asked(batch: list[Instance]) -> list[str]:
    """What each request of a batch asks, for messages."""
    return [f"document {request.doc_id} of task '{request.task_name}'" for request in batch]


def _options(gen_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` for the settings of a task; they override the checkpoint's own, which may sample."""
    options = {name: gen_kwargs[name] for name in _OPTIONS if gen_kwargs.get(name) is not None}
    temperature, do_sample = options.get("temperature"), gen_kwargs.get("do_sample")
    sample = (bool(temperature) if do_sample is None else bool(do_sample)) and temperature != 0
    greedy = {} if sample else {"temperature": None, "top_p": None, "top_k": None}
    return {"max_new_tokens": _MAX_NEW_TOKENS, **options, **greedy, "do_sample": sample}


def _visual_type(visual: Any) -> str:
    """`image` for pictures and names of picture files, else what the simple interface means by its other types."""
    if isinstance(visual, Image.Image):
        return "image"
    if isinstance(visual, str):
        return (mimetypes.guess_type(visual)[0] or "video").partition("/")[0]
    return "audio" if isinstance(visual, dict) else type(visual).__name__


def _keep_scores() -> None:
    """Lets the harness, if it is there, keep what `loglikelihood` returns.

    Version 0.7 makes strings of all answers that are no text, of these pairs too, and then fails to score them.
    """
    evaluator = sys.modules.get("lmms_eval.evaluator")
    score = (0.0, True)
    if evaluator is None or evaluator.unwrap_generation_output(score)[0] == score:
        return
    unwrap = evaluator.unwrap_generation_output

    def unwrap_text(output: Any) -> tuple[Any, TokenCounts | None]:
        # A list is a pair that comes from the harness's response cache.
        if isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[1], bool):
            return tuple(output), None
        return unwrap(output)

    evaluator.unwrap_generation_output = unwrap_text  # type: ignore[attr-defined]
