"""The data that flows between the parts of fst_dspy: frozen dataclasses that hold and show it.

Shape suffixes name the axes of nested sequences, outermost first:
``P`` problems, ``G`` rollouts a group, ``K`` candidates, ``V`` validation examples,
``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from fst_dspy import display

if TYPE_CHECKING:
    import dspy
    from rich.console import RenderableType

Arm = Literal["fst", "rl_only", "gepa_only", "fst_distill"]
FailureKind = Literal[
    "parse",
    "empty",
    "truncated",
    "too_long",
    "program",
    "metric",
    "no_calls",
    "timeout",
    "infrastructure",
]
"""Why a rollout failed; one lost to the infrastructure says nothing of the model."""


@dataclass(frozen=True)
class Task:
    """A program with its metric and data, ready to be compiled.

    Attributes:
        name: Short identifier, such as ``"triage"``.
        program: The uncompiled student.
        metric: ``metric(gold, pred, trace=None, pred_name=None, pred_trace=None)``, returning a
            float or ``dspy.Prediction(score=, feedback=)``.
        trainset, valset, testset: Disjoint lists of ``dspy.Example`` with inputs set.
        ideal_instructions: For each predictor, the instruction that states all there is to know;
            the ceiling of what the fast weights can hold. Empty where nobody knows it.
    """

    name: str
    program: dspy.Module
    metric: Callable[..., Any]
    trainset: list[dspy.Example]
    valset: list[dspy.Example]
    testset: list[dspy.Example]
    ideal_instructions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """One setting of the fast weights: a text for every component of the program.

    Attributes:
        id: Content hash of ``components`` (12 hex digits): equal texts have equal ids.
        components: ``"<predictor>.instructions"`` holds an instruction, ``"<predictor>.demos"`` a
            JSON list of demos, ``"<predictor>.tool:<name>"`` a tool's description. A component that
            is absent keeps the student's own value.
        parent_ids: Candidates it was made from; empty for the seed.
        cycle: Cycle in which it was proposed (0 for the seed).
        source: How it was made: ``"seed"``, ``"instructions"``, ``"demos"`` or ``"merge"``.
    """

    id: str
    components: Mapping[str, str]
    parent_ids: tuple[str, ...] = ()
    cycle: int = 0
    source: str = "seed"

    @property
    def origin(self) -> str:
        """Its id and how it came to be, in one line."""
        parents = f" from {', '.join(self.parent_ids)}" if self.parent_ids else ""
        return f"{self.id} · {self.source}, cycle {self.cycle}{parents}"

    def __repr__(self) -> str:
        texts = [f"  {name}: {' '.join(t.split())}" for name, t in self.components.items()]
        return display.on_a_screen([f"Candidate {self.origin}", *(text[:100] for text in texts)])

    def _repr_html_(self) -> str:
        return display.texts_html(self.origin, self.components)

    def __rich__(self) -> RenderableType:
        return display.texts_rich(self.origin, self.components)


@dataclass(frozen=True)
class Population:
    """The fast weights: K candidates and their scores on V validation examples.

    Attributes:
        candidates: Length K, no two with the same id.
        val_ids: Length V, the examples' ids.
        score_K_V: Scores in the metric's own range, one row a candidate.
        policy_version: Optimizer steps taken when the scores were measured.
        objective_K_V: Scores by objective, a mapping for each in ``score_K_V``, all with the same
            objectives; empty where the metric gives none.
    """

    candidates: tuple[Candidate, ...]
    val_ids: tuple[str, ...]
    score_K_V: tuple[tuple[float, ...], ...]
    policy_version: int
    objective_K_V: tuple[tuple[Mapping[str, float], ...], ...] = ()

    @property
    def ranked(self) -> list[tuple[Candidate, float | None, int]]:
        """Candidates, best first, with mean score and on how many examples none is better.

        The mean is ``None`` before the population has been scored.
        """
        if not self.score_K_V:
            return [(candidate, None, 0) for candidate in self.candidates]
        top_V = [max(column) for column in zip(*self.score_K_V, strict=True)]
        rows = []
        for candidate, score_V in zip(self.candidates, self.score_K_V, strict=True):
            mean = sum(score_V) / max(1, len(score_V))
            wins = sum(score == top for score, top in zip(score_V, top_V, strict=True))
            rows.append((-mean, candidate.id, candidate, mean, wins))
        rows.sort(key=lambda row: row[:2])
        return [(candidate, mean, wins) for _, _, candidate, mean, wins in rows]

    def _shown(self) -> tuple[str, list[display.Ranked]]:
        title = (
            f"Population of {len(self.candidates)}, scored on {len(self.val_ids)} examples after "
            f"{self.policy_version} optimizer steps"
        )
        return title, [(mean, wins, c.origin, c.components) for c, mean, wins in self.ranked]

    def __repr__(self) -> str:
        title, rows = self._shown()
        lines = (f"  {display.score_text(mean)}  {origin}" for mean, _, origin, _ in rows)
        return display.on_a_screen([title, *lines])

    def _repr_html_(self) -> str:
        return display.population_html(*self._shown())

    def __rich__(self) -> RenderableType:
        return display.population_rich(*self._shown())


@dataclass(frozen=True)
class Grammar:
    """What an answer is held to: at each token, only those that the grammar lets follow are drawn.

    The policy is then ``p(t) / Z`` over the tokens allowed, which is also what is trained.

    Attributes:
        text: In llguidance's variant of Lark.
        takes_runs: Whether text that alone can follow is taken as the tokenizer writes it, as the
            built-in engine does; else the model chooses among the ways to write it, as in vLLM.
        thought: The marks around a thought that may come first; the grammar begins after it, and in
            it anything may be said but the end. ``None`` where the grammar begins at once.
        opened: Whether the prompt has opened the thought. Else the first text that is not white
            space decides: the opening mark begins a thought, and all other text the answer.
    """

    text: str
    takes_runs: bool = True
    thought: tuple[str, str] | None = None
    opened: bool = False


@dataclass(frozen=True)
class Call:
    """One call of the local model, recorded as sampled: never re-tokenised.

    Attributes:
        predictor: Name of the predictor that called, as in ``program.named_predictors()``.
        prompt_ids_T: Token ids of the rendered prompt.
        completion_ids_T: Sampled token ids, with the end token where one was sampled.
        logprobs_T: Log-probability (nats) of each completion token under the temperature-scaled
            softmax over the whole vocabulary, or over what the grammar allowed; the same length as
            ``completion_ids_T``.
        text: The decoded completion, without special tokens.
        finish_reason: ``"stop"``, or ``"length"`` when ``max_tokens`` cut it off.
        temperature: The temperature it was sampled at; 0 means greedy, or drawn with penalties:
            not from the policy, and so not learned from.
        grammar: What the answer was held to; ``None`` where it was free.
    """

    __repr__ = display.brief

    predictor: str
    prompt_ids_T: tuple[int, ...]
    completion_ids_T: tuple[int, ...]
    logprobs_T: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    temperature: float
    grammar: Grammar | None = None


@dataclass(frozen=True)
class PredictorTrace:
    """What one predictor was given and what was parsed from its answer.

    Attributes:
        predictor: Name of the predictor.
        inputs: Its input fields.
        outputs: Its parsed output fields; ``None`` when parsing failed.
        text: The completion it was parsed from (empty when no local model was called).
    """

    __repr__ = display.brief

    predictor: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any] | None
    text: str


TurnStatus = Literal["ok", "invalid", "error"]
"""What became of an action: done, no action at all, or a tool that failed."""


@dataclass(frozen=True)
class Turn:
    """One turn of an agent in an environment (``fst_dspy.agents``).

    Attributes:
        observation: What the agent saw before it, as text.
        action: What it did, as it said it.
        result: What it was shown then; of an invalid action, what was wrong with it.
        reward: What the environment's reward grew by.
        status: ``"invalid"`` where the environment never saw the action.
        seconds: Time that the environment took.
        calls: Calls of the local model that the rollout had made by the end of the turn.
        said: The answer's other fields by name, such as a ``reasoning``, as text.
    """

    __repr__ = display.brief

    observation: str
    action: str
    result: str
    reward: float
    status: TurnStatus
    seconds: float
    calls: int
    said: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why a rollout is scored without, or in spite of, the metric's word."""

    kind: FailureKind
    message: str


