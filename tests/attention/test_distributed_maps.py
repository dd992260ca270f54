# SPDX-License-Identifier: Apache-2.0
"""Two processes that share the batches learn from maps what one process learns: DDP and FSDP2, with and without checkpointing."""

import multiprocessing
from pathlib import Path

import distributed_maps
import pytest
import torch
from distributed_maps import WAYS, gradients, loss_of, model_to_train, share_gradients
from tiny_vlms import CONFIGURATIONS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two processes")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> list[dict]:
    """What each of two processes kept."""
    folder = tmp_path_factory.mktemp("gradients")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_maps"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(distributed_maps.__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        processes = [
            context.Process(target=share_gradients, args=(rank, str(folder), list(CONFIGURATIONS)), daemon=True)
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    """The gradients of the mean loss of both batches, by architecture."""
    found = {}
    for kind in CONFIGURATIONS:
        model = model_to_train(kind, checkpointing=False)
        for batch in range(2):
            (loss_of(model, kind, batch) / 2).backward()
        found[kind] = gradients(model)
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_two_processes_have_the_gradients_of_one(kind, way, checkpointing, shared, alone):
    for process in shared:
        found = process[kind, way, checkpointing]
        assert not isinstance(found, str), found
        largest = max(float(g.abs().max()) for g in alone[kind].values())
        assert largest > 0
        for name, gradient in alone[kind].items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * largest), name


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_the_maps_are_part_of_these_gradients(kind, alone):
    """Otherwise the test above would prove little."""
    model = model_to_train(kind, checkpointing=False)
    for batch in range(2):
        (loss_of(model, kind, batch, maps_weight=0) / 2).backward()
    without = gradients(model)
    moved = [name for name in alone[kind] if "q_proj" in name or "k_proj" in name]
    assert any(not torch.allclose(without[name], alone[kind][name], rtol=0.1) for name in moved)
