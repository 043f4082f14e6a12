"""A compile as it is planned: settings that fit the model, memory, rollouts and time.

Made before any work, from a model's configuration alone if need be. Times are estimates: what a
step multiplies, by how fast the machine multiplies matrices of the model's width, which is tried
out for a moment. The first validation shows how fast rollouts really are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from fst_dspy.config import FSTConfig, SlowConfig
from fst_dspy.model.hardware import multiplies_bfloat16, total_memory
from fst_dspy.model.prefixes import PACKED_TOKENS, can_continue, can_pack
from fst_dspy.model.sizes import (
    MAX_CPU_TOKENS,
    active_count,
    cache_bytes,
    parameter_count,
    power_of_two,
    training_tokens,
)
from fst_dspy.plan.memory import (
    USABLE,
    Memory,
    averaged_bytes,
    fitting_lora,
    memory_of,
    run_folder_bytes,
    trainable_count,
)
from fst_dspy.plan.prompts import Prompts
from fst_dspy.slow.learning_rate import with_learning_rate
from fst_dspy.types import Arm

MICRO_TOKENS = {"cpu": 16_384, "cuda": 65_536}
MICRO_ROWS = 16
EFFICIENCY = 0.4
"""Of the speed of bare matrix products, that a whole model reaches."""
TRIED_ROWS = 256
TRIED_SECONDS, TRIED_TIMES = 0.03, 5
SAMPLING = 1 / 4
"""Of a step's multiplications, those of sampling: forward, against forward again and back."""
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a compile will do and take.

    Attributes:
        model, device, dtype: The model, where it is, and the dtype of its weights.
        parameters, trainable: Of the model, and those that are trained.
        adapters: Rank of the adapters that are trained; ``None`` where all weights are.
        learning_rate: Peak learning rate.
        calls: Model calls of a rollout; of an agent, of a turn.
        prompt_tokens, max_tokens: Of a call: its prompt's mean length, its longest answer.
        prompts_counted: Whether a tokenizer counted; else it is an estimate.
        read_share: Of the prompt tokens of a step's rollouts, those that are read: what rollouts
            have in common is read once. Above 0, at most 1.
        micro_batch_tokens: Of a forward and backward pass.
        memory: By what it is for, in bytes.
        peak_memory, machine_memory: The most at once, and what the device has.
        later_memory: What comes on top, beside the model, once rewards say nothing and text teaches
            the weights (``slow_signal="auto"``): their average.
        disk: The most that the run folder's checkpoints and weights take at once, in bytes; its
            logs come on top.
        steps, rollouts_per_step, rollouts: Of the whole run; a limit in seconds is not looked at.
        seconds_per_step, seconds: A step with its rollouts, and the whole run.
        timing: ``"estimated"``, or ``"measured"`` on rollouts of this run.
        problems: What will not fit or not be right, and what to change; empty where all is well.
    """

    model: str
    device: str
    dtype: str
    parameters: int
    trainable: int
    adapters: int | None
    learning_rate: float
    calls: int
    prompt_tokens: int
    max_tokens: int
    prompts_counted: bool
    read_share: float
    micro_batch_tokens: int
    memory: Memory
    peak_memory: int
    machine_memory: int
    later_memory: int
    disk: int
    steps: int
    rollouts_per_step: int
    rollouts: int
    seconds_per_step: float
    seconds: float
    timing: Literal["estimated", "measured"]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def measured(
        self,
        seconds: float,
        rollouts: int,
        *,
        tokens: Mapping[str, int] | None = None,
        allowed: int | None = None,
    ) -> Plan:
        """The plan with times by what some rollouts, a validation's say, have taken.

        An optimizer step reads each rollout's tokens again and goes back through them, which takes
        what was estimated for as many tokens.

        Args:
            seconds: That they took.
            rollouts: How many there were.
            tokens: Of all their ``"prompt"`` and ``"completion"``; ``None`` where not known.
            allowed: Rollouts that a limit in another unit, environment steps, leaves the run.
        """
        planned = self.calls * self.prompt_tokens, self.calls * self.max_tokens
        prompt, answer = map(float, planned)
        if tokens is not None and any(tokens.values()):
            prompt, answer = (tokens[kind] / max(1, rollouts) for kind in ("prompt", "completion"))
        sampled, batch = seconds / max(1, rollouts), self.rollouts_per_step
        # Of a step: the tokens that are read, against all and against those of the estimate.
        read = self.read_share * prompt + answer
        learned = self.seconds_per_step / max(1, batch) * (1 - SAMPLING)
        learned *= read / max(1, self.read_share * planned[0] + planned[1])
        step_seconds = batch * (sampled * read / max(1, prompt + answer) + learned)
        total = self.rollouts if allowed is None else allowed
        steps = self.steps
        if steps and total != self.rollouts:
            steps = max(1, round(steps * total / self.rollouts))
        return replace(
            self,
            rollouts=total,
            steps=steps,
            seconds_per_step=step_seconds,
            seconds=max(0, total - steps * batch) * sampled + steps * step_seconds,
            timing="measured",
        )

    def time_line(self) -> tuple[str, str]:
        """The line of ``lines`` that tells the time."""
        return (
            "time",
            f"about {_duration(self.seconds)}, {_duration(self.seconds_per_step)} a step "
            f"({self.timing}; answers shorter than the longest take less)",
        )

    def lines(self) -> Iterator[tuple[str, str]]:
        """Name and words of each part, to be shown."""
        trained = f"adapters of rank {self.adapters}" if self.adapters else "all weights"
        about = "" if self.prompts_counted else "about "
        size, place = f"{self.parameters / 1e6:,.4g} M parameters", f"{self.dtype} on {self.device}"
        yield "model", f"{self.model}: {size}, {place}"
        moved = f"{self.trainable / 1e6:,.4g} M, learning rate {self.learning_rate:.2g}"
        yield "trained", f"{trained}, {moved}"
        parts = self.memory.to_dict().items()
        used = ", ".join(f"{name} {_gib(size)}" for name, size in parts if size)
        later = f"; {_gib(self.later_memory)} more if text comes to teach the weights"
        most = f"{_gib(self.peak_memory)} of {_gib(self.machine_memory)} at most: {used}"
        yield "memory", most + (later if self.later_memory else "")
        if self.disk:
            yield "run folder", f"{_gib(self.disk)} at most"
        answer = f"answer of at most {self.max_tokens:,}"
        batch = f"{self.micro_batch_tokens:,} tokens a micro-batch"
        yield "a call", f"prompt of {about}{self.prompt_tokens:,} tokens, {answer}; {batch}"
        steps = f"{self.steps:,} optimizer steps of {self.rollouts_per_step:,}"
        yield "rollouts", f"about {self.rollouts:,}: {steps}, the rest validation and prompts"
        yield self.time_line()
        for problem in self.problems:
            yield "problem", problem


def fitted(
    slow: SlowConfig,
    model: Any,
    dtype: torch.dtype,
    device: torch.device,
    total: int | None = None,
) -> SlowConfig:
    """The settings with adapters and learning rate that they leave to the model and the machine.

    Args:
        model: Without adapters; may be on PyTorch's meta device.
        dtype, device: Of its weights, and where they are to be.
        total: Bytes of memory that the device has; asked for by default.
    """
    if slow.lora == "auto":
        lora = fitting_lora(model, dtype, device, total or total_memory(device))
        slow = replace(slow, lora=lora)
    return with_learning_rate(slow, model)


def make_plan(
    model: Any,
    name: str,
    config: FSTConfig,
    prompts: Prompts,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_tokens: int,
    context: int,
    arm: Arm = "fst",
    val_examples: int | None = None,
    flops: float | None = None,
    total: int | None = None,
    free_disk: int | None = None,
) -> Plan:
    """Plan a compile.

    Args:
        model: The model, without adapters; may be on PyTorch's meta device.
        name: To call it.
        config: The settings.
        prompts: Of the program.
        dtype, device: Of the weights, and where they are to be.
        max_tokens: Longest answer of a call, where the settings do not say.
        context: Tokens that prompt and answer may have together.
        arm: As for ``FST``.
        val_examples: Validation examples that there are; as many as are asked for by default.
        flops: Multiplications and additions a second that the device does; tried out by default.
        total: Bytes of memory that the device has; asked for by default.
        free_disk: Bytes that there are for the run folder; ``None`` where they are not known.
    """
    total = total or total_memory(device)
    slow = fitted(config.slow, model, dtype, device, total)
    lora = slow.lora if slow.lora != "auto" else None
    new = min(config.sampling.max_tokens or max_tokens, max(1, context - prompts.tokens))
    item, text = dtype.itemsize, model.config.get_text_config()
    parameters = parameter_count(model)
    trainable = trainable_count(model, lora)
    averaged = slow.averages_teacher
    may_average = slow.slow_signal == "auto" and slow.teacher_update_rate < 1
    may_average = may_average and arm in ("fst", "rl_only")
    bare = memory_of(model, dtype, lora, trainable=trainable, averaged=averaged, micro_tokens=0)
    room = max(0, total - bare.peak(device))
    cuda = device.type == "cuda"
    most = MICRO_TOKENS["cuda" if cuda else "cpu"]
    micro = training_tokens(model.config, item, room, most)
    length = prompts.tokens + new
    batch = slow.group_size * slow.problems_per_step
    # On a GPU rows are not counted: as many go together as there is memory for.
    most_rows = micro // max(1, length), batch if cuda else MICRO_ROWS
    # A candidate's rollouts of a problem have the same prompt, which counts once.
    candidates = 1 if arm == "rl_only" else config.fast.population_size
    shared = min(1.0, candidates / slow.group_size) if can_continue(model) else 1.0
    read = prompts.tokens * shared + new
    if can_pack(model):
        most_rows = int((micro if cuda else min(micro, PACKED_TOKENS)) / read), batch
    rows = max(1, min(most_rows[0], slow.micro_batch_size or most_rows[1], batch))
    alive = min(batch, config.sampling.num_threads)
    fits = power_of_two(room // 2) // cache_bytes(text, item)
    cap = fits if cuda else min(fits, MAX_CPU_TOKENS)
    cached = min(alive * length, max(length, cap))
    memory = memory_of(
        model, dtype, lora,
        trainable=trainable,
        averaged=averaged,
        micro_tokens=math.ceil(rows * shared) * prompts.tokens + rows * new,
        trained_tokens=rows * new,
        rows=min(alive, max(1, cached // max(1, length))),
        cached_tokens=cached,
    )  # fmt: skip
    slow_on = arm != "gepa_only"
    scored = config.sampling.val_size
    scored = scored if val_examples is None else min(scored, val_examples)
    rollouts, steps = _rollouts(config, batch, scored, slow_on)
    flops = flops or measured_flops(text.hidden_size, dtype, device)
    each = prompts.calls * 2 * active_count(model) * length / (flops * EFFICIENCY)
    # Read again, and twice that on the way back.
    step_seconds = batch * each * read / max(1, length) / SAMPLING
    plan = Plan(
        model=name,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        parameters=parameters,
        trainable=trainable if slow_on else 0,
        adapters=lora.rank if lora is not None else None,
        learning_rate=slow.learning_rate or 0.0,
        calls=prompts.calls,
        prompt_tokens=prompts.tokens,
        max_tokens=new,
        prompts_counted=prompts.counted,
        read_share=shared,
        micro_batch_tokens=micro,
        memory=memory,
        peak_memory=memory.peak(device),
        machine_memory=total,
        later_memory=averaged_bytes(trainable) if may_average else 0,
        disk=run_folder_bytes(memory) if slow_on else 0,
        steps=steps,
        rollouts_per_step=batch,
        rollouts=rollouts,
        seconds_per_step=step_seconds,
        seconds=max(0, rollouts - steps * batch) * each + steps * step_seconds,
        timing="estimated",
        problems=(),
    )
    return replace(plan, problems=tuple(_problems(plan, model, dtype, device, context, free_disk)))


def measured_flops(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications and additions a second, in products of the model's width; takes a moment."""
    rows = torch.ones(TRIED_ROWS, width, dtype=dtype, device=device)
    weight = torch.ones(4 * width, width, dtype=dtype, device=device)
    torch.nn.functional.linear(rows, weight).sum().item()  # the first one sets up threads as well
    best, tries, begun = float("inf"), 0, time.perf_counter()
    while tries < TRIED_TIMES or time.perf_counter() - begun < TRIED_SECONDS:
        started = time.perf_counter()
        torch.nn.functional.linear(rows, weight).sum().item()
        best, tries = min(best, time.perf_counter() - started), tries + 1
    return 2 * TRIED_ROWS * 4 * width * width / best


