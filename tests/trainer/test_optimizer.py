# SPDX-License-Identifier: Apache-2.0
"""Muon against timm's and AdamW against PyTorch's, orthogonality, groups of parameters, and what is refused."""

import copy

import pytest
import timm.optim.muon
import torch
from tiny_training import tiny_processor, tiny_trainable
from training_runs import SETTINGS, mixed_rows, train

from agevlm.trainer import AgeVlmTrainer, AgeVlmTrainingArguments, freeze, optimizer
from agevlm.trainer.optimizer import Muon, MuonOptions, fastest_dtype, optimizer_groups
from agevlm.trainer.stages import group_parameters
from agevlm.trainer.trl_trainers import AgeVlmDPOConfig, AgeVlmSFTConfig

SHAPES = [(8, 12), (12, 8), (6, 3, 2, 2)]


def parameters(shapes, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def take_steps(
    algorithm: torch.optim.Optimizer, trained: list[torch.nn.Parameter], steps: int = 3
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        algorithm.step()
    return [parameter.detach() for parameter in trained]


@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_move_as_with_timm(monkeypatch, nesterov):
    monkeypatch.setattr(optimizer, "fastest_dtype", lambda device: torch.bfloat16)  # timm's only type
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "ns_steps": 4}
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    expected = take_steps(timm.optim.muon.Muon(theirs, **settings), theirs)
    for actual, other in zip(take_steps(Muon(ours, **settings), ours), expected, strict=True):
        assert torch.equal(actual, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_orthogonal_and_as_long_as_adams(monkeypatch, dtype):
    monkeypatch.setattr(optimizer, "fastest_dtype", lambda device: dtype)
    (parameter,) = parameters([(16, 24)])
    before = parameter.detach().clone()
    (after,) = take_steps(Muon([parameter], lr=1.0), [parameter], steps=1)
    step = after - before
    singular = torch.linalg.svdvals(step) / (0.2 * 24**0.5)
    assert (singular - 1).abs().max() < 0.15
    assert step.square().mean().sqrt().item() == pytest.approx(
        0.2, rel=0.1
    )  # AdamW's, as arXiv 2502.16982 measures it


def test_orthogonalizes_in_float32_where_the_cpu_lacks_bfloat16(monkeypatch):
    asked = []
    orthogonalize = optimizer.zeropower_via_newtonschulz
    monkeypatch.setattr(
        optimizer,
        "zeropower_via_newtonschulz",
        lambda *a, dtype: asked.append(dtype) or orthogonalize(*a, dtype=dtype),
    )
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda supported=supported: supported)
        assert fastest_dtype(torch.device("cpu")) == expected
        (parameter,) = parameters([(4, 4)])
        take_steps(Muon([parameter]), [parameter], steps=1)
        assert asked.pop() == expected
    assert fastest_dtype(torch.device("cuda")) == torch.bfloat16


def test_the_rest_moves_as_with_adamw():
    settings = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}
    shapes = [(8, 12), (5,), ()]
    ours, theirs = parameters(shapes), parameters(shapes)
    expected = take_steps(torch.optim.AdamW(theirs, **settings), theirs)
    muon = Muon([{"params": ours, "use_muon": False}], **settings)
    for actual, other in zip(take_steps(muon, ours), expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-6, atol=1e-7)


def test_state_is_kept():
    """Steps are the same after the state went through a dictionary, as in a checkpoint."""

    def new_muon(trained):
        return Muon([{"params": trained[:1]}, {"params": trained[1:], "use_muon": False}], lr=0.1)

    whole = parameters([(4, 6), (5,)])
    first = new_muon(whole)
    take_steps(first, whole)
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in whole]
    second = new_muon(resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    expected = take_steps(first, whole)
    assert all(map(torch.equal, take_steps(second, resumed), expected))


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"Muon trains matrices, got the shape \(5,\)"):
        Muon(parameters([(4, 4), (5,)]))
    with pytest.raises(ValueError, match=r"got the shape \(8, 1, 3, 3\)"):  # depthwise
        Muon(parameters([(8, 1, 3, 3)]))