@dataclass(frozen=True)
class Rollout:
    """One run of the program on one example under one candidate.

    Attributes:
        example_id: Content hash of the example.
        candidate_id: The candidate whose texts were in the program.
        calls: Every call of the local model, in order.
        traces: Every predictor call, parsed, in order.
        reward: The metric's score; the failure score where the metric could not be asked.
        feedback: The metric's text, or an account of the failure.
        failure: ``None`` when the program ran and the metric scored it.
        policy_version: Optimizer steps taken when it was sampled.
        feedback_by_predictor: The metric's text for a predictor by name, where it was asked for
            one (``pred_name``) and it differs from ``feedback``.
        objective_scores: The metric's scores by objective, where it gives some.
        turns: Those of an agent, in order; empty for other programs.
    """

    __repr__ = display.brief

    example_id: str
    candidate_id: str
    calls: tuple[Call, ...]
    traces: tuple[PredictorTrace, ...]
    reward: float
    feedback: str
    failure: Failure | None
    policy_version: int
    feedback_by_predictor: Mapping[str, str] = field(default_factory=dict)
    objective_scores: Mapping[str, float] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()

    @property
    def is_lost(self) -> bool:
        """Whether it was lost to what it ran on: its reward means nothing, nothing is learned."""
        return self.failure is not None and self.failure.kind == "infrastructure"


