"""Float32 copies of the weights that an optimizer updates where the model's own are bfloat16.

A bfloat16 number has 8 significant bits, so an update below 0.2 % of a weight is rounded away: at
usual learning rates most of them. Hence the optimizer works on copies in float32 (mixed-precision
training, Micikevicius et al., 2018), and the model gets them rounded. Where all trained weights are
float32, as in small models on a CPU, there are no copies and nothing here does anything.

With AdamW a step then takes 16 bytes a parameter: 2 of the weight and 2 of its gradient, 4 of the
copy and 8 of the moments. The gradient in float32 exists for a few weights at a time: the optimizer
takes its step on these alone, and then on the next, which is the same, for it steps each weight for
itself and passes over those without a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fst_dspy import distributed

PREFIX = "master"
PART_VALUES = 2**24
"""Values of the weights that are stepped at once, unless a single one has more."""

Pair = tuple[nn.Parameter, nn.Parameter]
"""A weight of the model and its copy."""


class MasterWeights:
    """Takes the place of an optimizer's bfloat16 and float16 parameters.

    Clear gradients with the model's own ``zero_grad``: the optimizer does not know them any more.

    Args:
        optimizer: One that has taken no step. From here on, each of its steps begins with the
            gradients of the model's weights, which it uses up, and ends with these updated. It must
            step every parameter for itself, as all of PyTorch's but LBFGS do.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._pairs: list[Pair] = []
        self._others: list[nn.Parameter] = []
        for group in optimizer.param_groups:
            for place, weight in enumerate(group["params"]):
                if weight.dtype in (torch.bfloat16, torch.float16):
                    master = nn.Parameter(weight.detach().float())
                    group["params"][place] = master
                    self._pairs.append((weight, master))
                else:
                    self._others.append(weight)
        self._seen = [_mark(weight) for weight, _ in self._pairs]
        if self._pairs:
            self._step_those_with_gradient = optimizer.step

            @wraps(optimizer.step)  # with the marks that schedulers look for
            def step(_: Any, *args: Any, **kwargs: Any) -> None:
                self._step(*args, **kwargs)

            optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]

    def state(self) -> dict[str, Tensor]:
        """The copies, by names that no moment of an optimizer has."""
        return {f"{PREFIX}.{n}": master.detach() for n, (_, master) in enumerate(self._pairs)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave; other tensors are passed over."""
        for n, (_, master) in enumerate(self._pairs):
            master.copy_(distributed.part_like(tensors[f"{PREFIX}.{n}"], master))

    @torch.no_grad()
    def _step(self, *args: Any, **kwargs: Any) -> None:
        self._take_what_was_put_in()
        if self._others:
            self._step_those_with_gradient(*args, **kwargs)
            for weight in self._others:
                weight.grad = None
        for part in _parts(self._pairs):
            for weight, master in part:
                master.grad = None if weight.grad is None else weight.grad.to(master.dtype)
                weight.grad = None
            self._step_those_with_gradient(*args, **kwargs)
            torch._foreach_copy_([_local(w) for w, _ in part], [_local(m) for _, m in part])
            for _, master in part:
                master.grad = None
        self._seen = [_mark(weight) for weight, _ in self._pairs]

    def _take_what_was_put_in(self) -> None:
        """Follow weights that were given other values since the last step.

        Those that were written to, for a visit of other weights say, may have the same values
        again, which the copies know to more digits.
        """
        changed = [
            pair
            for pair, seen in zip(self._pairs, self._seen, strict=True)
            if _mark(pair[0]) != seen
        ]
        for part in _parts(changed):
            # All at once, for a GPU is waited for.
            differ = [(_local(master).to(w.dtype) != _local(w)).any() for w, master in part]
            for (weight, master), other in zip(part, torch.stack(differ).tolist(), strict=True):
                if other:
                    master.copy_(weight)


def _parts(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs in their order, in parts of up to ``PART_VALUES``."""
    parts: list[list[Pair]] = []
    room = 0
    for pair in pairs:
        size = _local(pair[0]).numel()
        if not parts or size > room:
            parts.append([])
            room = PART_VALUES
        parts[-1].append(pair)
        room -= size
    return parts


def _mark(weight: Tensor) -> tuple[int, int]:
    """Changes whenever a weight is written to, or has its values elsewhere."""
    return weight._version, _local(weight).data_ptr()


def _local(tensor: Tensor) -> Tensor:
    """A tensor without its history; under FSDP this process's part of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
