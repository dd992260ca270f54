# SPDX-License-Identifier: Apache-2.0
"""Two processes that share the batches learn from maps what one process learns: DDP and FSDP2, with and without checkpointing."""

import pytest
import torch
from distributed_maps import WAYS, distance, gradients, loss_of, model_to_train
from tiny_vlms import CONFIGURATIONS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two processes")]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_two_processes_have_the_gradients_of_one(kind, way, checkpointing, shared, alone):
    for process in shared:
        found = process[kind, way, checkpointing]
        assert not isinstance(found, str), found
        assert distance(found, alone[kind]) < 1e-5


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_the_maps_are_part_of_these_gradients(kind, alone):
    """Otherwise the test above would prove little."""
    model = model_to_train(kind, checkpointing=False)
    for batch in range(2):
        (loss_of(model, kind, batch, maps_weight=0) / 2).backward()
    without = gradients(model)
    moved = [name for name in alone[kind] if "q_proj" in name or "k_proj" in name]
    assert any(not torch.allclose(without[name], alone[kind][name], rtol=0.1) for name in moved)
