"""The parts of one compile, made of what the user gave, before the first rollout."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import dspy

from fst_dspy import distributed
from fst_dspy.config import BudgetConfig, FSTConfig, LoraConfig, SlowConfig
from fst_dspy.errors import ConfigError
from fst_dspy.fast.channel import FastChannel
from fst_dspy.fast.gepa.events import Events
from fst_dspy.fast.gepa.strategies import NAMED, Strategies
from fst_dspy.fast.phase import FastPhase
from fst_dspy.fast.proposers.copying import CopyGuard
from fst_dspy.fast.proposers.demos import DEMO_SHARE, DEMO_TOKENS, DemoProposer
from fst_dspy.fast.proposers.lessons import LessonProposer
from fst_dspy.fast.proposers.protocol import Proposer, well_formed
from fst_dspy.fast.proposers.reflection import ReflectionLMProposer
from fst_dspy.fast.trials import TrialPhase
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.lm.predictors import check_trained
from fst_dspy.loop.folder import RunFolder
from fst_dspy.loop.learner import GRPOLearner, Learner
from fst_dspy.loop.progress import ProgressListener, SilentProgress, default_progress
from fst_dspy.loop.sampling import StepSampler
from fst_dspy.loop.state import Start
from fst_dspy.model.hardware import total_memory
from fst_dspy.model.policy import Policy
from fst_dspy.model.vllm_engine import VllmGenerator
from fst_dspy.plan.plan import Plan, fitted, make_plan
from fst_dspy.plan.prompts import prompts_of
from fst_dspy.rollouts.checks import CheckedInput
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.run import claims
from fst_dspy.run.store import free_bytes
from fst_dspy.run.trackers import Trackers
from fst_dspy.student.candidate import example_id, seed_candidate
from fst_dspy.student.identity import adapter_identity, metric_identity, program_identity
from fst_dspy.student.values import lm_identity
from fst_dspy.types import Arm, Candidate

AS_LOADED = ("dtype", "quantization_config")
"""Of what a model was loaded with: by these its files become the weights that were trained."""


@dataclass(frozen=True)
class RunSpec:
    """What an optimizer hands over.

    Attributes:
        config, arm, seed, metric: As for ``FST``.
        reflection_lm, instruction_proposer: What proposes instructions; both ``None`` for lessons.
        strategies: gepa's strategies, in place of those that ``config`` names.
        log_dir: The run folder, or ``None``.
        log_rollouts: Whether training rollouts are logged there.
        report_to: Names of trackers.
        progress: Hears what goes on; ``None`` for the default.
        make_learner: Makes what learns from a step's groups.
        identity: What else tells this run from others, in its folder.
    """

    config: FSTConfig
    arm: Arm
    seed: int
    metric: Callable[..., Any]
    reflection_lm: dspy.BaseLM | None = None
    instruction_proposer: Proposer | None = None
    strategies: Strategies = NAMED
    log_dir: Path | None = None
    log_rollouts: bool = True
    report_to: Sequence[str] = ()
    progress: ProgressListener | None = None
    make_learner: Callable[[LocalLM, dspy.Module, FSTConfig, int], Learner] = GRPOLearner
    identity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """What the joint loop works with.

    Attributes:
        spec: What was asked for.
        start: What the run begins with.
        lm: The local model, with the weights that the run begins with.
        trainset, valset: What is learned from, and the at most ``val_size`` examples scored on.
        val_ids: Their ids.
        seed_candidate: The student's own texts.
        runner: Runs the program.
        fast: The fast channel, also where it is off.
        sampler: Samples a step's groups.
        learner: The slow channel; ``None`` where it is off.
        budget: The run's, the opening counted in.
        plan: What the run is expected to take.
        folder, trackers, progress: Where it is written and told.
    """

    spec: RunSpec
    start: Start
    lm: LocalLM
    trainset: Sequence[dspy.Example]
    valset: Sequence[dspy.Example]
    val_ids: tuple[str, ...]
    seed_candidate: Candidate
    runner: RolloutRunner
    fast: FastChannel
    sampler: StepSampler
    learner: Learner | None
    budget: BudgetConfig
    plan: Plan
    folder: RunFolder | None
    trackers: Trackers
    progress: ProgressListener

    @property
    def config(self) -> FSTConfig:
        return self.spec.config

    @property
    def policy(self) -> Policy:
        return self.lm.policy

    @property
    def fast_on(self) -> bool:
        """Whether the fast channel is on."""
        return self.spec.arm in ("fst", "gepa_only")

    @property
    def slow_opens(self) -> bool:
        """Whether the first cycle has no fast phase before its steps."""
        return self.learner is not None and self.config.fast.first_phase == "slow"

    @property
    def has_opening(self) -> bool:
        """Whether the first cycle is a fast phase alone, validated before the weights move."""
        return self.fast.reuses and not self.slow_opens

    def close(self) -> None:
        """Let go of the run folder; the weights are held until ``let_go``."""
        if self.folder is not None:
            self.folder.close()

    def let_go(self) -> None:
        """Let go of the live weights, once the best ones are in place."""
        claims.release(self.policy)


def make_parts(spec: RunSpec, student: dspy.Module, checked: CheckedInput, start: Start) -> Parts:
    """Claim the weights and the run folder, and make the parts, which hold both.

    Args:
        spec: What is asked for.
        student: The program, which is left as it is.
        checked: Its model and the examples.
        start: What the run begins with.

    Raises:
        ConfigError, ModelError: Adapters that do not go with the weights, no training of them, or
            another compile that has them.
        StoreError: The run folder cannot be used.
    """
    claims.claim(checked.lm.policy)
    try:
        return _made_parts(spec, student, checked, start)
    except BaseException:
        claims.release(checked.lm.policy)
        raise


def _made_parts(spec: RunSpec, student: dspy.Module, checked: CheckedInput, start: Start) -> Parts:
    seed, lm = spec.seed, checked.lm
    # What depends on the model is settled first, so that the folder says what was used.
    slow = _fitted(spec.config.slow, lm)
    budget = spec.config.budget.over(len(checked.trainset) + len(checked.valset))
    spec = replace(spec, config=replace(spec.config, slow=slow, budget=budget))
    config = spec.config
    main, slow_on = distributed.is_main(), spec.arm != "gepa_only"
    fast_on = spec.arm in ("fst", "gepa_only")
    if slow_on:
        check_trained(student, lm.policy, slow.adapters)
        if isinstance(lm.policy.generator, VllmGenerator):
            lm.policy.generator.weights.check(slow.adapters)
    valset = sample(checked.valset, config.sampling.val_size, seed)
    val_ids = tuple(example_id(example) for example in valset)
    own = seed_candidate(student, config.fast.tool_descriptions)

    # The folder first: a run that belongs to another one must not touch weights or model.
    identity = _identity(spec, student, checked, own, val_ids, start)
    opened: list[RunFolder] = []
    distributed.from_main(partial(_open_folder, spec, identity, opened))
    folder = opened[0] if opened else None
    trackers = Trackers(
        spec.report_to if main else (),
        folder.store if folder is not None else None,
        {"arm": spec.arm, "seed": seed, "model": lm.version} | config.to_dict(),
    )

    plan = _plan(spec, student, checked)

    # Then the weights, which runner and learner take as they find them.
    lm.policy.restore(lm.version)
    lm.policy.step = 0
    if slow_on:
        begin_lora(lm.policy, config.slow.adapters, seed)
    runner = RolloutRunner(
        student, spec.metric, lm, config.sampling, seed, predictor_feedback=fast_on
    )
    own_strategies = spec.strategies
    events = Events(
        own_strategies.callbacks,
        own_strategies.stop_callbacks,
        calls=lambda: runner.counts.total,
        max_calls=config.budget.max_rollouts,
    )
    fast = _make_fast(spec, lm.policy, events, reuse=config.fast.reuse and fast_on and slow_on)
    parts = Parts(
        spec=spec,
        start=start,
        lm=lm,
        trainset=checked.trainset,
        valset=valset,
        val_ids=val_ids,
        seed_candidate=own,
        runner=runner,
        fast=fast,
        sampler=StepSampler(runner, fast, config.slow, checked.trainset, seed),
        learner=spec.make_learner(lm, student, config, seed) if slow_on else None,
        budget=config.budget,
        plan=plan,
        folder=folder,
        trackers=trackers,
        progress=(spec.progress or default_progress()) if main else SilentProgress(),
    )
    return _with_opening(parts)


def _fitted(slow: SlowConfig, lm: LocalLM) -> SlowConfig:
    """The settings with what they leave to the model, its weights and the machine."""
    policy = lm.policy
    if slow.lora == "auto" and lm.version != policy.base_version:
        slow = replace(slow, lora=policy.lora_of(lm.version))  # what the weights have is trained on
    if slow.lora == "auto" and isinstance(policy.generator, VllmGenerator):
        slow = replace(slow, lora=policy.generator.weights.lora)
    return fitted(slow, policy.model, policy.model.dtype, policy.device, _memory(policy))


def _memory(policy: Policy) -> int | None:
    """Bytes that vLLM leaves of the device's memory; ``None``, for all of it, without vLLM."""
    if not isinstance(policy.generator, VllmGenerator):
        return None
    return round((1 - policy.generator.memory_share) * total_memory(policy.device))


