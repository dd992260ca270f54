# SPDX-License-Identifier: Apache-2.0
"""Batches by number of tokens and by weights: what they hold, who gets them, and that they are the same wherever a run resumes."""

import itertools
from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from tiny_models import tiny_llama
from tiny_training import tiny_processor, tiny_trainable
from training_runs import SETTINGS, Recorder, mixed_rows, train
from transformers import Trainer

from agevlm.data.mixture import GROUP_COLUMN, WEIGHT_COLUMN
from agevlm.trainer import AgeVlmTrainer, AgeVlmTrainingArguments, OptimizerMixin, SamplingMixin
from agevlm.trainer.sampling import GroupedBatches, count_tokens

LENGTHS = [5 + (7 * i) % 31 for i in range(200)]
GROUPS = ["ab"[i % 10 == 0] for i in range(200)]  # 20 rows of b


def epoch(number: int = 0, **kwargs) -> list[list[int]]:
    batches = GroupedBatches(LENGTHS, **kwargs)
    batches.set_epoch(number)
    drawn = list(batches)
    assert len(drawn) == len(batches)
    return drawn


def test_an_epoch_has_every_row_once_in_batches_of_similar_length():
    batches = epoch(tokens=100)
    assert sorted(itertools.chain(*batches)) == list(range(200))
    spread = []
    for batch in batches:
        lengths = [LENGTHS[row] for row in batch]
        assert len(batch) * max(lengths) <= 100
        spread.append(max(lengths) - min(lengths))
    assert max(spread[:-1]) < 10, "lengths are from 5 to 35"
    assert sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches) > 80 * (len(batches) - 1)
    assert [max(LENGTHS[row] for row in b) for b in batches] != sorted(max(LENGTHS[row] for row in b) for b in batches)


def test_a_row_longer_than_a_batch_is_a_batch_of_its_own():
    assert sorted(GroupedBatches([50, 3, 3], tokens=10)) == [[0], [1, 2]]


def test_batches_depend_on_seed_and_epoch_alone():
    for kwargs in ({"tokens": 100}, {"rows": 4, "groups": GROUPS, "weights": {"a": 1.0, "b": 1.0}}):
        assert epoch(**kwargs) == epoch(**kwargs)
        assert epoch(**kwargs) != epoch(**kwargs, seed=1)
        assert epoch(**kwargs) != epoch(1, **kwargs)
        assert epoch(1, **kwargs) != epoch(2, **kwargs)


@pytest.mark.parametrize("size", [{"tokens": 100}, {"rows": 5}])
def test_weights_are_shares_of_the_batches(size):
    """A batch is of one group; a small group is seen again before a large one is seen once."""
    batches = [b for e in range(20) for b in epoch(e, **size, groups=GROUPS, weights={"a": 1.0, "b": 3.0})]
    kinds = Counter()
    for batch in batches:
        (kind,) = {GROUPS[row] for row in batch}
        kinds[kind] += 1
    assert kinds["b"] / len(batches) == pytest.approx(0.75, abs=0.06)
    seen = Counter(row for batch in epoch(**size, groups=GROUPS, weights={"a": 1.0, "b": 3.0}) for row in batch)
    small = [seen[row] for row in range(200) if GROUPS[row] == "b"]
    assert min(small) > 1
    assert max(small) - min(small) <= 1, "each row of a group before any of them again"


@pytest.mark.parametrize("weights", [None, {"a": 1.0, "b": 1.0}])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_of_one(weights, processes):
    kwargs = {"tokens": 100, "groups": GROUPS if weights else None, "weights": weights}
    shares = [epoch(2, **kwargs, processes=processes, process=i) for i in range(processes)]
    together = list(itertools.chain(*zip(*shares, strict=True)))
    one = epoch(2, **kwargs)
    assert together[: len(one)] == one or weights
    assert len(one) <= len(together) < len(one) + processes
    if not weights:
        assert together[len(one) :] == one[: len(together) - len(one)]


def test_accelerate_shares_the_batches_of_one_process_alike():
    whole = GroupedBatches(LENGTHS[:190], tokens=100)
    for process in range(2):
        mine = GroupedBatches(LENGTHS[:190], tokens=100, processes=2, process=process)
        assert list(BatchSamplerShard(whole, 2, process)) == list(mine)


def test_a_batch_has_one_kind_of_size():
    for size in ({}, {"tokens": 1, "rows": 1}):
        with pytest.raises(ValueError, match="either `tokens` or `rows`"):
            GroupedBatches(LENGTHS, **size)


def test_tokens_are_counted_in_every_form_of_row():
    dataset, tokenizer = mixed_rows("t2"), tiny_processor().tokenizer
    lengths = count_tokens(dataset, tokenizer)
    for row, length in zip(dataset, lengths, strict=True):
        texts = [part["text"] for message in row["messages"] for part in message["content"] if part["type"] == "text"]
        assert length == sum(len(tokenizer.tokenize(text)) for text in texts) + 12
    messages = [row["messages"] for row in dataset]
    split = type(dataset).from_dict({"prompt": [m[:1] for m in messages], "completion": [m[1:] for m in messages]})
    assert count_tokens(split, tokenizer) == lengths
    plain = type(dataset).from_dict({"prompt": ["the dog"], "completion": [None]})
    assert count_tokens(plain, tokenizer) == [len(tokenizer.tokenize("the dog")) + 6]
    assert count_tokens(type(dataset).from_dict({"input_ids": [[1, 2], [3]]}), tokenizer) == [2, 1]
    with pytest.raises(ValueError, match="one of the columns messages, prompt"):
        count_tokens(type(dataset).from_dict({"text": ["a"]}), tokenizer)


