"""Every setting of Fast-Slow Training, with its default and range, in one place.

``FSTConfig`` nests one frozen dataclass a channel. ``FSTConfig.make(...)`` takes the settings
flat, by their unique names, which is how ``fst_dspy.FST(**settings)`` and studies pass them.
``settings.py``, for editors, is made of this file: ``tests/support/settings_file.py`` writes it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from fst_dspy.errors import ConfigError
from fst_dspy.kinds import wrong_kind

Auto = Literal["light", "medium", "heavy", "paper"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_kinds(config: Any, label: str = "", but: Iterable[str] = ()) -> None:
    message = wrong_kind(config, label, but)
    _require(message is None, message or "")


MAX_SCORE = 1e6
"""Scores beyond this magnitude are taken for a mistake, in the metric or the settings."""
ENV_LIMITS = {"max_env_steps": "steps", "max_env_turns": "turns", "max_env_seconds": "seconds"}
"""The limits of what agents do, and what of ``fst_dspy.types.TurnCounts`` they limit."""
LIMITS = ("max_cycles", "max_rollouts", "max_seconds", "max_full_evals", *ENV_LIMITS)
"""The limits of a run, of which there must be one."""


@dataclass(frozen=True)
class BudgetConfig:
    """When the joint loop stops: at whichever limit is reached first.

    Attributes:
        max_cycles: Cycles to run, at least 1, or ``None``; those of prompts alone, which have no
            optimizer steps (``fst_dspy.optimizer``), do not count.
        max_rollouts: Rollouts to run over all channels (fast, slow and eval), or ``None``. A cycle
            ends before a step or iteration that would go beyond it; one is taken in any case.
        max_seconds: Wall time of the compile, or ``None``. The step or iteration under way when it
            is reached is the cycle's last.
        max_full_evals: ``max_rollouts`` in runs over all examples, those of training and of
            validation together, as ``dspy.GEPA`` counts; or ``None``. One of the two.
        max_env_steps: Tool calls of agents in their environments (``fst_dspy.env``), or ``None``.
            As ``max_rollouts``, where rollouts are like those before.
        max_env_turns: Turns of agents there: those calls, and actions that were none; or ``None``.
            Likewise.
        max_env_seconds: Time that their environments take, summed over rollouts, in seconds; or
            ``None``. Likewise.
        on_no_signal: What to do where nothing is left to learn: after a full cycle all of whose
            rollouts had the same reward, unless the metric's text teaches the weights from then on
            (``slow_signal``), or where neither channel pays any more (``fst_dspy.loop.share``).
            ``"stop"`` ends the run, whatever is left of its limits (with an error where all
            rollouts failed), ``"warn"`` says so and goes on.
    """

    max_cycles: int | None = None
    max_rollouts: int | None = None
    max_seconds: float | None = None
    max_full_evals: int | None = None
    max_env_steps: int | None = None
    max_env_turns: int | None = None
    max_env_seconds: float | None = None
    on_no_signal: Literal["stop", "warn"] = "stop"

    def __post_init__(self) -> None:
        _check_kinds(self)
        _require(
            any(getattr(self, name) is not None for name in LIMITS),
            "set at least one of max_cycles, max_rollouts and max_seconds, or auto",
        )
        _require(
            self.max_full_evals is None or self.max_rollouts is None,
            "max_full_evals and max_rollouts (max_metric_calls) are one budget: give one of them",
        )
        for name in LIMITS:
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be positive or None, got {value}")
            _require(value != math.inf, f"{name} must be finite; None sets no limit")

    def env_limits(self) -> dict[str, float]:
        """The limits of what agents do that are set, by what of ``TurnCounts`` they limit."""
        limits = {counted: getattr(self, name) for name, counted in ENV_LIMITS.items()}
        return {counted: limit for counted, limit in limits.items() if limit is not None}

    def over(self, examples: int) -> BudgetConfig:
        """The budget in rollouts, for so many training and validation examples."""
        if self.max_full_evals is None:
            return self
        rollouts = self.max_full_evals * examples
        return dataclasses.replace(self, max_full_evals=None, max_rollouts=rollouts)


STRATEGIES = {
    "component_selector": ("round_robin", "worst_first", "all"),
    "candidate_selection_strategy": ("pareto", "current_best", "epsilon_greedy", "top_k_pareto"),
    "acceptance_criterion": ("strict_improvement", "improvement_or_equal"),
}
"""gepa's strategies that settings name, with their names."""
PLACEHOLDERS = ("<curr_param>", "<side_info>")
"""What a reflection prompt must hold (gepa): the current instruction, and the records."""


