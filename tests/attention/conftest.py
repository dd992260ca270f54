# SPDX-License-Identifier: Apache-2.0
import multiprocessing
from pathlib import Path

import distributed_maps
import pytest
import torch
from distributed_maps import gradients, loss_of, model_to_train, share_gradients
from tiny_vlms import CONFIGURATIONS


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> list[dict]:
    """What each of two processes kept, see [`share_gradients`]."""
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


@pytest.fixture(scope="session")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    """The gradients of the mean loss of both batches in one process, by architecture."""
    found = {}
    for kind in CONFIGURATIONS:
        model = model_to_train(kind, checkpointing=False)
        for batch in range(2):
            (loss_of(model, kind, batch) / 2).backward()
        found[kind] = gradients(model)
    return found