# --- in training ---

RANDOM = {"train_sampling_strategy": "random", "learning_rate": 1e-2, "tokens_per_batch": 90}
KINDS = "t1u2a1t12u1"  # 11 rows, 4 batches


@pytest.mark.parametrize("trainer", ["own", "sft"])
def test_a_resumed_run_sees_the_batches_of_one_that_was_never_stopped(tmp_path, trainer):
    """Within the first and within a later epoch, with accumulated gradients."""
    settings = {**RANDOM, "trainer": trainer, "max_steps": 6, "gradient_accumulation_steps": 2, "num_train_epochs": 9}
    whole = train(tmp_path, KINDS, **settings, save_strategy="steps", save_steps=1)
    rows = [sorted(batch) for batch in whole["batches"]]
    number = next(n for n in range(1, len(rows)) if sorted(itertools.chain(*rows[:n])) == list(range(len(KINDS))))
    steps_an_epoch = -(-number // 2)
    assert steps_an_epoch < 5, "the later resumed run begins in the second epoch"
    assert sorted(itertools.chain(*rows[number : 2 * number])) == list(range(len(KINDS)))
    assert rows[:number] != rows[number : 2 * number]
    for step in (1, 3, 5):
        resumed = train(tmp_path, KINDS, **settings, resume=str(tmp_path / f"checkpoint-{step}"))
        # Batches are collated one ahead, and skipped ones not at all.
        first = step // steps_an_epoch * number + step % steps_an_epoch * 2
        assert resumed["batches"][:2] == whole["batches"][first : first + 2], step
        assert all(torch.equal(whole["weights"][name], value) for name, value in resumed["weights"].items()), step


def weighted_rows(kinds: str):
    dataset = mixed_rows(kinds)
    groups = [int(kind == "t") for kind in kinds]
    dataset = dataset.add_column(GROUP_COLUMN, groups)
    return dataset.add_column(WEIGHT_COLUMN, [(0.25, 0.75)[group] for group in groups])


class OtherTrainer(SamplingMixin, OptimizerMixin, Trainer):
    """Of any model."""


def loader_batches(trainer_class, model, dataset, folder, **settings) -> list[list[int]]:
    """The rows of an epoch's batches, as a trainer's loader collates them."""
    args = AgeVlmTrainingArguments(str(folder), **{**SETTINGS, "train_sampling_strategy": "random", **settings})
    recorder = Recorder(tiny_processor())
    trainer = trainer_class(
        model=model, args=args, train_dataset=dataset, processing_class=tiny_processor(), data_collator=recorder
    )
    assert len(list(trainer.get_train_dataloader())) == len(recorder.batches)
    return recorder.batches


@pytest.mark.parametrize("settings", [{"tokens_per_batch": 90}, {"per_device_train_batch_size": 2}])
def test_the_same_seed_gives_the_same_batches_to_any_model(tmp_path, settings):
    dataset = weighted_rows("t1u2t1u12tu1a1t2u12")
    ours = loader_batches(AgeVlmTrainer, tiny_trainable(), dataset, tmp_path, **settings)
    assert ours == loader_batches(OtherTrainer, tiny_llama(), dataset, tmp_path, **settings)
    assert ours != loader_batches(OtherTrainer, tiny_llama(), dataset, tmp_path, **settings, seed=1)
    assert all(len({dataset[row][GROUP_COLUMN] for row in batch}) == 1 for batch in ours)


def test_lengths_may_be_given_and_are_cut_where_texts_are(tmp_path):
    dataset = mixed_rows("1" * 12).add_column("length", [40] * 12)
    sizes = [
        len(batch) for batch in loader_batches(AgeVlmTrainer, tiny_trainable(), dataset, tmp_path, tokens_per_batch=80)
    ]
    assert sizes == [2] * 6
    cut = {"tokens_per_batch": 80, "max_length": 20}
    assert [len(batch) for batch in loader_batches(AgeVlmTrainer, tiny_trainable(), dataset, tmp_path, **cut)] == [
        4
    ] * 3


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train_sampling_strategy=group_by_length .* exclude each other"):
        train(tmp_path, KINDS, tokens_per_batch=90, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="tokens_per_batch must be at least 1, got 0"):
        AgeVlmTrainingArguments(str(tmp_path), tokens_per_batch=0)
    rows = torch.utils.data.StackDataset(index=[1, 2])
    with pytest.raises(ValueError, match=r"tokens_per_batch needs a `datasets\.Dataset`, got StackDataset"):
        loader_batches(AgeVlmTrainer, tiny_trainable(), rows, tmp_path, tokens_per_batch=90)