def _rollouts(config: FSTConfig, batch: int, examples: int, slow_on: bool) -> tuple[int, int]:
    """Rollouts of the run, and optimizer steps among them; ``examples`` are validated on."""
    budget, fast = config.budget, config.fast
    trained = config.slow.steps_per_cycle * batch if slow_on else 0
    own = 0 if slow_on and fast.reuse else 2 * fast.cycle_iterations * fast.minibatch_size
    scored = examples * config.sampling.val_samples
    cycle = trained + scored + own
    first = scored + 2 * fast.first_cycle_iterations * fast.minibatch_size
    cycles = budget.max_cycles
    if budget.max_rollouts is not None:
        needed = max(1, -(-(budget.max_rollouts - first) // max(1, cycle)))
        cycles = needed if cycles is None else min(cycles, needed)
    cycles = cycles or 1  # a limit in seconds alone: one cycle is told
    rollouts, steps = first + cycles * cycle, cycles * config.slow.steps_per_cycle * slow_on
    beyond = max(0, rollouts - budget.max_rollouts) if budget.max_rollouts is not None else 0
    # The last cycle is cut short, and one step or iteration is taken in any case.
    left_out = min(-(-beyond // batch), steps - 1) if slow_on else 0
    return rollouts - (left_out * batch if slow_on else beyond), steps - left_out


def _problems(
    plan: Plan,
    model: Any,
    dtype: torch.dtype,
    device: torch.device,
    context: int,
    free_disk: int | None,
) -> Iterator[str]:
    room = USABLE * plan.machine_memory
    if plan.memory.weights > room:
        yield (
            f"the weights alone take {_gib(plan.memory.weights)}, {device.type} has "
            f"{_gib(plan.machine_memory)}: take a smaller model or another machine"
        )
    elif plan.peak_memory > room:
        lighter = fitting_lora(model, dtype, device, plan.machine_memory)
        smaller = "a lower max_tokens or micro_batch_size, or a smaller model"
        if plan.adapters is not None:
            yield f"it may not fit: set {smaller}"
        elif lighter is not None:
            yield "training all weights does not fit: set lora=True, or leave lora out"
        else:
            yield f"training all weights may not fit: set lora=True, {smaller}"
    if plan.prompt_tokens >= context:
        yield (
            f"prompts of {plan.prompt_tokens:,} tokens do not fit the model's {context:,}: shorten "
            "instructions, demos or inputs"
        )
    if free_disk is not None and plan.disk > free_disk:
        yield (
            f"the run folder takes up to {_gib(plan.disk)} and there are {_gib(free_disk)}: make "
            "room, choose another log_dir, or train adapters (lora=True)"
        )
    if dtype != torch.float32 and device.type == "cpu" and not multiplies_bfloat16():
        yield f"this CPU has no instructions for {plan.dtype}: dtype='float32' is faster"


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.3g} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"