def _plan(spec: RunSpec, student: dspy.Module, checked: CheckedInput) -> Plan:
    policy = checked.lm.policy
    return make_plan(
        policy.model,
        policy.name,
        spec.config,
        prompts_of(student, checked.trainset, partial(count_tokens, policy)),
        dtype=policy.model.dtype,
        device=policy.device,
        max_tokens=checked.lm.kwargs["max_tokens"],
        context=policy.context_length,
        arm=spec.arm,
        val_examples=len(checked.valset),
        total=_memory(policy),
        free_disk=None if spec.log_dir is None else free_bytes(spec.log_dir),
    )


def begin_lora(policy: Policy, lora: LoraConfig | None, seed: int) -> None:
    """Make what is asked for the trained weights: all, or adapters, those that are live or fresh.

    Raises:
        ConfigError: The live weights have adapters, and others or none are asked for.
        ModelError: They have none and are not the base.
    """
    if policy.lora == lora:
        return
    if policy.lora is not None:
        raise ConfigError(
            f"the weights {policy.version()} have adapters with {policy.lora}; train them on with "
            f"the same lora settings (lora='auto' takes them), or start from {policy.base_version}"
        )
    assert lora is not None
    policy.add_lora(lora, seed)


def sample(examples: Sequence[dspy.Example], size: int, seed: int) -> list[dspy.Example]:
    """At most ``size`` of the examples, drawn with the seed, in their own order."""
    if len(examples) <= size:
        return list(examples)
    chosen = random.Random(seed).sample(range(len(examples)), size)
    return [examples[index] for index in sorted(chosen)]