@dataclass(frozen=True)
class FastConfig:
    """The fast channel: reflective evolution of the candidates (paper, section 3; GEPA).

    Attributes:
        population_size: K, candidates kept on the Pareto front and spread over each group.
        first_cycle_iterations: GEPA iterations of the first fast phase, which has most to learn.
            Where it is alone, it is interrupted by a validation once a child is better than its
            parent by more than chance.
        cycle_iterations: GEPA iterations of each later fast phase. With 0, ``gepa_only`` ends after
            the first one.
        minibatch_size: Training examples reflected on in one iteration.
        instruction_tokens: Most tokens of the local model that an instruction may hold of what is
            learned, beside the student's own text.
        first_phase: Which phase opens the first cycle: ``"fast"``, as in the paper, or ``"slow"``,
            which leaves that cycle to the slow channel alone. Later cycles are the same.
        demo_tokens: Most tokens that a predictor's learned demos may take in its prompt; 0 leaves
            demos alone. ``"auto"`` does so until four iterations have found no better
            instructions; from then on it is 512, and a quarter of the context window at most.
        component_selector: Which component the next proposal rewrites: ``"round_robin"``,
            ``"worst_first"``, the predictor that fares worst on the minibatch, or ``"all"``. All
            instructions at once while the minibatch scores alike, which does not tell who is at
            fault. ``FST`` takes an object of gepa's protocol here too, which is ``"custom"``.
        candidate_selection_strategy: How an iteration's parent is drawn (gepa): ``"pareto"``,
            ``"current_best"``, ``"epsilon_greedy"``, ``"top_k_pareto"``, or an object.
        acceptance_criterion: What a child must show on the minibatch (gepa):
            ``"strict_improvement"``, ``"improvement_or_equal"``, or an object.
        skip_perfect_score: Do not reflect on a minibatch whose scores are all ``perfect_score``.
        perfect_score: The best score there is.
        reflection_prompt_template: Prompt of the reflection LM (gepa), with ``<curr_param>`` and
            ``<side_info>``; or such prompts by predictor. ``None`` means gepa's own.
        reflection_context: What a proposer is shown of a rollout: ``"step"``, the inputs and
            outputs of the predictor whose text is rewritten, or ``"trajectory"``, besides these all
            steps of the program in their order (``"Program Trajectory"`` in its records).
        frontier_type: On what candidates of the Pareto front are best (gepa): ``"instance"``, an
            example; ``"objective"``, one of the metric's ``objective_scores`` over all examples;
            ``"hybrid"``, either; ``"cartesian"``, an objective on an example.
        copy_guard: Refuse an instruction that copies what training examples have for inputs
            (``fst_dspy.fast.proposers.copying``).
        merge_iterations: Merges of complementary candidates tried after the iterations of a fast
            phase (or, with ``reuse``, after as many trials); 0 switches them off.
        reuse: Score, reflect on and try candidates within the slow phase's own rollouts, from the
            first slow phase on. ``False`` is the paper's way: separate rollouts for GEPA. Without
            a slow phase it has no effect.
        reuse_window: Optimizer steps for which a slow rollout counts; ``None`` means
            ``steps_per_cycle``.
        max_reflection_cost: US dollars that the reflection LM may cost, by litellm's price list;
            then the run goes on without it. ``None`` sets no limit.
        max_reflection_tokens: Prompt and completion tokens of the reflection LM, likewise.
        cold_start_demos: Where the first validation shows nothing to learn from, as many labelled
            training examples are shown as demos in a candidate beside the student's own; where
            ``demo_tokens`` is no number above 0, in a quarter of the context window at most; 0 for
            none.
        format_feedback: Where it does after all, or where answers cannot be read, what is told of
            such an answer says what was wrong with it and what was wanted, so that instructions
            can be written against it.
        tool_descriptions: Let proposals also rewrite what the model reads of an agent's tools, a
            component each (``fst_dspy.student.tools``). Without a ``reflection_lm`` those lessons
            of the feedback go there that name the tool.
    """

    population_size: int = 4
    first_cycle_iterations: int = 8
    cycle_iterations: int = 2
    minibatch_size: int = 12
    instruction_tokens: int = 256
    first_phase: Literal["fast", "slow"] = "fast"
    demo_tokens: int | Literal["auto"] = "auto"
    component_selector: Literal["round_robin", "worst_first", "all", "custom"] = "round_robin"
    candidate_selection_strategy: Literal[
        "pareto", "current_best", "epsilon_greedy", "top_k_pareto", "custom"
    ] = "pareto"
    acceptance_criterion: Literal["strict_improvement", "improvement_or_equal", "custom"] = (
        "strict_improvement"
    )
    skip_perfect_score: bool = False
    perfect_score: float = 1.0
    reflection_prompt_template: str | Mapping[str, str] | None = None
    reflection_context: Literal["step", "trajectory"] = "step"
    frontier_type: Literal["instance", "objective", "hybrid", "cartesian"] = "instance"
    copy_guard: bool = True
    merge_iterations: int = 1
    reuse: bool = True
    reuse_window: int | None = None
    max_reflection_cost: float | None = None
    max_reflection_tokens: int | None = None
    cold_start_demos: int = 4
    format_feedback: bool = True
    tool_descriptions: bool = False

    def __post_init__(self) -> None:
        _check_kinds(self, but=(*STRATEGIES, "reflection_prompt_template"))
        for name in ("population_size", "minibatch_size", "instruction_tokens", "reuse_window"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        for name in (
            "first_cycle_iterations",
            "cycle_iterations",
            "demo_tokens",
            "merge_iterations",
            "max_reflection_cost",
            "max_reflection_tokens",
            "cold_start_demos",
        ):
            value = getattr(self, name)
            unset = value is None or value == "auto"
            _require(unset or value >= 0, f"{name} must not be negative, got {value}")
        for name in STRATEGIES:
            value, known = getattr(self, name), (*STRATEGIES[name], "custom")
            _require(
                isinstance(value, str) and value in known,
                f"{name} must be one of {', '.join(map(repr, STRATEGIES[name]))}, or an object of "
                f"gepa's protocol given to FST; got {value!r}",
            )
        _require(not math.isnan(self.perfect_score), "perfect_score must be a number, got nan")
        _require_templates(self.reflection_prompt_template)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on every linear layer instead of full fine-tuning (peft).

    Attributes:
        rank: Rank of the adapters, at least 1.
        alpha: Scale of the adapters; the update is multiplied by ``alpha / rank``.
        dropout: Dropout on the adapters' input, in [0, 1).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_kinds(self, "LoRA ")
        _require(self.rank >= 1, f"LoRA rank must be at least 1, got {self.rank}")
        _require(
            math.isfinite(self.alpha) and self.alpha > 0,
            f"LoRA alpha must be positive and finite, got {self.alpha}",
        )
        _require(0 <= self.dropout < 1, f"LoRA dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class SlowConfig:
    """The slow channel: GRPO on the local model (paper, section 3; TRL's GRPOTrainer).

    Attributes:
        steps_per_cycle: T, optimizer steps after each fast phase.
        group_size: G, rollouts a problem (TRL: ``num_generations``), at least 2.
        problems_per_step: P, problems an optimizer step.
        learning_rate: Peak learning rate of AdamW. ``None`` takes one by the size of the model and
            whether adapters are trained: 3e-4 for the embedded model, 5e-5 at 135 million
            parameters, 1e-6 at 7 billion; ten times that with adapters, from
            135 million on (``fst_dspy.slow.learning_rate``).
        lr_scheduler_type: One of transformers' schedules that need no settings of their own. One
            that decays spans ``max_cycles`` cycles, and so needs ``max_cycles``.
        warmup_steps: Optimizer steps of linear warm-up, with every schedule.
        max_grad_norm: Gradient clipping; 0 switches it off.
        weight_decay: AdamW's weight decay.
        loss_type: TRL's name of the loss, one over tokens; the paper uses ``"cispo"``.
        epsilon: TRL's lower clip, for losses that clip both ways.
        epsilon_high: TRL's upper clip. With CISPO it is the cap on the importance weight itself
            (ScaleRL: 5.0); TRL's own default would scale every gradient by 0.2.
        scale_rewards: TRL's scaling of the advantage: ``"group"``, ``"batch"`` or ``"none"``.
        credit: What of an agent's rollout a call is credited with: ``"rollout"``, the whole reward,
            or ``"turn"``, what it gained from the call's turn on, compared with what the others of
            the group gained from that turn on (``fst_dspy.slow.advantage``).
        discount: Of rewards of later turns, in (0, 1], with ``credit="turn"``: what is gained k
            turns later counts for ``discount ** k``.
        advantage: What a rollout's reward is compared with: ``"problem"``, all G rollouts of the
            problem, as in the paper, or ``"candidate"``, those under the same candidate alone.
        slow_signal: What the weights learn from: ``"reward"``, the advantages of rollouts;
            ``"feedback"``, the metric's text: the policy that has read it teaches the one that has
            not, token by token on what that has said (``fst_dspy.loop.self_teacher``; SDPO,
            arXiv 2601.20802); or ``"both"``. Text is for weights that have no prompts beside them
            to hold it (``arm="rl_only"``), and for rewards that say nothing: with ``"auto"`` it is
            rewards, and both once a cycle's were equal in nearly every group, and low (under FSDP,
            rewards).
        distillation_weight: Of the feedback where both count, in (0, 1); rewards have the rest
            (TRL: SDPO's ``distillation_weight``).
        teacher_update_rate: With feedback, share of the way to the live weights that the teacher's
            go after each step, in (0, 1] (TRL: SDPO's); at 1 the live weights teach, which may
            follow each other into repeating themselves.
        beta: Weight of TRL's KL penalty to the base model; 0 switches it off.
        entropy_coef: Weight of TRL's entropy bonus, the mean entropy a token; 0 switches it off.
        micro_batch_size: Most rows in one forward and backward pass; by default as many as memory
            seems to hold, and on a CPU 16, where they are not read as a tree.
        revisit_constant: Probability, in (0, 1], that a problem's turn is taken after its latest
            group had a constant reward (no gradient); to the power of such groups in a row, but at
            least 1/16. 1 takes every turn. See ``fst_dspy.loop.problems``.
        damp_constant: Multiply the learning rate of a step by the square root of the share of its
            rows that have an advantage, as for a smaller batch (Malladi et al. 2022, "On the SDEs
            and Scaling Rules for Adaptive Gradient Algorithms"): rows of constant groups say
            nothing, and AdamW would move a policy that has learned its task as far by the noise of
            one group as by eight. Without effect under a KL penalty or entropy bonus, which all
            rows have.
        max_bad_steps: Steps in a row with a loss or gradient that is not finite, after which the
            run stops; each of them is dropped.
        lora: Adapter settings, or ``None`` for full fine-tuning; ``FST`` has ``"auto"`` besides,
            its default: adapters where training all weights would not fit in the machine's memory.
    """

    steps_per_cycle: int = 6
    group_size: int = 8
    problems_per_step: int = 8
    learning_rate: float | None = None
    lr_scheduler_type: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
    ] = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    loss_type: Literal["cispo", "dapo", "grpo", "bnpo", "dr_grpo", "sapo", "vespo"] = "cispo"
    epsilon: float = 0.2
    epsilon_high: float = 5.0
    scale_rewards: Literal["group", "batch", "none"] = "group"
    advantage: Literal["problem", "candidate"] = "problem"
    credit: Literal["rollout", "turn"] = "rollout"
    discount: float = 1.0
    slow_signal: Literal["auto", "reward", "feedback", "both"] = "auto"
    distillation_weight: float = 0.5
    teacher_update_rate: float = 0.05
    beta: float = 0.0
    entropy_coef: float = 0.0
    micro_batch_size: int | None = None
    revisit_constant: float = 0.5
    damp_constant: bool = True
    max_bad_steps: int = 5
    lora: LoraConfig | Literal["auto"] | None = None

    @property
    def adapters(self) -> LoraConfig | None:
        """Settings of the adapters that are trained, once that is decided.

        Raises:
            ConfigError: It is left to the machine, and nobody has asked it.
        """
        _require(self.lora != "auto", "lora='auto' is for FST; give True, False or a LoraConfig")
        return None if self.lora == "auto" else self.lora

    @property
    def averages_teacher(self) -> bool:
        """Whether an average of the weights over the steps teaches them, from the start."""
        taught = self.slow_signal in ("feedback", "both")
        return taught and self.teacher_update_rate < 1

    def __post_init__(self) -> None:
        _check_kinds(self)
        for name in ("steps_per_cycle", "problems_per_step", "micro_batch_size", "max_bad_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        _require(
            self.group_size >= 2,
            f"group_size must be at least 2 (one alone has no advantage), got {self.group_size}",
        )
        rate = self.learning_rate
        _require(
            rate is None or (math.isfinite(rate) and rate > 0),
            f"learning_rate must be positive and finite, got {rate}",
        )
        for name in (
            "max_grad_norm",
            "weight_decay",
            "beta",
            "entropy_coef",
            "warmup_steps",
            "epsilon",
        ):
            value = getattr(self, name)
            _require(value >= 0, f"{name} must not be negative, got {value}")
        for name in ("weight_decay", "beta", "entropy_coef"):  # the others are limits
            value = getattr(self, name)
            _require(math.isfinite(value), f"{name} must be finite, got {value}")
        _require(
            0 < self.revisit_constant <= 1,
            f"revisit_constant must be above 0 and at most 1, got {self.revisit_constant}",
        )
        _require(self.epsilon_high > 0, f"epsilon_high must be positive, got {self.epsilon_high}")
        _require(
            0 < self.distillation_weight < 1,
            "distillation_weight must be between 0 and 1 (slow_signal is reward or feedback alone "
            f"there), got {self.distillation_weight}",
        )
        _require(
            0 < self.teacher_update_rate <= 1,
            "teacher_update_rate must be above 0 and at most 1 (the live weights teach), got "
            f"{self.teacher_update_rate}",
        )
        _require(
            0 < self.discount <= 1, f"discount must be above 0 and at most 1, got {self.discount}"
        )


SCHEDULES = get_args(get_type_hints(SlowConfig)["lr_scheduler_type"])
"""transformers' schedules that need nothing but the number of steps."""


@dataclass(frozen=True)
class SamplingConfig:
    """How rollouts are sampled and scored.

    Attributes:
        temperature: Sampling temperature of every rollout, above 0 and at most 2.
        top_p: Nucleus mass, in (0, 1].
        max_tokens: Longest completion of one call, in tokens; ``None`` takes the LM's own limit.
        failure_score: Reward of a rollout that could not be scored; where the metric has given less
            than that, the least it has given in the run: to fail must never pay.
        rollout_timeout: Seconds a program may run between two model calls, and a metric may take,
            before the rollout is given up; ``None`` waits for ever. Generation does not count.
        max_calls: Model calls one rollout may make, beside the turns (``max_turns``) of
            environments in the program; a program that loops ends there.
        num_threads: Rollouts alive at once, each in its thread; the largest generation batch.
        val_size: V, validation examples scored each cycle; the rest of the set is not used.
        val_samples: Most rollouts of each of them (the paper has 4). Of the best candidate, more
            are run as long as it is open how it compares with the best so far
            (``fst_dspy.loop.validation``). Where there are more examples, a larger ``val_size`` is
            the better use.
        structured: Whether answers are held to the format that the adapter reads; they are then
            trained as they were sampled, over what the format allows. ``"auto"`` does it where more
            than a tenth of the first validation's answers cannot be read. ``False`` leaves what the
            ``LocalLM`` says.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    failure_score: float = 0.0
    rollout_timeout: float | None = 120.0
    max_calls: int = 64
    num_threads: int = 128
    val_size: int = 48
    val_samples: int = 1
    structured: Literal["auto"] | bool = "auto"

    def __post_init__(self) -> None:
        _check_kinds(self)
        _require(
            0 < self.temperature <= 2,  # what a ``LocalLM`` takes
            "temperature must be above 0 (greedy groups are constant) and at most 2, "
            f"got {self.temperature}",
        )
        _require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        _require(
            self.max_tokens is None or self.max_tokens >= 1,
            f"max_tokens must be at least 1 or None, got {self.max_tokens}",
        )
        _require(
            abs(self.failure_score) <= MAX_SCORE,  # nan is refused with it
            f"failure_score must be a score, at most {MAX_SCORE:g} either way, "
            f"got {self.failure_score}",
        )
        _require(
            self.rollout_timeout is None or self.rollout_timeout > 0,
            f"rollout_timeout must be positive or None, got {self.rollout_timeout}",
        )
        for name in ("max_calls", "num_threads", "val_size", "val_samples"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, got {value}")
        _require(
            self.structured == "auto" or isinstance(self.structured, bool),
            f"structured must be 'auto', True or False, got {self.structured!r}",
        )


@dataclass(frozen=True)
class FSTConfig:
    """All settings of one compile."""

    fast: FastConfig = field(default_factory=FastConfig)
    slow: SlowConfig = field(default_factory=SlowConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    budget: BudgetConfig = field(default_factory=lambda: BudgetConfig(max_cycles=6))

    def __post_init__(self) -> None:
        group_size, population_size = self.slow.group_size, self.fast.population_size
        _require(
            group_size % population_size == 0,
            f"group_size ({group_size}) must be a multiple of population_size ({population_size}), "
            "so that every candidate gets the same number of rollouts in a group; try "
            f"group_size={population_size * max(2, math.ceil(group_size / population_size))}",
        )
        _require(
            self.slow.advantage == "problem" or group_size >= 2 * population_size,
            "advantage='candidate' compares rollouts of one candidate: group_size must be at least "
            f"twice population_size, got {group_size} and {population_size}",
        )
        constant = self.slow.lr_scheduler_type in ("constant", "constant_with_warmup")
        _require(
            constant or self.budget.max_cycles is not None,
            f"lr_scheduler_type={self.slow.lr_scheduler_type!r} decays over max_cycles: set it",
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def make(cls, auto: Auto | None = None, **settings: Any) -> FSTConfig:
        """Build a config from settings given flat, by name.

        Args:
            auto: A preset for the budget; settings given by name win over it. ``"light"`` when
                no limit is given at all.
            **settings: Any field of the four parts, such as ``learning_rate=1e-4``, or a name that
                TRL, GEPA or DSPy have for one (``ALIASES``); ``lora=True``
                stands for ``LoraConfig()``, ``lora_rank=8`` for adapters of that rank and twice
                that alpha (0 for none), ``rollouts_per_candidate=2`` for a ``group_size`` of twice
                the ``population_size``. The last two can be varied freely, as studies do.

        Raises:
            ConfigError: An unknown setting (the nearest name is suggested) or a bad value.
        """
        settings = _without_aliases(settings)
        if auto is None and not any(settings.get(name) is not None for name in LIMITS):
            auto = "light"
        if auto is not None:
            _require(auto in AUTO, f"auto must be one of {sorted(AUTO)}, got {auto!r}")
            _require(
                settings.get("max_full_evals") is None,
                "give auto or max_full_evals: both say how long the run is",
            )
            settings = {**AUTO[auto], **settings}
        settings = _derive(settings)
        settings["lora"] = as_lora(settings.get("lora", "auto"))
        owner = _owners()
        values: dict[str, dict[str, Any]] = {name: {} for name in PARTS}
        for name, value in settings.items():
            if name not in owner:
                raise _unknown_setting(name)
            values[owner[name]][name] = value
        return cls(**{name: PARTS[name](**values[name]) for name in PARTS})


def settings_of_arm(arm: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings as an arm has them: weights alone have one candidate, under which all G run.

    ``rollouts_per_candidate`` is taken of the candidates that there are in other arms, so that the
    same settings give groups of one size in all of them. Prompts alone have no groups, and so any
    population; their group size, where none is given, is one that goes with it.
    """
    if arm == "rl_only":
        if "rollouts_per_candidate" in settings:
            settings = _derive(dict(settings))
        return {**settings, "population_size": 1}
    size, given = settings.get("population_size"), {ALIASES.get(n, n) for n in settings}
    if arm == "gepa_only" and type(size) is int and not given & {"group_size", *DERIVED}:
        return {**settings, "group_size": 2 * size}
    return dict(settings)


def used_by(arm: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings, and other options of ``FST``, without those that the arm has no use for."""
    unused = _unused_by(arm)
    return {
        name: value
        for name, value in options.items()
        if STANDS_FOR.get(own := ALIASES.get(name, name), own) not in unused
    }


def _unused_by(arm: str) -> set[str]:
    """What an arm has no use for: most is of the channel that it does not have."""
    kept = {"perfect_score", "population_size"}  # who reads them, and group sizes
    names = {
        part: {f.name for f in dataclasses.fields(kind)} - kept for part, kind in PARTS.items()
    }
    unused = {
        "rl_only": {*names["fast"], "batch_sampler", "reflection_lm", "instruction_proposer"},
        "gepa_only": {*names["slow"], "first_phase", "reuse", "reuse_window"},
        "fst_distill": {*OF_REWARDS, *OF_TEXT, "loss_type", "beta", "entropy_coef"}
        | {"slow_signal", "revisit_constant", "damp_constant"},
    }
    return unused.get(arm, set())


def without_effect(arm: str, config: FSTConfig, given: Mapping[str, Any]) -> list[str]:
    """What to tell of options that were given, and that the arm or others leave without effect.

    Where all settings are given, as those that were saved are, the defaults are no wish.

    Args:
        arm: ``"fst"`` and the like, or ``"fst_distill"``.
        config: The settings that came of it.
        given: Settings and options of ``FST``, as they were given.
    """
    used = used_by(arm, wishes := wished(given))
    told = [f"{name} has no effect with arm={arm!r}" for name in wishes if name not in used]
    proposing = (given.get(name) is not None for name in ("reflection_lm", "instruction_proposer"))
    why = _overruled(config, *proposing)
    told += [f"{name} has no effect {why[own]}" for name, own in used.items() if why.get(own)]
    return sorted(told)


def wished(given: Mapping[str, Any]) -> dict[str, str]:
    """Of options that were given, those that are not the defaults, and our names for them."""
    usual = {f.name: f.default for kind in PARTS.values() for f in dataclasses.fields(kind)}
    usual["lora"] = "auto"  # as ``FSTConfig.make`` has it
    own = {name: ALIASES.get(name, name) for name in given}
    return {name: own[name] for name, value in given.items() if value != usual.get(own[name])}


def _overruled(config: FSTConfig, has_reflection_lm: bool, has_proposer: bool) -> dict[str, str]:
    """The settings that others leave without effect, and why."""
    slow, fast = config.slow, config.fast
    why: dict[str, str] = {}
    if slow.slow_signal not in ("auto", "both"):
        why["distillation_weight"] = "without slow_signal='both'"
    if slow.slow_signal == "reward":
        why["teacher_update_rate"] = "without slow_signal='feedback' or 'both'"
    if slow.slow_signal in ("feedback", "both"):
        why["revisit_constant"] = f"with slow_signal={slow.slow_signal!r}"
    if slow.credit != "turn":
        why["discount"] = "without credit='turn'"
    if slow.loss_type in ("cispo", "sapo", "vespo"):
        why["epsilon"] = "without a loss_type that clips both ways, such as 'dapo'"
    if slow.loss_type in ("sapo", "vespo"):
        why["epsilon_high"] = "without a loss_type that clips, such as 'cispo'"
    if slow.slow_signal == "feedback":
        why |= dict.fromkeys(OF_REWARDS, "with slow_signal='feedback'")
    if not fast.reuse:
        why["reuse_window"] = "without reuse=True"
    if has_proposer:
        words = "with an instruction_proposer, which has its own way"
        why |= dict.fromkeys(("instruction_tokens", *OF_REFLECTION), words)
    elif not has_reflection_lm:
        why |= dict.fromkeys(OF_REFLECTION, "without a reflection_lm")
        why["reflection_context"] = "without a reflection_lm or an instruction_proposer"
    return why


def check_setting(name: str, value: Any) -> None:
    """Check one flat setting by itself, whatever the others are.

    Raises:
        ConfigError: There is no such setting (the nearest name is suggested), or the value is out
            of range.
    """
    if name in DERIVED:
        _check_derived(name, value)
        return
    owner = _owners()
    if name not in owner:
        raise _unknown_setting(name)
    needed = {"max_cycles": 1} if owner[name] == "budget" else {}  # there must be some limit
    PARTS[owner[name]](**{**needed, name: as_lora(value) if name == "lora" else value})


def check_share(name: str, value: Any) -> None:
    """That an optimizer's own argument is a share.

    Raises:
        ConfigError: It is not.
    """
    between = isinstance(value, int | float) and 0 < value < 1
    _require(between, f"{name} must be a number between 0 and 1, got {value!r}")


def _check_derived(name: str, value: Any) -> None:
    least = DERIVED[name]
    _require(
        isinstance(value, int) and not isinstance(value, bool) and value >= least,
        f"{name} must be a whole number of at least {least}, got {value!r}",
    )


def _derive(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with ``group_size`` and ``lora`` in place of what they are derived from."""
    settings = dict(settings)
    for name, target in STANDS_FOR.items():
        if name not in settings:
            continue
        _require(target not in settings, f"give {name} or {target}, not both")
        value = settings.pop(name)
        _check_derived(name, value)
        if name == "lora_rank":
            settings["lora"] = LoraConfig(rank=value, alpha=2.0 * value) if value else None
        else:
            population_size = settings.get("population_size", FastConfig.population_size)
            settings["group_size"] = value * population_size
    return settings


def _owners() -> dict[str, str]:
    """The part that each flat setting belongs to."""
    return {f.name: part for part, kind in PARTS.items() for f in dataclasses.fields(kind)}


def _without_aliases(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under our names."""
    named: dict[str, Any] = {}
    for name, value in settings.items():
        own = ALIASES.get(name, name)
        _require(
            own == name or own not in settings,
            f"{name} is another name of {own}: give one of them",
        )
        _require(own not in named, f"{own} is given twice, under other names")
        named[own] = value
    return named


def _require_templates(templates: str | Mapping[str, str] | None) -> None:
    by_name = templates if isinstance(templates, Mapping) else {"it": templates}
    for name, template in by_name.items():
        if template is None:
            continue
        missing = [p for p in PLACEHOLDERS if not isinstance(template, str) or p not in template]
        _require(
            not missing,
            f"reflection_prompt_template must hold {' and '.join(PLACEHOLDERS)}; {name} lacks "
            f"{', '.join(missing)}",
        )


def _unknown_setting(name: str) -> ConfigError:
    if name in ALIASES:
        return ConfigError(f"{name!r} is called {ALIASES[name]!r} here")
    if name in ELSEWHERE:
        return ConfigError(f"FST has no setting {name!r}: {ELSEWHERE[name]}")
    if name in OPTIONS:
        return ConfigError(
            f"{name!r} is no setting but an argument of FST; on the command line it is "
            f"{OPTIONS[name]}"
        )
    known = sorted([*_owners(), *DERIVED, *ALIASES])
    near = difflib.get_close_matches(name, known, n=1)
    known = sorted([*_owners(), *DERIVED])
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
    return ConfigError(f"unknown setting {name!r}{hint}")


def as_lora(value: Any) -> LoraConfig | Literal["auto"] | None:
    """Adapter settings from what users write: ``True``, a dict, a ``LoraConfig``, or none of it."""
    if value == "auto":
        return "auto"
    if value is True:
        return LoraConfig()
    if value is False or value is None:
        return None
    if isinstance(value, dict):
        known = [f.name for f in dataclasses.fields(LoraConfig)]
        unknown = [name for name in value if name not in known]
        _require(
            not unknown,
            f"lora has no {', '.join(map(repr, unknown))}; it takes: {', '.join(known)}",
        )
        return LoraConfig(**value)
    _require(isinstance(value, LoraConfig), f"lora must be a LoraConfig or a bool, got {value!r}")
    return value


OF_REWARDS = ("epsilon", "epsilon_high", "scale_rewards", "advantage", "credit", "discount")
"""Settings of how weights learn from rewards."""
OF_TEXT = ("distillation_weight", "teacher_update_rate")
"""Of how they learn from feedback."""
OF_REFLECTION = ("max_reflection_cost", "max_reflection_tokens")
"""Of what the reflection LM may take."""

DERIVED = {"rollouts_per_candidate": 1, "lora_rank": 0}
"""Flat settings that stand for others, with the least value of each."""
STANDS_FOR = {"rollouts_per_candidate": "group_size", "lora_rank": "lora"}
"""Which they stand for."""

PARTS: dict[str, Any] = {
    "fast": FastConfig,
    "slow": SlowConfig,
    "sampling": SamplingConfig,
    "budget": BudgetConfig,
}

ALIASES = {
    "num_generations": "group_size",
    "lr": "learning_rate",
    "max_completion_length": "max_tokens",
    "kl_coef": "beta",
    "max_metric_calls": "max_rollouts",
    "reflection_minibatch_size": "minibatch_size",
    "module_selector": "component_selector",
}
"""Names that TRL, GEPA and DSPy have for settings of ours."""

_OF_THE_MODEL = "the model has it: LocalLM(..., {}=)"
OPTIONS = {
    "arm": "--arm",
    "auto": "--auto",
    "log_dir": "--out",
    "log_rollouts": "--no-rollouts",
    "reflection_lm": "--reflection-lm",
    "report_to": "--report-to",
    "seed": "--seed",
}
"""Arguments of FST that are no settings, and the options that they are on the command line."""
ELSEWHERE = {
    "device": _OF_THE_MODEL.format("device"),
    "dtype": _OF_THE_MODEL.format("dtype"),
    "quantization_config": _OF_THE_MODEL.format("quantization_config"),
    "model": "the program's LocalLM says it: dspy.configure(lm=fst_dspy.LocalLM(...))",
    "lm": "the program's own is tuned: dspy.configure(lm=fst_dspy.LocalLM(...))",
    "max_steps": "optimizer steps are max_cycles times steps_per_cycle",
    "num_train_steps": "optimizer steps are max_cycles times steps_per_cycle",
    "num_train_epochs": "say how long with max_cycles, max_rollouts or max_seconds",
    "num_dspy_examples_per_grpo_step": "this is problems_per_step",
    "num_rollouts_per_grpo_step": "this is group_size",
    "per_device_train_batch_size": "a step is problems_per_step times group_size rollouts, in "
    "passes of at most micro_batch_size rows",
    "num_iterations": "each group is used for exactly one optimizer step",
    "gradient_accumulation_steps": "micro_batch_size rows are in one pass; the step is the same",
    "generation_batch_size": "num_threads rollouts are generated at once",
    "warmup_ratio": "give warmup_steps, in optimizer steps",
    "epsilon_low": "this is epsilon",
    "optim": "the optimizer is AdamW; set learning_rate, weight_decay and lr_scheduler_type",
    "bf16": "weights have the LocalLM's dtype",
    "fp16": "weights have the LocalLM's dtype",
    "use_vllm": "call fst_dspy's use_vllm on the LocalLM",
    "output_dir": "the run folder is log_dir",
    "run_dir": "the run folder is log_dir",
    "save_steps": "a run with log_dir saves itself at every cycle, and of steps what is due",
    "breadth": "this is population_size",
    "num_candidates": "this is population_size",
    "use_merge": "give merge_iterations, the merges tried in a fast phase; 0 for none",
    "max_merge_invocations": "give merge_iterations, the merges tried in a fast phase",
    "custom_candidate_proposer": "this is instruction_proposer",
    "prompt_model": "this is reflection_lm",
    "task_model": "the program's own LocalLM is trained",
    "code_proposer": "dspy.Flex code is not optimized",
    "add_format_failure_as_feedback": "format failures always are feedback",
    "format_failure_score": "this is failure_score",
    "warn_on_score_mismatch": "the reward is the metric's score of the whole prediction; of a "
    "single predictor only the feedback is used",
    "multitask": "one model is trained for all predictors",
    "exclude_demos": "demos stay in the prompts that are trained on",
    "use_train_as_val": "examples of the trainset are held out where valset is left out",
    "num_steps_for_val": "it validates every steps_per_cycle optimizer steps",
    "train_kwargs": "give each setting as an argument of its own: FST(..., learning_rate=1e-5)",
    "peft_config": "give lora=True, or lora_rank",
    "sampling_strategy": "an iteration draws one parent; see candidate_selection_strategy",
    "selection_strategy": "every accepted child is kept; see population_size",
    "val_evaluation_policy": "val_size validation examples are scored",
    "stop_callbacks": "give it to FST itself",
    "callbacks": "give it to FST itself",
    "gepa_kwargs": "give it to FST itself",
    "track_best_outputs": "the run folder (log_dir) keeps all training rollouts",
    "use_wandb": "give report_to='wandb'",
    "use_mlflow": "give report_to='mlflow'",
    "max_bootstrapped_demos": "give demo_tokens, the room for a predictor's demos",
    "max_labeled_demos": "give demo_tokens, the room for a predictor's demos",
    "max_errors": "a rollout that fails gets failure_score",
    "requires_permission_to_run": "nothing asks for permission",
}
"""Names of TRL, GEPA and DSPy that are no settings of ours, and what there is instead."""

SINCE: dict[str, dict[str, Any]] = {
    "fast": {
        "candidate_selection_strategy": "pareto",
        "acceptance_criterion": "strict_improvement",
        "skip_perfect_score": False,
        "perfect_score": 1.0,
        "reflection_prompt_template": None,
        "cold_start_demos": 4,
        "format_feedback": True,
        "reflection_context": "step",
        "frontier_type": "instance",
        "tool_descriptions": False,
        "copy_guard": True,  # there was none; a run of before goes on with it all the same
    },
    "slow": {
        "credit": "rollout",
        "discount": 1.0,
        "slow_signal": "reward",
        "distillation_weight": 0.5,
        "teacher_update_rate": 1.0,
    },
    "sampling": {"structured": "auto", "val_samples": 1},
    "budget": {
        "max_full_evals": None,
        "max_env_steps": None,
        "max_env_turns": None,
        "max_env_seconds": None,
        "on_no_signal": "stop",
    },
}
"""Settings that earlier versions did not have, by part, with what they did, or with what only the
first validation asks, which is behind their runs."""

REMOVED: dict[str, Any] = {"off_policy_steps": 0, "resample_constant": 0}
"""Settings of earlier versions, with the values at which they changed nothing."""


def without_removed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved ``FSTConfig.to_dict``, without settings that are gone and were switched off.

    Those that have come since have the value that says what was done before.
    """
    return {
        part: SINCE.get(part, {})
        | {k: v for k, v in values.items() if k not in REMOVED or v != REMOVED[k]}
        for part, values in config.items()
    }


AUTO: dict[str, dict[str, Any]] = {
    "light": {"max_cycles": 6},
    "medium": {"max_cycles": 15, "first_cycle_iterations": 12},
    "heavy": {
        "max_cycles": 40,
        "first_cycle_iterations": 16,
        "cycle_iterations": 3,
        "val_size": 96,
    },
    # Tiwari et al., 2026, sections 3 and 4; what it leaves open has the value that leaves out what
    # is ours. The learning rate goes by the model's size, as ever.
    "paper": {
        "max_cycles": 33,  # section 4: 200 optimizer steps a task
        "steps_per_cycle": 6,  # section 4: T
        "group_size": 8,  # section 4: G
        "population_size": 4,  # section 4: K is 4 or 8
        "loss_type": "cispo",  # section 3
        "advantage": "problem",  # section 3: one baseline for all G, whatever their prompts
        "reuse": False,  # section 3: GEPA's rollouts are its own, in every cycle
        # Section 3: a light round of GEPA. dspy.GEPA's auto="light" is six candidates, which it
        # takes ten trials for in a program of one predictor, on three examples each.
        "first_cycle_iterations": 10,
        "cycle_iterations": 10,
        "minibatch_size": 3,
        "merge_iterations": 0,
        "demo_tokens": 0,  # section 3: instructions alone are evolved
        "val_samples": 4,  # section 4: mean@4 at the sampling temperature
        "temperature": 1.0,
        "revisit_constant": 1.0,  # ours, and so are the next ones
        "damp_constant": False,
        "slow_signal": "reward",
        "cold_start_demos": 0,
        "format_feedback": False,
        "structured": False,
        "on_no_signal": "warn",
    },
}
