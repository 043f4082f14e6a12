"""Float32 copies of the weights that an optimizer updates where the model's own are bfloat16.

A bfloat16 number has 8 significant bits, so an update below 0.2 % of a weight is rounded away: at
usual learning rates most of them. Hence the optimizer works on copies in float32 (mixed-precision
training, Micikevicius et al., 2018), and the model gets them rounded. Where all trained weights are
float32, as on the CPU and in LoRA adapters, there are no copies and nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fst_dspy import distributed

PREFIX = "master"


class MasterWeights:
    """Takes the place of an optimizer's bfloat16 and float16 parameters.

    Clear gradients with the model's own ``zero_grad``: the optimizer does not know them any more.

    Args:
        optimizer: One that has taken no step. From here on, each of its steps begins with the
            gradients of the model's weights and ends with these updated.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._pairs: list[tuple[Tensor, nn.Parameter]] = []
        for group in optimizer.param_groups:
            for place, weight in enumerate(group["params"]):
                if weight.dtype in (torch.bfloat16, torch.float16):
                    master = nn.Parameter(weight.detach().float())
                    group["params"][place] = master
                    self._pairs.append((weight, master))
        if self._pairs:
            optimizer.register_step_pre_hook(self._begin)
            optimizer.register_step_post_hook(self._end)

    def state(self) -> dict[str, Tensor]:
        """The copies, by names that no moment of an optimizer has."""
        return {f"{PREFIX}.{n}": master.detach() for n, (_, master) in enumerate(self._pairs)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave; other tensors are passed over."""
        for n, (_, master) in enumerate(self._pairs):
            master.copy_(distributed.part_like(tensors[f"{PREFIX}.{n}"], master))

    @torch.no_grad()
    def _begin(self, *_: Any) -> None:
        for (weight, master), off in zip(self._pairs, self._differences(), strict=True):
            if off != 0:
                master.copy_(weight)  # other weights were put in the model since the last step
            master.grad = None if weight.grad is None else weight.grad.float()

    @torch.no_grad()
    def _end(self, *_: Any) -> None:
        torch._foreach_copy_(*self._local())
        for pair in self._pairs:
            pair[1].grad = None

    def _differences(self) -> list[float]:
        """How far each weight is from its copy, rounded; all at once, for a GPU is waited for."""
        weights, masters = self._local()
        rounded = [torch.empty_like(weight) for weight in weights]
        torch._foreach_copy_(rounded, masters)
        torch._foreach_sub_(rounded, weights)
        return torch.stack(torch._foreach_norm(rounded, 1)).tolist()

    def _local(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and copies; under FSDP this process's part of them."""
        weights, masters = zip(*self._pairs, strict=True)
        return [_part(weight) for weight in weights], [_part(master) for master in masters]


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
