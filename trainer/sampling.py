# SPDX-License-Identifier: Apache-2.0
"""Which rows train together: batches by number of tokens and by weights, which depend on the data and the seed alone."""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_pt_utils import BatchRebalanceSampler

from ..attention.guidance import AnyTrainer
from ..data.mixture import GROUP_COLUMN, WEIGHT_COLUMN
from ..data.streaming import LEFT_OUT, RowStream, add_left_out
from ..processing.rows import ORIGIN_COLUMN, message_text

if TYPE_CHECKING:
    from datasets import Dataset

    from .arguments import AgeVlmTrainingArguments

_CONVERSATIONS = ("messages", "prompt", "completion", "chosen", "rejected")

# What chat templates write around a message, about.
_TOKENS_AROUND_A_MESSAGE = 6


def count_tokens(dataset: "Dataset", tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Estimates the text tokens of each row: its messages' and six around each, or the length of its `input_ids`.

    Raises:
        ValueError: if the rows have no texts.
    """
    if "input_ids" in dataset.column_names:
        return [len(ids) for batch in dataset.select_columns("input_ids").iter(1000) for ids in batch["input_ids"]]
    columns = [name for name in _CONVERSATIONS if name in dataset.column_names]
    if not columns:
        raise ValueError(f"tokens_per_batch needs one of the columns {', '.join(_CONVERSATIONS)}: {dataset!r:.300}")
    lengths = []
    for batch in dataset.select_columns(columns).iter(1000):
        texts: list[list[str]] = []
        for row in zip(*(batch[name] for name in columns), strict=True):
            messages = [m for column in row for m in ([column] if isinstance(column, str) else column or [])]
            texts.append([m if isinstance(m, str) else message_text(m) for m in messages])
        flat = [text for row_texts in texts for text in row_texts]
        counts = iter(tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
        lengths += [sum(len(next(counts)) + _TOKENS_AROUND_A_MESSAGE for _ in row_texts) for row_texts in texts]
    return lengths


class GroupedBatches(BatchRebalanceSampler):
    """Batches of rows of one group and of similar length, so that short answers are not padded to long conversations, and a
    batch of the ones holds as much to learn as a batch of the others.

    Without weights, an epoch has each row once. With weights, an epoch has as many batches, whose groups are drawn by
    their weights; a group that is used up starts again. The batches of an epoch depend on the arguments and
    [`set_epoch`] alone. With `n` processes, each takes every `n`-th of the same batches. All take equally many;
    the first batches are repeated where needed.

    It is of this class because Transformers' `Trainer` takes sampled batches from no other.

    Args:
        lengths: tokens of each row.
        tokens: most tokens of a batch, all rows padded to its longest. A longer row is a batch by itself.
        rows: most rows of a batch, in place of `tokens`.
        groups: the group of each row; all are in one by default.
        weights: share of the batches of each group, of any sum; none by default.
        seed: of the order.
        processes: how many processes train.
        process: which of them this is.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        tokens: int | None = None,
        rows: int | None = None,
        groups: Sequence[Any] | None = None,
        weights: dict[Any, float] | None = None,
        seed: int = 0,
        processes: int = 1,
        process: int = 0,
    ):
        if (tokens is None) == (rows is None):
            raise ValueError("Give the size of a batch as either `tokens` or `rows`.")
        self.lengths, self.tokens, self.rows, self.weights = lengths, tokens, rows, weights
        self.seed, self.processes, self.process, self.epoch = seed, processes, process, 0
        self._members: dict[Any, list[int]] = defaultdict(list)
        for row, group in enumerate(groups if groups is not None else [None] * len(lengths)):
            self._members[group].append(row)
        # The order of rows of the same length does not change how many batches there are.
        self._counts = {group: len(self._divide(group, lambda: 0.0)) for group in self._members}
        self._number = -(-sum(self._counts.values()) // processes) * processes

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._number // self.processes

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches()[self.process :: self.processes])

    def _batches(self) -> list[list[int]]:
        """The epoch's batches of all processes."""
        draw = random.Random(f"{self.seed} {self.epoch}")
        waiting: dict[Any, list[list[int]]] = {}

        def take(group: Any) -> list[int]:
            if not waiting.get(group):
                waiting[group] = self._divide(group, draw.random)
                draw.shuffle(waiting[group])
            return waiting[group].pop()

        if self.weights is None:
            batches = [take(group) for group, count in self._counts.items() for _ in range(count)]
            draw.shuffle(batches)
        else:
            chosen = draw.choices(list(self.weights), list(self.weights.values()), k=self._number)
            batches = [take(group) for group in chosen]
        return [batches[i % len(batches)] for i in range(self._number)]

    def _divide(self, group: Any, order: Callable[[], float]) -> list[list[int]]:
        """A group's rows in batches, from the longest on; `order` decides between rows of the same length."""
        left = sorted(self._members[group], key=lambda row: (self.lengths[row], order()))
        batches = []
        while left:
            size = self.rows or max(1, self.tokens // max(1, self.lengths[left[-1]]))  # type: ignore[operator]
            batches.append(left[-size:])
            del left[-size:]
        return batches


class _SetEpoch(TrainerCallback):
    """Says the epoch to the batches when a run is resumed within one, where Transformers and accelerate do not."""

    def __init__(self, batches: GroupedBatches):
        self.batches = batches

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.batches.set_epoch(int(state.epoch))


class _SkipTrained(TrainerCallback):
    """Says to a stream how many batches were trained before the run was resumed. Transformers takes and drops as many, without
    rows here, so that no image of theirs is decoded."""

    def __init__(self, stream: RowStream):
        self.stream = stream

    def on_train_begin(self, args, state, control, **kwargs):
        trained = 0 if args.ignore_data_skip else state.global_step * args.gradient_accumulation_steps
        self.stream.skip_batches = trained


class _StreamCollator:
    """Makes batches of a stream's rows, with the numbers of rows that were left out on the way. Batches without rows are empty."""

    def __init__(self, collator: Callable[[list], dict[str, Any]]):
        self.collator = collator

    def __call__(self, rows: list) -> dict[str, Any]:
        if rows[0] is None:
            return {}
        left_out: dict[str, list] = {}
        for row in rows:
            add_left_out(left_out, row[ORIGIN_COLUMN].get(LEFT_OUT, {}))
        batch = self.collator(rows)
        return {**batch, LEFT_OUT: left_out} if left_out else batch


def check_stream(args: "AgeVlmTrainingArguments", rows: int | None = None) -> None:
    """
    Args:
        args: of a training on a stream.
        rows: of an epoch, where that is known.

    Raises:
        ValueError: if the training needs what a stream does not have.
    """
    if args.max_steps <= 0:
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = (
            ""
            if rows is None
            else f" ({math.ceil(rows * args.num_train_epochs / step)} for {args.num_train_epochs:g} epochs)"
        )
        raise ValueError(f"A stream (`streaming: true`) has no end: set training.max_steps{steps}.")
    if args.tokens_per_batch is not None:
        raise ValueError(
            "tokens_per_batch needs the length of every row before training, and a stream (`streaming: true`) is read on the way: "
            "set training.per_device_train_batch_size in its place."
        )
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy} needs all rows before training, and a stream (`streaming: "
            "true`) is read on the way: leave it out."
        )


