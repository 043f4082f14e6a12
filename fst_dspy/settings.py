"""The settings of ``FST`` for editors and type checkers, made from ``fst_dspy.config``.

Written by ``tests/support/settings_file.py``; a test compares it with the dataclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from gepa.proposer.reflective_mutation.base import CandidateSelector
    from gepa.strategies.acceptance import AcceptanceCriterion
    from gepa.strategies.batch_sampler import BatchSampler

    from fst_dspy.config import LoraConfig


class Settings(TypedDict, total=False):
    """What ``FST(**settings)`` takes; ``help(fst_dspy.FST)`` lists it with the defaults."""

    population_size: int
    """Default 4. K, candidates kept on the Pareto front and spread over each group."""
    first_cycle_iterations: int
    """Default 8. GEPA iterations of the first fast phase, which has most to learn. Where it is
    alone, it is interrupted by a validation once a child is better than its parent by more
    than chance."""
    cycle_iterations: int
    """Default 2. GEPA iterations of each later fast phase. With 0, ``gepa_only`` ends after the
    first one."""
    minibatch_size: int
    """Default 12. Training examples reflected on in one iteration."""
    instruction_tokens: int
    """Default 256. Most tokens of the local model that an instruction may hold of what is
    learned, beside the student's own text."""
    first_phase: Literal["fast", "slow"]
    """Default 'fast'. Which phase opens the first cycle: ``"fast"``, as in the paper, or
    ``"slow"``, which leaves that cycle to the slow channel alone. Later cycles are the same."""
    demo_tokens: int | Literal["auto"]
    """Default 'auto'. Most tokens that a predictor's learned demos may take in its prompt; 0
    leaves demos alone. ``"auto"`` does so until four iterations have found no better
    instructions; from then on it is 512, and a quarter of the context window at most."""
    component_selector: Literal["round_robin", "worst_first", "all"] | Callable[..., list[str]]
    """Default 'round_robin'. Which component the next proposal rewrites: ``"round_robin"``,
    ``"worst_first"``, the predictor that fares worst on the minibatch, or ``"all"``. All
    instructions at once while the minibatch scores alike, which does not tell who is at
    fault. ``FST`` takes an object of gepa's protocol here too, which is ``"custom"``."""
    candidate_selection_strategy: (
        Literal["pareto", "current_best", "epsilon_greedy", "top_k_pareto"] | CandidateSelector
    )
    """Default 'pareto'. How an iteration's parent is drawn (gepa): ``"pareto"``,
    ``"current_best"``, ``"epsilon_greedy"``, ``"top_k_pareto"``, or an object."""
    acceptance_criterion: (
        Literal["strict_improvement", "improvement_or_equal"] | AcceptanceCriterion
    )
    """Default 'strict_improvement'. What a child must show on the minibatch (gepa):
    ``"strict_improvement"``, ``"improvement_or_equal"``, or an object."""
    skip_perfect_score: bool
    """Default False. Do not reflect on a minibatch whose scores are all ``perfect_score``."""
    perfect_score: float
    """Default 1.0. The best score there is."""
    reflection_prompt_template: str | Mapping[str, str] | None
    """Default None. Prompt of the reflection LM (gepa), with ``<curr_param>`` and
    ``<side_info>``; or such prompts by predictor. ``None`` means gepa's own."""
    reflection_context: Literal["step", "trajectory"]
    """Default 'step'. What a proposer is shown of a rollout: ``"step"``, the inputs and outputs
    of the predictor whose text is rewritten, or ``"trajectory"``, besides these all steps of
    the program in their order (``"Program Trajectory"`` in its records)."""
    frontier_type: Literal["instance", "objective", "hybrid", "cartesian"]
    """Default 'instance'. On what candidates of the Pareto front are best (gepa):
    ``"instance"``, an example; ``"objective"``, one of the metric's ``objective_scores`` over
    all examples; ``"hybrid"``, either; ``"cartesian"``, an objective on an example."""
    copy_guard: bool
    """Default True. Refuse an instruction that copies what training examples have for inputs
    (``fst_dspy.fast.proposers.copying``)."""
    merge_iterations: int
    """Default 1. Merges of complementary candidates tried after the iterations of a fast phase
    (or, with ``reuse``, after as many trials); 0 switches them off."""
    reuse: bool
    """Default True. Score, reflect on and try candidates within the slow phase's own rollouts,
    from the first slow phase on. ``False`` is the paper's way: separate rollouts for GEPA.
    Without a slow phase it has no effect."""
    reuse_window: int | None
    """Default None. Optimizer steps for which a slow rollout counts; ``None`` means
    ``steps_per_cycle``."""
    max_reflection_cost: float | None
    """Default None. US dollars that the reflection LM may cost, by litellm's price list; then
    the run goes on without it. ``None`` sets no limit."""
    max_reflection_tokens: int | None
    """Default None. Prompt and completion tokens of the reflection LM, likewise."""
    cold_start_demos: int
    """Default 4. Where the first validation shows nothing to learn from, as many labelled
    training examples are shown as demos in a candidate beside the student's own; where
    ``demo_tokens`` is no number above 0, in a quarter of the context window at most; 0 for
    none."""
    format_feedback: bool
    """Default True. Where it does after all, or where answers cannot be read, what is told of
    such an answer says what was wrong with it and what was wanted, so that instructions can
    be written against it."""
    tool_descriptions: bool
    """Default False. Let proposals also rewrite what the model reads of an agent's tools, a
    component each (``fst_dspy.student.tools``). Without a ``reflection_lm`` those lessons of
    the feedback go there that name the tool."""
    steps_per_cycle: int
    """Default 6. T, optimizer steps after each fast phase."""
    group_size: int
    """Default 8. G, rollouts a problem (TRL: ``num_generations``), at least 2."""
    problems_per_step: int
    """Default 8. P, problems an optimizer step."""
    learning_rate: float | None
    """Default None. Peak learning rate of AdamW. ``None`` takes one by the size of the model and
    whether adapters are trained: 3e-4 for the embedded model, 5e-5 at 135 million parameters,
    1e-6 at 7 billion; ten times that with adapters, from 135 million on
    (``fst_dspy.slow.learning_rate``)."""
    lr_scheduler_type: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
    ]
    """Default 'constant'. One of transformers' schedules that need no settings of their own. One
    that decays spans ``max_cycles`` cycles, and so needs ``max_cycles``."""
    warmup_steps: int
    """Default 0. Optimizer steps of linear warm-up, with every schedule."""
    max_grad_norm: float
    """Default 1.0. Gradient clipping; 0 switches it off."""
    weight_decay: float
    """Default 0.0. AdamW's weight decay."""
    loss_type: Literal["cispo", "dapo", "grpo", "bnpo", "dr_grpo", "sapo", "vespo"]
    """Default 'cispo'. TRL's name of the loss, one over tokens; the paper uses ``"cispo"``."""
    epsilon: float
    """Default 0.2. TRL's lower clip, for losses that clip both ways."""
    epsilon_high: float
    """Default 5.0. TRL's upper clip. With CISPO it is the cap on the importance weight itself
    (ScaleRL: 5.0); TRL's own default would scale every gradient by 0.2."""
    scale_rewards: Literal["group", "batch", "none"]
    """Default 'group'. TRL's scaling of the advantage: ``"group"``, ``"batch"`` or ``"none"``."""
    advantage: Literal["problem", "candidate"]
    """Default 'problem'. What a rollout's reward is compared with: ``"problem"``, all G rollouts
    of the problem, as in the paper, or ``"candidate"``, those under the same candidate alone."""
    credit: Literal["rollout", "turn"]
    """Default 'rollout'. What of an agent's rollout a call is credited with: ``"rollout"``, the
    whole reward, or ``"turn"``, what it gained from the call's turn on, compared with what
    the others of the group gained from that turn on (``fst_dspy.slow.advantage``)."""
    discount: float
    """Default 1.0. Of rewards of later turns, in (0, 1], with ``credit="turn"``: what is gained
    k turns later counts for ``discount ** k``."""
    slow_signal: Literal["auto", "reward", "feedback", "both"]
    """Default 'auto'. What the weights learn from: ``"reward"``, the advantages of rollouts;
    ``"feedback"``, the metric's text: the policy that has read it teaches the one that has
    not, token by token on what that has said (``fst_dspy.loop.self_teacher``; SDPO, arXiv
    2601.20802); or ``"both"``. Text is for weights that have no prompts beside them to hold
    it (``arm="rl_only"``), and for rewards that say nothing: with ``"auto"`` it is rewards,
    and both once a cycle's were equal in nearly every group, and low (under FSDP, rewards)."""
    distillation_weight: float
    """Default 0.5. Of the feedback where both count, in (0, 1); rewards have the rest (TRL:
    SDPO's ``distillation_weight``)."""
    teacher_update_rate: float
    """Default 0.05. With feedback, share of the way to the live weights that the teacher's go
    after each step, in (0, 1] (TRL: SDPO's); at 1 the live weights teach, which may follow
    each other into repeating themselves."""
    beta: float
    """Default 0.0. Weight of TRL's KL penalty to the base model; 0 switches it off."""
    entropy_coef: float
    """Default 0.0. Weight of TRL's entropy bonus, the mean entropy a token; 0 switches it off."""
    micro_batch_size: int | None
    """Default None. Most rows in one forward and backward pass; by default as many as memory
    seems to hold, and on a CPU 16, where they are not read as a tree."""
    revisit_constant: float
    """Default 0.5. Probability, in (0, 1], that a problem's turn is taken after its latest group
    had a constant reward (no gradient); to the power of such groups in a row, but at least
    1/16. 1 takes every turn. See ``fst_dspy.loop.problems``."""
    damp_constant: bool
    """Default True. Multiply the learning rate of a step by the square root of the share of its
    rows that have an advantage, as for a smaller batch (Malladi et al. 2022, "On the SDEs and
    Scaling Rules for Adaptive Gradient Algorithms"): rows of constant groups say nothing, and
    AdamW would move a policy that has learned its task as far by the noise of one group as by
    eight. Without effect under a KL penalty or entropy bonus, which all rows have."""
    max_bad_steps: int
    """Default 5. Steps in a row with a loss or gradient that is not finite, after which the run
    stops; each of them is dropped."""
    lora: LoraConfig | Mapping[str, Any] | bool | Literal["auto"] | None
    """Default 'auto'. Adapter settings, or ``None`` for full fine-tuning; ``FST`` has ``"auto"``
    besides, its default: adapters where training all weights would not fit in the machine's
    memory."""
    temperature: float
    """Default 1.0. Sampling temperature of every rollout, above 0 and at most 2."""
    top_p: float
    """Default 1.0. Nucleus mass, in (0, 1]."""
    max_tokens: int | None
    """Default None. Longest completion of one call, in tokens; ``None`` takes the LM's own
    limit."""
    failure_score: float
    """Default 0.0. Reward of a rollout that could not be scored; where the metric has given less
    than that, the least it has given in the run: to fail must never pay."""
    rollout_timeout: float | None
    """Default 120.0. Seconds a program may run between two model calls, and a metric may take,
    before the rollout is given up; ``None`` waits for ever. Generation does not count."""
    max_calls: int
    """Default 64. Model calls one rollout may make, beside the turns (``max_turns``) of
    environments in the program; a program that loops ends there."""
    num_threads: int
    """Default 128. Rollouts alive at once, each in its thread; the largest generation batch."""
    val_size: int
    """Default 48. V, validation examples scored each cycle; the rest of the set is not used."""
    val_samples: int
    """Default 1. Most rollouts of each of them (the paper has 4). Of the best candidate, more
    are run as long as it is open how it compares with the best so far
    (``fst_dspy.loop.validation``). Where there are more examples, a larger ``val_size`` is
    the better use."""
    structured: Literal["auto"] | bool
    """Default 'auto'. Whether answers are held to the format that the adapter reads; they are
    then trained as they were sampled, over what the format allows. ``"auto"`` does it where
    more than a tenth of the first validation's answers cannot be read. ``False`` leaves what
    the ``LocalLM`` says."""
    max_cycles: int | None
    """Default 6. Cycles to run, at least 1, or ``None``; those of prompts alone, which have no
    optimizer steps (``fst_dspy.optimizer``), do not count."""
    max_rollouts: int | None
    """Default None. Rollouts to run over all channels (fast, slow and eval), or ``None``. A
    cycle ends before a step or iteration that would go beyond it; one is taken in any case."""
    max_seconds: float | None
    """Default None. Wall time of the compile, or ``None``. The step or iteration under way when
    it is reached is the cycle's last."""
    max_full_evals: int | None
    """Default None. ``max_rollouts`` in runs over all examples, those of training and of
    validation together, as ``dspy.GEPA`` counts; or ``None``. One of the two."""
    max_env_steps: int | None
    """Default None. Tool calls of agents in their environments (``fst_dspy.env``), or ``None``.
    As ``max_rollouts``, where rollouts are like those before."""
    max_env_turns: int | None
    """Default None. Turns of agents there: those calls, and actions that were none; or ``None``.
    Likewise."""
    max_env_seconds: float | None
    """Default None. Time that their environments take, summed over rollouts, in seconds; or
    ``None``. Likewise."""
    on_no_signal: Literal["stop", "warn"]
    """Default 'stop'. What to do where nothing is left to learn: after a full cycle all of whose
    rollouts had the same reward, unless the metric's text teaches the weights from then on
    (``slow_signal``), or where neither channel pays any more (``fst_dspy.loop.share``).
    ``"stop"`` ends the run, whatever is left of its limits (with an error where all rollouts
    failed), ``"warn"`` says so and goes on."""
    rollouts_per_candidate: int
    """Rollouts a problem under each candidate: group_size is this times population_size. In
    place of group_size."""
    lora_rank: int
    """Rank of adapters whose alpha is twice that; 0 for none. In place of lora."""
    batch_sampler: Literal["epoch_shuffled"] | BatchSampler[Any, Any]
    """Draws the minibatches that are reflected on."""
    num_generations: int
    """Another name of ``group_size``."""
    lr: float | None
    """Another name of ``learning_rate``."""
    max_completion_length: int | None
    """Another name of ``max_tokens``."""
    kl_coef: float
    """Another name of ``beta``."""
    max_metric_calls: int | None
    """Another name of ``max_rollouts``."""
    reflection_minibatch_size: int
    """Another name of ``minibatch_size``."""
    module_selector: Literal["round_robin", "worst_first", "all"] | Callable[..., list[str]]
    """Another name of ``component_selector``."""