def _with_opening(parts: Parts) -> Parts:
    """An opening is a cycle more than was asked for: it takes no optimizer steps."""
    cycles = parts.budget.max_cycles
    if cycles is None or not parts.has_opening:
        return parts
    return replace(parts, budget=replace(parts.budget, max_cycles=cycles + 1))


def _make_fast(spec: RunSpec, policy: Policy, events: Events, *, reuse: bool) -> FastChannel:
    config, count = spec.config.fast, partial(count_tokens, policy)
    proposer = _make_proposer(spec, count)
    usual, room = min(DEMO_TOKENS, int(DEMO_SHARE * policy.context_length)), config.demo_tokens
    demos = DemoProposer(room if isinstance(room, int) else usual, count) if room else None
    if not reuse:
        return FastPhase(
            config, proposer, spec.seed, demos=demos, strategies=spec.strategies, events=events
        )
    return TrialPhase(
        config,
        proposer,
        spec.seed,
        steps_per_cycle=spec.config.slow.steps_per_cycle,
        demos=demos,
        strategies=spec.strategies,
        events=events,
    )


def _make_proposer(spec: RunSpec, count_tokens: Callable[[str], int]) -> Proposer:
    if spec.instruction_proposer is not None:
        return spec.instruction_proposer
    config = spec.config.fast
    guard = CopyGuard() if config.copy_guard else None
    lessons = LessonProposer(config.instruction_tokens, count_tokens, guard)
    if spec.reflection_lm is None:
        return lessons
    return ReflectionLMProposer(
        spec.reflection_lm,
        config.instruction_tokens,
        count_tokens,
        fallback=lessons,
        max_cost=config.max_reflection_cost,
        max_tokens=config.max_reflection_tokens,
        template=config.reflection_prompt_template,
    )


def count_tokens(policy: Policy, text: str) -> int:
    """Tokens of a text under the policy's tokenizer."""
    return len(policy.tokenizer(well_formed(text), add_special_tokens=False)["input_ids"])


def _open_folder(spec: RunSpec, identity: Mapping[str, Any], opened: list[RunFolder]) -> None:
    if spec.log_dir is not None:
        opened.append(RunFolder(spec.log_dir, log_rollouts=spec.log_rollouts))
        try:
            opened[0].begin(identity)
        except BaseException:
            opened[0].close()
            raise


def _identity(
    spec: RunSpec,
    student: dspy.Module,
    checked: CheckedInput,
    own: Candidate,
    val_ids: Sequence[str],
    start: Start,
) -> dict[str, Any]:
    """What tells a run from others: its folder goes on with the same alone."""
    candidates = [candidate.id for candidate in start.candidates]
    source = checked.lm.policy.source
    return {
        **({"start": candidates} if candidates else {}),
        **spec.identity,
        "arm": spec.arm,
        "seed": spec.seed,
        "settings": spec.config.to_dict(),
        "model": checked.lm.version,
        "loaded": {name: source[name] for name in AS_LOADED if name in source},
        "program": program_identity(student),
        "adapter": adapter_identity(dspy.settings.adapter),
        "lm": lm_identity(checked.lm),
        "metric": metric_identity(spec.metric),
        "student": dict(own.components),
        "train_ids": [example_id(example) for example in checked.trainset],
        "val_ids": list(val_ids),
    }