class SamplingMixin(AnyTrainer):
    """Batches by number of tokens (`args.tokens_per_batch`) and by the weights of a mixture, for any trainer.

    [`~agevlm.data.mixture.read_mixture`] writes the weights into columns of the data set. Without
    either, batches are Transformers' own. The same data, seed and tokenizer give the same batches to any model.

    Of a stream ([`~agevlm.data.streaming.RowStream`]) each process and worker reads its share.

    Raises:
        ValueError: if the data has no length, or `train_sampling_strategy` asks for something else.
    """

    data_collator: Any

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = [
            "messages",
            "prompt",
            "completion",
            "image",
            "images",
            "grounding",
            ORIGIN_COLUMN,
            self.args.length_column_name,
        ]
        self._signature_columns += [name for name in columns if name not in self._signature_columns]

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, RowStream):
            return self._stream_dataloader(self.train_dataset)
        tokens = self.args.tokens_per_batch
        if tokens is not None and not hasattr(self.train_dataset, "column_names"):
            raise ValueError(
                f"tokens_per_batch needs a `datasets.Dataset`, got {type(self.train_dataset).__name__}: leave it out."
            )
        return super().get_train_dataloader()

    def _stream_dataloader(self, stream: RowStream):
        args = self.args
        check_stream(args)
        # By default, accelerate would read in the first process and send parts of its batches to the others.
        self.accelerator.dataloader_config.dispatch_batches = False
        collator: Any = self.data_collator
        self.data_collator = _StreamCollator(collator)
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = collator
        seed = args.seed if args.data_seed is None else args.data_seed
        if isinstance(shard := loader.dataset, IterableDatasetShard):
            stream.begin(seed, self._train_batch_size, shard.num_processes, shard.process_index)
        else:
            stream.begin(seed, self._train_batch_size)
        self._left_out: dict[str, list] = {}
        self.remove_callback(_SkipTrained)
        self.add_callback(_SkipTrained(stream))
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        if isinstance(self.train_dataset, RowStream):
            epoch_iterator = map(self._count_left_out, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _count_left_out(self, batch: dict[str, Any]) -> dict[str, Any]:
        add_left_out(self._left_out, batch.pop(LEFT_OUT, {}))
        return batch

    def left_out(self) -> dict[str, Any]:
        """The rows of a stream that were left out, of all processes: by kind their number, and the first."""
        found: dict[str, list] = {}
        for part in gather_object([self._left_out]):
            add_left_out(found, part)
        return {kind: {"rows": number, "first": first} for kind, (number, first) in sorted(found.items())}

    def _get_train_sampler(self, train_dataset=None):
        # The argument `train_dataset` lacks the columns that the model has no use for.
        dataset, args = self.train_dataset, self.args
        columns = getattr(dataset, "column_names", ())
        weighted, tokens = WEIGHT_COLUMN in columns, args.tokens_per_batch
        if not weighted and tokens is None:
            return super()._get_train_sampler(train_dataset)
        if args.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={args.train_sampling_strategy} and a weighted mixture or tokens_per_batch exclude "
                "each other: leave one out."
            )
        if args.length_column_name in columns:
            lengths = dataset[args.length_column_name]
        else:
            lengths = count_tokens(dataset, getattr(self.processing_class, "tokenizer", self.processing_class))
        if limit := getattr(args, "max_length", None):
            lengths = [min(length, limit) for length in lengths]
        groups = dataset[GROUP_COLUMN] if weighted else None
        batches = GroupedBatches(
            lengths,
            tokens=tokens,
            rows=self._train_batch_size if tokens is None else None,
            groups=groups,
            weights=dict(sorted(zip(groups, dataset[WEIGHT_COLUMN], strict=True))) if groups is not None else None,
            seed=args.seed if args.data_seed is None else args.data_seed,
            processes=args.world_size,
            process=args.process_index,
        )
        self.remove_callback(_SetEpoch)
        self.add_callback(_SetEpoch(batches))
        return batches