@dataclass(frozen=True)
class Group:
    """The G rollouts of one problem, spread over the candidates of the population."""

    __repr__ = display.brief

    example_id: str
    rollouts_G: tuple[Rollout, ...]


@dataclass(frozen=True)
class TrainingRow:
    """One row of the policy-gradient loss: one call of the local model.

    Attributes:
        prompt_ids_T, completion_ids_T: As sampled.
        logprobs_T: Sampling log-probabilities, the length of ``completion_ids_T``.
        advantage: The advantage of the call's rollout, computed once per problem over all G.
        temperature: The temperature it was sampled at, above 0.
        grammar: What it was held to as it was sampled, and is when it is trained on.
    """

    __repr__ = display.brief

    prompt_ids_T: tuple[int, ...]
    completion_ids_T: tuple[int, ...]
    logprobs_T: tuple[float, ...]
    advantage: float
    temperature: float = 1.0
    grammar: Grammar | None = None

    @property
    def has_gradient(self) -> bool:
        """Whether its advantage is other than 0."""
        return self.advantage != 0


Untaught = Literal["perfect", "silent", "prompt", "unshown", "long"]
"""Why a call taught nothing that was to be read again, under a prompt that knows more.

It was of a perfect rollout; nothing is known of it; its own prompt could not be made again, so that
the other one would not be of the same question; what is known does not show in the prompt; or the
longer prompt does not fit into the context window.
"""


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did.

    Attributes:
        loss: The loss before the step.
        grad_norm: Norm of the gradient before clipping.
        learning_rate: The rate the step was taken at, shortened as ``damp_constant`` says; of a
            step that was skipped, the schedule's.
        entropy: Mean entropy (nats a token) of the policy over the completions.
        clip_share: Share of tokens whose importance weight was clipped, 0 to 1.
        rows: Rows that went into the step.
        skipped: Why no step was taken (``"constant"``, ``"non_finite"``), or ``None``.
        drift: Mean absolute difference (nats a token) between the log-probabilities at sampling
            and at the step: rounding where both are of the same weights.
        taught: Rows that were read again with feedback in their prompt (``slow_signal``), or under
            the teacher's (``FSTDistill``).
        lesson: How far the policy was, on these rows, from who read them again: nats a token, by
            Jensen and Shannon's divergence (``FSTDistill``: reverse KL).
        untaught: The calls that were not, by reason.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    entropy: float
    clip_share: float
    rows: int
    skipped: str | None = None
    drift: float = 0.0
    taught: int = 0
    lesson: float = 0.0
    untaught: Mapping[Untaught, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RolloutCounts:
    """Rollouts by channel. ``reused`` were served from earlier ones and cost nothing.

    Attributes:
        fast: Run for the fast phase: reflection minibatches and scoring of candidates.
        slow: Run for the slow phase: the groups of the optimizer steps.
        eval: Run for validation only: nothing was learned from them.
        reused: Scores or traces that an earlier rollout supplied.
    """

    fast: int = 0
    slow: int = 0
    eval: int = 0
    reused: int = 0

    @property
    def total(self) -> int:
        """Rollouts that were really run, over all channels."""
        return self.fast + self.slow + self.eval

    def minus(self, other: RolloutCounts) -> RolloutCounts:
        """The difference of two counts, channel by channel."""
        return self.plus(RolloutCounts(-other.fast, -other.slow, -other.eval, -other.reused))

    def plus(self, other: RolloutCounts) -> RolloutCounts:
        """The sum of two counts, channel by channel."""
        return RolloutCounts(
            fast=self.fast + other.fast,
            slow=self.slow + other.slow,
            eval=self.eval + other.eval,
            reused=self.reused + other.reused,
        )


@dataclass(frozen=True)
class TurnCounts:
    """What agents did, over many rollouts.

    Attributes:
        turns: Turns taken.
        steps: Of these, calls of an environment's tools: environment steps.
        invalid: Turns whose action was none, which the environment never saw.
        errors: Steps in which the tool failed.
        seconds: Time that environments took.
    """

    turns: int = 0
    steps: int = 0
    invalid: int = 0
    errors: int = 0
    seconds: float = 0.0

    def plus(self, turns: Sequence[Turn]) -> TurnCounts:
        """With some more turns."""
        invalid = sum(turn.status == "invalid" for turn in turns)
        return TurnCounts(
            turns=self.turns + len(turns),
            steps=self.steps + len(turns) - invalid,
            invalid=self.invalid + invalid,
            errors=self.errors + sum(turn.status == "error" for turn in turns),
            seconds=self.seconds + sum(turn.seconds for turn in turns),
        )

    def __add__(self, other: TurnCounts) -> TurnCounts:
        """Both together."""
        names = [one.name for one in fields(self)]
        return TurnCounts(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as written to ``steps.jsonl``.

    Attributes:
        cycle: The cycle it belongs to.
        step: Its number, counted from 1 over the whole run.
        reward: Mean reward of its rollouts.
        constant_group_share: Share of its groups with equal rewards (no gradient), 0 to 1.
        failures: Rollouts by kind of failure.
        rollouts: Rollouts it used.
        stats: What the optimizer did.
    """

    __repr__ = display.brief

    cycle: int
    step: int
    reward: float
    constant_group_share: float
    failures: Mapping[str, int]
    rollouts: int
    stats: StepStats


@dataclass(frozen=True)
class CycleRecord:
    """One cycle of the joint loop, as written to ``cycles.jsonl``.

    Attributes:
        cycle: 0 is the student as it came, before any learning.
        step: Optimizer steps taken by the end of the cycle.
        candidate_ids: The population after the cycle's fast phase.
        best_candidate_id: The candidate of the highest score in ``val_scores``, of which
            ``val_score`` is.
        train_reward: Mean reward over the cycle's slow rollouts; ``None`` without a slow phase.
        val_score: Mean score of the best candidate on the validation examples.
        val_scores: Mean score of each candidate, in the order of ``candidate_ids``: on the
            validation examples or, where slow rollouts are reused, on recent training problems.
        kl_to_base: KL(policy || base), nats a token, on validation prompts.
        entropy: Mean policy entropy, nats a token; ``None`` without a slow phase.
        constant_group_share: Share of groups with equal rewards (no gradient), 0 to 1.
        failure_shares: Share of the cycle's rollouts, of all channels, by kind of failure, 0 to 1;
            with a cold start, cycle 0 has those of the validation that stands.
        rollouts: Counts of this cycle.
        total_rollouts: Counts from the start of the run to the end of this cycle.
        tokens: Prompt and completion tokens from the start of the run.
        seconds: Wall time from the start of the run, by channel: ``fast``, ``slow``, ``eval``.
        weights_version: Version id of the weights at the end of the cycle.
        proposals: What became of the fast channel's proposals from the start of the run, and what
            reflection cost (``FastPhase.report``); ``"stopped"`` says which stop callback has ended
            the run.
        failure_messages: The first message of each kind of failure in the cycle.
        early_batches: Batches, from the start of the run, that were generated without a rollout
            which waited for something else than the model; where there are any, repeats of the run
            may differ in rounding, and so from there on.
        reward_range: Lowest and highest reward of the cycle's rollouts that are learned from;
            ``None`` where there were none.
        format_share: How often answers would keep to their format if they were not held to it, 0
            to 1, as estimated on the last validation that ran (``model.divergence.format_share``);
            near 1 the model keeps to it by itself. ``None`` where answers are free.
        cold_start: What was done as the first validation showed nothing to learn from, in words.
        turns: What agents did, from the start of the run; all 0 for other programs.
        share: Who had the cycle's rollouts: ``"prompts"``, ``"weights"``, ``"both"``; ``""`` for
            the student as it came, and in runs of before there were turns.
        decided: What was decided on the next cycles and why, in words; ``None``: go on as before.
        ended: Whether that was that the run is over.
        peak_memory: Bytes that were in use at most up to the end of the cycle, since the process
            began: torch's on a GPU, else the process's; 0 where it is not known.
        early_scores: What was known before the cycle's end, where the fast channel scores
            candidates on the validation examples itself: for each that joined, the rollouts of all
            channels by then, and the highest mean score of a candidate by then.
        lessons: The calls that were to be read again under a prompt that knows more
            (``slow_signal``, ``FSTDistill``): ``"taught"``, or why they were not (``Untaught``).
    """

    __repr__ = display.brief

    cycle: int
    step: int
    candidate_ids: tuple[str, ...]
    best_candidate_id: str
    train_reward: float | None
    val_score: float
    val_scores: tuple[float, ...]
    kl_to_base: float
    entropy: float | None
    constant_group_share: float
    failure_shares: Mapping[str, float]
    rollouts: RolloutCounts
    total_rollouts: RolloutCounts
    tokens: Mapping[str, int]
    seconds: Mapping[str, float]
    weights_version: str
    proposals: Mapping[str, Any] = field(default_factory=dict)
    failure_messages: Mapping[str, str] = field(default_factory=dict)
    reward_range: tuple[float, float] | None = None
    early_batches: int = 0
    format_share: float | None = None
    cold_start: tuple[str, ...] = ()
    turns: TurnCounts = field(default_factory=TurnCounts)
    share: str = ""
    decided: str | None = None
    ended: bool = False
    peak_memory: int = 0
    early_scores: tuple[tuple[int, float], ...] = ()
    lessons: Mapping[str, int] = field(default_factory=dict)
