"""Several processes, one to a GPU: ``torchrun --nproc_per_node N -m fst_dspy compile ...``.

Every process runs the whole joint loop on a copy of the model. Rollouts and training rows are
shared out and what came of them is gathered, so all take the same decisions on the same facts. What
could turn out differently from one process to the next (a reflection LM's answer, the clock,
Ctrl-C) is settled by process 0, which alone writes the run folder and shows progress. The
communication is accelerate's and torch's: gloo between CPUs, NCCL between GPUs. In a single process
nothing here does anything.

Every process generates with the whole model, whose weights must fit on one GPU. What training adds
to them (gradients, float32 copies, the optimizer's state) is several times as large. Where
accelerate is set up for FSDP2, each process holds its part of it only; of the weights, its part
while it trains, and beside that the whole while it samples and for a moment at the start. DeepSpeed
is refused. All processes must see the run folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fst_dspy.errors import ConfigError, FSTError, TrainingError

if TYPE_CHECKING:  # torch and accelerate take seconds to import, and the command's help needs none
    from accelerate import PartialState
    from torch import Tensor, nn

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

TIMEOUT = timedelta(days=7)
"""How long a process waits for the others. ``torchrun`` ends them all when one has died."""


def processes() -> int:
    """How many processes ``torchrun`` or ``accelerate launch`` has started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ["RANK"]) if processes() > 1 else 0


def is_main() -> bool:
    """Whether this is process 0, which writes the files and shows progress."""
    return rank() == 0


def join(device_type: str) -> None:
    """Meet the other processes, and on CUDA make this one's GPU the current device.

    Args:
        device_type: ``"cuda"`` or ``"cpu"``, where this process's model goes.

    Raises:
        ConfigError: accelerate was set up to cut models up in a way that is not supported.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "accelerate is set up for DeepSpeed, but generation needs the whole model in every "
            "process: use FSDP with fsdp_version: 2, or torchrun alone"
        )
    if uses_fsdp() and os.environ.get("FSDP_VERSION") != "2":
        raise ConfigError("of FSDP only the second is supported: set fsdp_version: 2")
    if uses_fsdp() and _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ConfigError(
            "every process samples with the whole model, so every process reads it: set "
            "fsdp_cpu_ram_efficient_loading: false"
        )
    if processes() > 1:
        _state(cpu=device_type != "cuda")


def uses_fsdp() -> bool:
    """Whether accelerate is set up for FSDP, by its configuration file or the environment."""
    return _is_set("ACCELERATE_USE_FSDP")


def refuse_fsdp(what: str) -> None:
    """Raise ``ConfigError`` where accelerate is set up for FSDP, for what trains whole models."""
    if uses_fsdp():
        raise ConfigError(f"{what} does not work with FSDP: start the processes without it")


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which every process holds a part, put together in each; others as they are."""
    from torch.distributed.tensor import DTensor

    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def part_like(tensor: Tensor, other: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as another is; the tensor where that is whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor):
        return tensor
    # All processes hold the same, so none has to tell the others.
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def spread(work: Callable[[list[Item]], list[Outcome]], items: Iterable[Item]) -> list[Outcome]:
    """Do the work on this process's share of the items; the outcomes of all, in their order.

    Every process calls it with the same items. Neighbours stay together, as far as they can.
    """
    items = list(items)
    if processes() == 1:
        return work(items)
    from accelerate.utils import gather_object

    with _state().split_between_processes(items) as own:
        done = work(own)
    return gather_object(done)


def own_share(items: Sequence[Item], size: Callable[[Item], int]) -> Sequence[Item]:
    """This process's share of the items, all shares being about as much work as the size says."""
    if processes() == 1:
        return items
    return sorted(items, key=size)[rank() :: processes()]


def from_main(make: Callable[[], Outcome]) -> Outcome:
    """What ``make`` returns in process 0, in every process.

    Raises:
        Exception: What ``make`` raised, in process 0.
        FSTError: The same in the others, as text.
    """
    if processes() == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    _state()
    made, error = None, None
    if is_main():
        try:
            made = make()
        except Exception as caught:
            error = caught
    told = broadcast_object_list([made, error and f"{type(error).__name__}: {error}"])
    if error is not None:
        raise error
    if told[1] is not None:
        raise FSTError(f"process 0 stopped with {told[1]}")
    return told[0]


def most(number: int) -> int:
    """The largest of the processes' numbers."""
    return number if processes() == 1 else max(_gathered(number))


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if processes() == 1 else any(_gathered(flag))


def check_same(what: str, value: Any) -> None:
    """Make sure that all processes hold the same; compared by ``repr``.

    Raises:
        TrainingError: They do not.
    """
    if processes() > 1:
        digests = _gathered(hashlib.sha256(repr(value).encode()).hexdigest())
        if len(set(digests)) > 1:
            raise TrainingError(
                f"the processes do not hold the same {what}; every one must be given the same "
                "program, data, model and seed, and devices of one kind"
            )


def sum_gradients(parameters: Iterable[nn.Parameter], figures: Tensor) -> Tensor:
    """Add up the gradients of all processes, in place, and some figures beside them.

    Args:
        parameters: Whose gradients are added up; one that has none counts as 0.
        figures: Any shape, on the parameters' device.

    Returns:
        The sum of the figures.
    """
    import torch
    from accelerate.utils import reduce

    for weight in parameters:
        own = torch.zeros_like(weight) if weight.grad is None else weight.grad
        weight.grad = reduce(own, "sum")
    return reduce(figures, "sum")


def keep_to_itself(accelerator: Any) -> None:
    """Stop a trainer's accelerator from meeting other processes in the middle of a step.

    TRL gathers its metrics with every loss, and DDP waits after every backward pass: processes
    whose shares make unlike numbers of micro-batches would wait for each other for ever. Gradients
    and metrics are added up once a step, by :func:`sum_gradients`.
    """
    if processes() == 1:
        return

    def own(value: Any, *_: Any, **__: Any) -> Any:
        return value

    accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)
    accelerator.gather = accelerator.gather_for_metrics = accelerator.reduce = own


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


def _gathered(value: Any) -> list[Any]:
    from accelerate.utils import gather_object

    _state()
    return gather_object([value])


def _state(cpu: bool | None = None) -> PartialState:
    """Accelerate's view of the processes, which it makes on the first call."""
    import torch
    from accelerate import PartialState

    if cpu is None:
        cpu = not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=TIMEOUT)
