# SPDX-License-Identifier: Apache-2.0
"""The optimizer: groups of parameters with their learning rates, and Muon beside Transformers' own optimizers."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import nn
from torch.optim.adamw import adamw
from transformers.trainer_optimizer import is_optimizer_factory

from ..attention.guidance import AnyTrainer
from .parser import parse, read_yaml
from .stages import GROUPS, last_block, resolve_groups

MUON = "muon"
"""`optim` of the training arguments for [`Muon`]."""

# https://leloykun.github.io/ponder/muon-opt-coeffs
_NEWTON_SCHULZ = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def fastest_dtype(device: torch.device | None = None) -> torch.dtype:
    """bfloat16 on accelerators and on CPUs with instructions for it; float32 on other CPUs, where it is several times faster.

    Args:
        device: by default the accelerator where there is one, else the CPU.
    """
    on_cpu = not torch.accelerator.is_available() if device is None else device.type == "cpu"
    if on_cpu and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.float32
    return torch.bfloat16


@dataclass
class MuonOptions:
    """`optim_args` of `optim: muon`, as `adamw_lr_scale=0.33,momentum=0.9`.

    Args:
        adamw_lr_scale: learning rate of what AdamW trains, in parts of that of the matrices.
        momentum: of the matrices.
        nesterov: whether a matrix is moved by the next step's momentum.
        ns_steps: steps of the orthogonalization.
    """

    adamw_lr_scale: float = 1.0
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5

    @classmethod
    def read(cls, text: str | None) -> "MuonOptions":
        """
        Raises:
            ValueError: for an unknown name or a value of the wrong type.
        """
        pairs = [pair.partition("=") for pair in (text or "").replace(" ", "").split(",") if pair]
        return parse(cls, {name: read_yaml(value, "optim_args") for name, _, value in pairs}, "optim_args")


class Muon(torch.optim.Optimizer):
    """Muon for matrices (momentum, orthogonalized by Newton-Schulz iteration), and AdamW for the rest.

    The size of an orthogonal step is that of AdamW's (arXiv 2502.16982), so that AdamW's learning rates and weight decays
    are a start. It is orthogonalized in bfloat16, but in float32 on CPUs without instructions for bfloat16. Convolutions are
    matrices of an output channel a row.

    Args:
        params: parameters, or groups of them; a group with `use_muon=False` is AdamW's.
        lr: learning rate.
        weight_decay: decoupled, as AdamW's.
        momentum: of matrices.
        nesterov: whether a matrix is moved by the next step's momentum.
        ns_steps: steps of the iteration.
        betas: of AdamW.
        eps: of AdamW.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "betas": betas,
            "eps": eps,
            "use_muon": True,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            if group["use_muon"] and (flat := [p.shape for p in group["params"] if not is_matrix(p)]):
                raise ValueError(
                    f"Muon trains matrices, got the shape {tuple(flat[0])}: put it in a group of use_muon=False."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: computes the loss again.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["use_muon"]:
                for parameter in parameters:
                    self._step_matrix(parameter, group)
            elif parameters:
                self._step_adamw(parameters, group)
        return loss

    def _step_matrix(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
        update = parameter.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = zeropower_via_newtonschulz(
            update if update.ndim == 2 else update.flatten(1),
            group["ns_steps"],
            _NEWTON_SCHULZ,
            dtype=fastest_dtype(parameter.device),
        )
        scale = get_lr_scale(update.shape, "match_rms_adamw")
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)

    def _step_adamw(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def is_matrix(parameter: torch.Tensor) -> bool:
    """Whether Muon can train a parameter: a matrix, or a convolution that is no depthwise one."""
    return parameter.ndim >= 2 and min(parameter.shape[:2]) > 1


def optimizer_groups(
    model: nn.Module,
    weight_decay: float,
    learning_rates: dict[str, float] | None = None,
    *,
    learning_rate: float | None = None,
    muon: MuonOptions | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: what trains, by group, with and without weight decay.

    Norms, biases and gates are not decayed: all that has fewer than two dimensions.

    Args:
        weight_decay: of all else.
        learning_rates: by name of group.
        learning_rate: of the others; by default the optimizer's own.
        muon: for [`Muon`], which gets matrices in separate groups. AdamW trains the rest and the embeddings, with
            `adamw_lr_scale` times the learning rate.

    Raises:
        ValueError: if a learning rate is given for a group that does not exist or that nothing trains in.
    """
    rates = dict(learning_rates or {})
    resolve_groups(list(rates))
    # DDP, torch.compile and PEFT each add a prefix.
    names = {re.sub(r"^(module\.|_orig_mod\.|base_model\.model\.)+", "", n): p for n, p in model.named_parameters()}
    patterns = dict(GROUPS)
    if "vision_last_block" in rates:  # before `vision`, which contains it
        patterns = {"vision_last_block": last_block([name for name in names if "vision_tower" in name]), **GROUPS}
    members: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in names.items():
        if parameter.requires_grad:
            group = next((g for g, pattern in patterns.items() if g in rates and re.match(pattern, name)), "")
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor in place
            matrix = muon is not None and is_matrix(parameter) and not re.match(GROUPS["embeddings"], name)
            members.setdefault((group, not matrix, len(shape) >= 2), []).append(parameter)
    for group in rates:
        if not any(g == group for g, *_ in members):
            raise ValueError(f"There is a learning rate for '{group}', but nothing of it trains: leave it out.")
    groups = []
    # "" comes first: its learning rate is the one that is logged.
    for (group, rest, decays), parameters in sorted(members.items(), key=lambda item: item[0]):
        values: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        rate = rates.get(group, learning_rate)
        if muon is not None:
            values["use_muon"] = not rest
            rate = rate * muon.adamw_lr_scale if rest and rate is not None else rate
        groups.append(values if rate is None else {**values, "lr": rate})
    return groups


class OptimizerMixin(AnyTrainer):
    """Learning rates by group (`args.group_learning_rates`), no weight decay of norms and gates, and `args.optim="muon"`."""

    optimizer: Any  # of the trainer

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        model, args = self.model if model is None else model, self.args
        if args.optim == MUON:
            if self.is_deepspeed_enabled:
                raise ValueError("optim=muon needs whole matrices, which ZeRO shards: train with DDP or FSDP2.")
            options = MuonOptions.read(args.optim_args)
            groups = optimizer_groups(
                model, args.weight_decay, args.group_learning_rates, learning_rate=args.learning_rate, muon=options
            )
            betas, eps = (args.adam_beta1, args.adam_beta2), args.adam_epsilon
            settings: dict[str, Any] = {
                "momentum": options.momentum,
                "nesterov": options.nesterov,
                "ns_steps": options.ns_steps,
            }
            self.optimizer = Muon(groups, args.learning_rate, betas=betas, eps=eps, **settings)
            return self.optimizer
        cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(args, model)
        if is_optimizer_factory(cls) or {"params", "model", "optimizer_dict"} & kwargs.keys():
            if args.group_learning_rates:
                raise ValueError(f"optim={args.optim} makes its own groups: leave group_learning_rates out.")
            return super().create_optimizer(model)
        self.optimizer = cls(optimizer_groups(model, args.weight_decay, args.group_learning_rates), **kwargs)
        return self.optimizer