def test_groups_for_muon():
    """Matrices are Muon's; gates, norms, biases, depthwise convolutions and embeddings are AdamW's, with its rate."""
    model = tiny_trainable()
    freeze(model, "full")
    rates = {"cross_attention": 1e-2, "vision": 1e-4}
    options = MuonOptions(adamw_lr_scale=0.5)
    groups = optimizer_groups(model, 0.1, rates, learning_rate=1e-3, muon=options)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, members in group_parameters(model).items():
        for member, parameter in members.items():
            if name == "vision_last_block":
                continue
            group = found[id(parameter)]
            matrix = parameter.ndim >= 2 and parameter.shape[1] > 1 and name != "embeddings"
            assert group["use_muon"] == matrix, member
            assert group["lr"] == pytest.approx(rates.get(name, 1e-3) * (1 if matrix else 0.5)), member
            assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0), member
    assert groups[0]["lr"] == 1e-3, "what is logged"


def trainer(folder, **settings) -> AgeVlmTrainer:
    args = AgeVlmTrainingArguments(str(folder), **{**SETTINGS, **settings})
    return AgeVlmTrainer(
        model=tiny_trainable(), args=args, train_dataset=mixed_rows("12"), processing_class=tiny_processor()
    )


def test_arguments_reach_the_optimizer(tmp_path):
    muon_optimizer = trainer(
        tmp_path, optim="muon", optim_args="adamw_lr_scale=0.25, momentum=0.8,nesterov=false,ns_steps=3", learning_rate=8e-3,
        adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-5, stage="guide", group_learning_rates={"vision_last_block": 4e-4},
    ).create_optimizer()  # fmt: skip
    assert isinstance(muon_optimizer, Muon)
    for group in muon_optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["ns_steps"]) == (0.8, False, 3)
        assert (group["betas"], group["eps"]) == ((0.7, 0.8), 1e-5)
    rates = [(group["use_muon"], group["lr"]) for group in muon_optimizer.param_groups]
    assert sorted(set(rates)) == [(False, 1e-4), (False, 2e-3), (True, 4e-4), (True, 8e-3)]


@pytest.mark.parametrize("args_class", [AgeVlmTrainingArguments, AgeVlmSFTConfig, AgeVlmDPOConfig])
def test_every_configuration_takes_it_and_names_mistakes(tmp_path, args_class):
    settings = {"use_cpu": True, "bf16": False}
    assert args_class(str(tmp_path), optim="muon", **settings).optim == "muon"
    assert args_class(str(tmp_path), optim="muon", **settings).to_dict()["optim"] == "muon"
    with pytest.raises(ValueError, match=r"no 'optim_args\.momentun': did you mean 'momentum'"):
        args_class(str(tmp_path), optim="muon", optim_args="momentun=0.9", **settings)
    with pytest.raises(ValueError, match=r"optim_args\.momentum must be a number, got 'much'"):
        args_class(str(tmp_path), optim="muon", optim_args="momentum=much", **settings)
    with pytest.raises(ValueError, match="moun is not a valid OptimizerNames"):
        args_class(str(tmp_path), optim="moun", **settings)


@pytest.mark.parametrize("kind", ["own", "sft"])
def test_training_with_muon_learns_and_resumes(tmp_path, kind):
    settings = {"trainer": kind, "optim": "muon", "learning_rate": 2e-2, "max_steps": 8, "stage": "guide"}
    whole = train(tmp_path, "1", **settings, save_strategy="steps", save_steps=4)
    losses = [entry["lm_loss"] for entry in whole["logs"] if "lm_loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    resumed = train(tmp_path, "1", **settings, resume=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(whole["weights"][name], value) for name, value in resumed["weights"].items())


def test_zero_is_refused(tmp_path, monkeypatch):
    muon_trainer = trainer(tmp_path, optim="muon")
    monkeypatch.setattr(muon_trainer, "is_deepspeed_enabled", True)
    with pytest.raises(ValueError, match="optim=muon needs whole matrices"):
        muon_trainer.create_optimizer()
