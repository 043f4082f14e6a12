"""What comes after a cycle: who has the next one's rollouts, or the end, and why, in words.

A run ends where its budget is spent, or there is nothing (more) to learn from. And what is told of
a cycle that went wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from fst_dspy.config import ENV_LIMITS, LIMITS
from fst_dspy.errors import ConfigError, TrainingError
from fst_dspy.loop.learner import may_learn_from_text
from fst_dspy.loop.parts import Parts
from fst_dspy.loop.share import KEPT, Decision, Evidence, Share, next_share
from fst_dspy.loop.state import LoopState
from fst_dspy.loop.validation import Validation, is_scored
from fst_dspy.plan.plan import Plan
from fst_dspy.rollouts.health import told_failures
from fst_dspy.rollouts.rendering import OTHER_PROMPTS
from fst_dspy.types import CycleRecord, Rollout, TurnCounts

ALL = 0.999
"""Share from which on a figure is that of all rollouts."""
NEARLY_ALL, TELLING = 0.9, 20
"""Share of a cycle's groups without a gradient from which on rewards tell next to nothing, and how
many groups there must be to say so. Of 20 groups of 8, with one right rollout of 20 on every
problem, as many are without one in 2 % of cases; of 48 in 0.01 %."""
BY_TEXT = "let its feedback teach the weights: slow_signal='both'"
"""What makes up for a score that says nothing."""
IN_WORDS = "have it say in words what is right: dspy.Prediction(score=, feedback=)"
"""As that, where text would teach the weights if there were any."""


def troubles(parts: Parts, records: Sequence[CycleRecord]) -> list[str]:
    """What a user should know of a cycle while there is time: failures, and steps without gradient.

    Each with its first cause and what to do about it.

    Args:
        records: Those so far; of the cycle itself the last.
    """
    record = records[-1]
    texts = told_failures(record.failure_shares, record.failure_messages, parts.policy.tokenizer)
    if above := _above_perfect(parts, (record.reward_range or (0.0, 0.0))[1]):
        texts.append(above)
    elif untaught := _untaught(parts, records):
        texts.append(untaught)
    if (
        record.train_reward is not None
        and _learns_from_rewards(parts)
        and record.constant_group_share >= ALL
        and not all_equal(record)
    ):
        texts.append(
            "no optimizer step had a gradient: the rollouts of every problem are all as good as "
            "each other (where they are not solved: mix easier and harder problems, give partial "
            f"credit in the metric, or {BY_TEXT})"
        )
    by_turn = parts.config.slow.credit == "turn" and parts.learner is not None
    if record.cycle == 0 and by_turn and not record.turns.turns:
        texts.append(
            "credit='turn' has no effect: no rollout of the first validation had turns of an "
            "environment (fst_dspy.env)"
        )
    return texts


def all_equal(record: CycleRecord) -> bool:
    """Whether all rollouts of a cycle that are learned from had one and the same reward."""
    return record.reward_range is not None and record.reward_range[0] == record.reward_range[1]


def without_signal(parts: Parts, records: Sequence[CycleRecord]) -> str | None:
    """Why neither channel had anything to learn from in a full cycle; ``None`` where one had.

    Args:
        records: Those so far; of the cycle itself the last.
    """
    record = records[-1]
    if (
        record.cycle == 0
        or is_alone(parts, record)
        or not (_learns_from_rewards(parts) or _taught_nothing(parts, records))
        or not all_equal(record)
    ):
        return None
    assert record.reward_range is not None
    # A cycle of prompts alone has few rollouts: these say little where validation shows others.
    same = partial(math.isclose, record.reward_range[0], abs_tol=1e-9)
    if parts.learner is None and not all(same(each.val_score) for each in records):
        return None
    text = (
        f"every rollout of cycle {record.cycle} had the reward {record.reward_range[0]:g}, so that "
        "there is nothing to learn from"
    )
    if _all_failed(record):
        messages = record.failure_messages
        return "; ".join(
            [text, *told_failures(record.failure_shares, messages, parts.policy.tokenizer)]
        )
    if parts.learner is None or not _learns_from_rewards(parts):
        return text
    slow, perfect = parts.config.slow, parts.config.fast.perfect_score
    ways = []
    if record.reward_range[0] > perfect:
        ways = [f"set perfect_score, now {perfect:g}, to the best score that the metric gives"]
    elif not _is_perfect(parts, record):
        ways = ["give partial credit in the metric"]
        if slow.slow_signal == "reward":
            ways.append(BY_TEXT)
        elif may_learn_from_text(slow):
            ways.append(IN_WORDS)
    return f"{text} ({', or '.join(ways)})" if ways else text


def turns_to_text(parts: Parts, records: Sequence[CycleRecord]) -> bool:
    """Whether rewards told the weights next to nothing in a cycle, and the metric's text is to.

    So it is with ``slow_signal="auto"``: once, and for the rest of the run. Rewards tell nothing
    where all are equal, and next to nothing where those of nearly every group are, and low.

    Args:
        records: Those so far; of the cycle itself the last.
    """
    learner, slow, record = parts.learner, parts.config.slow, records[-1]
    return (
        learner is not None
        and not record.ended
        and learner.learns_from_rewards
        and slow.slow_signal == "auto"
        and may_learn_from_text(slow)
        and record.train_reward is not None
        and (all_equal(record) or _hardly_differ(parts, records))
        and not _is_perfect(parts, record)
        and not _all_failed(record)
        and parts.runner.tally.told > 0
    )


def _hardly_differ(parts: Parts, records: Sequence[CycleRecord]) -> bool:
    """Whether nearly all groups of a cycle had equal rewards, and more low ones than perfect ones.

    Of few groups that may be chance.
    """
    *_, before, record = records
    if record.train_reward is None or record.reward_range is None:
        return False
    groups = (record.step - before.step) * parts.config.slow.problems_per_step
    middle = (record.reward_range[0] + parts.config.fast.perfect_score) / 2
    return (
        groups >= TELLING
        and record.constant_group_share >= NEARLY_ALL
        and record.train_reward < middle
    )


def _is_perfect(parts: Parts, record: CycleRecord) -> bool:
    """Whether all rollouts of a cycle that are learned from had the best score there is."""
    return record.reward_range is not None and record.reward_range[0] >= (
        parts.config.fast.perfect_score
    )


def with_end(parts: Parts, records: Sequence[CycleRecord]) -> CycleRecord:
    """The last record, which says so where nothing was left to learn from and the run ends there.

    Args:
        records: Those so far; of the cycle itself the last.
    """
    record = records[-1]
    if turns_to_text(parts, records):
        text = (
            f"{record.constant_group_share:.0%} of the groups of cycle {record.cycle} had equal "
            "rewards: the metric's text teaches the weights from now on"
        )
        return replace(record, decided="; ".join(filter(None, (record.decided, text))))
    reason = without_signal(parts, records)
    if record.ended or reason is None or parts.config.budget.on_no_signal == "warn":
        return record
    return replace(record, decided=f"{reason}; the run ends", ended=True)


def has_ended(parts: Parts, record: CycleRecord) -> bool:
    """Whether a run has ended of itself: nothing is left to gain, and it is not to go on then."""
    return record.ended and parts.config.budget.on_no_signal == "stop"


def check_not_all_failed(parts: Parts, record: CycleRecord, reason: str) -> None:
    """Stop where none of a cycle's rollouts succeeded, and the run is to stop then.

    Args:
        reason: As ``without_signal`` gives it.

    Raises:
        TrainingError: So it is.
    """
    if _all_failed(record) and parts.config.budget.on_no_signal == "stop":
        raise TrainingError(f'{reason}. on_no_signal="warn" goes on all the same')


def _all_failed(record: CycleRecord) -> bool:
    return sum(record.failure_shares.values()) >= ALL


def _taught_nothing(parts: Parts, records: Sequence[CycleRecord]) -> bool:
    """Whether weights that learn from feedback had none: no optimizer step of the cycle moved them.

    Steps that were dropped, as their gradient was not finite, show nothing of the kind.
    """
    *_, before, record = (None, *records)
    return (
        before is not None
        and record is not None
        and parts.learner is not None
        and parts.learner.learns_from_text
        # Up to where rewards said nothing, and not all had failed, text was not asked.
        and (parts.config.slow.slow_signal != "auto" or bool(record.lessons) or _all_failed(record))
        and not parts.learner.bad_steps
        and record.train_reward is not None
        and record.weights_version == before.weights_version
    )


def _untaught(parts: Parts, records: Sequence[CycleRecord]) -> str | None:
    """Why calls of a cycle taught the weights nothing that were to be read again.

    Told are the largest cause where that is so of all of them, and once a run how many had prompts
    that could not be made again. That all answers were perfect is no trouble.
    """
    *before, record = records
    lessons = Counter(record.lessons)
    total, imperfect = lessons.total(), lessons - Counter(perfect=lessons["perfect"])
    if imperfect and not lessons["taught"] and _taught_nothing(parts, records):
        cause = _UNTAUGHT[imperfect.most_common(1)[0][0]]
        return f"slow_signal={parts.config.slow.slow_signal!r} taught the weights nothing: {cause}"
    if not lessons["prompt"] or any(each.lessons.get("prompt") for each in before):
        return None
    share = f"{lessons['prompt']:,} of {total:,} calls ({lessons['prompt'] / total:.0%})"
    return f"{share} taught the weights nothing: {OTHER_PROMPTS}"


_UNTAUGHT = {
    "silent": "no answer below perfect_score had feedback, or a better one in its group to learn "
    "from (the metric must return dspy.Prediction(score=, feedback=))",
    "prompt": OTHER_PROMPTS,
    "unshown": "the adapter does not write a signature's instructions into the prompt, where "
    "feedback is shown (use one that does, such as dspy.ChatAdapter)",
    "long": "with feedback in them, the prompts and answers do not fit into the context window "
    "(shorten the prompts, the metric's feedback or max_tokens)",
}


def _above_perfect(parts: Parts, highest: float) -> str | None:
    """What is wrong where a score is above the best there is, and something goes by that."""
    perfect, fast, slow = parts.config.fast.perfect_score, parts.config.fast, parts.config.slow
    by_it = {
        f"slow_signal={slow.slow_signal!r}": parts.learner is not None
        and parts.learner.learns_from_text,
        "skip_perfect_score": parts.fast_on and fast.skip_perfect_score,
    }
    asked = " and ".join(name for name, on in by_it.items() if on)
    if not asked or highest <= perfect:
        return None
    return (
        f"the metric gave {highest:g}, above perfect_score={perfect:g}, and {asked} would take "
        "such answers for perfect and learn nothing from them: set perfect_score to the best "
        "score that the metric gives"
    )


def check_perfect_score(parts: Parts, rollouts: Sequence[Rollout]) -> None:
    """Stop after the first validation where the best score there is was taken for another.

    Raises:
        ConfigError: An answer has more than ``perfect_score``, by which feedback is withheld.
    """
    above = _above_perfect(parts, max((rollout.reward for rollout in rollouts), default=0.0))
    if above is not None:
        raise ConfigError(above)


def not_sampled(parts: Parts, rollouts: Sequence[Rollout]) -> str | None:
    """What to tell of predictors whose answers were never drawn from the policy.

    Args:
        rollouts: Of the first validation.
    """
    calls = [call for rollout in rollouts for call in rollout.calls]
    sampled = {call.predictor for call in calls if call.temperature}
    greedy = dict.fromkeys(call.predictor for call in calls if call.predictor not in sampled)
    if parts.learner is None or not _learns_from_rewards(parts) or not greedy:
        return None
    return (
        f"the weights learn nothing from the calls of {', '.join(greedy)}, which are at "
        "temperature 0 or have penalties: leave that out, and set it on the compiled program"
    )


def _learns_from_rewards(parts: Parts) -> bool:
    return parts.learner is None or parts.learner.learns_from_rewards


def cycles_spent(parts: Parts, state: LoopState) -> str | None:
    """``"6 of 6 cycles"`` where that was the last one; prompts' own phases do not count."""
    if parts.learner is None and not parts.config.fast.cycle_iterations and state.cycle:
        return "the first cycle, as cycle_iterations is 0"  # no other would run a rollout
    asked = parts.budget.max_cycles
    if asked is None:
        return None
    alone = sum(is_alone(parts, record) for record in state.records)
    asked, cycles = asked - int(parts.has_opening), state.cycle - alone
    return f"{cycles} of {asked} cycles" if cycles >= asked and state.cycle else None


def is_alone(parts: Parts, record: CycleRecord) -> bool:
    """Whether a cycle was a phase of prompts alone, in a run that trains weights as well."""
    return record.cycle > 0 and parts.learner is not None and record.train_reward is None


def counts_spent(parts: Parts, rollouts: int, turns: TurnCounts) -> str | None:
    """``"312 of 300 rollouts"`` where a limit of what is counted is reached."""
    budget = parts.budget
    if budget.max_rollouts is not None and rollouts >= budget.max_rollouts:
        return f"{rollouts:,} of {budget.max_rollouts:,} rollouts"
    for counted, limit in budget.env_limits().items():
        if (done := getattr(turns, counted)) >= limit:
            return f"{done:,.0f} of {limit:,} environment {counted}"
    return None


def measured_plan(parts: Parts, state: LoopState) -> Plan:
    """The plan with what the first validation has shown: how long rollouts and episodes are."""
    rollouts, turns = state.counts.total, parts.runner.turns
    budget, allowed = parts.budget, None
    limits = budget.env_limits().items()
    if left := [limit / done for counted, limit in limits if (done := getattr(turns, counted))]:
        allowed = max(rollouts, int(rollouts * min(left)))
        if budget.max_rollouts is not None or budget.max_cycles is not None:
            allowed = min(allowed, parts.plan.rollouts)
    seconds = state.seconds.get("eval", 0.0)
    return parts.plan.measured(seconds, rollouts, tokens=parts.runner.tokens, allowed=allowed)


def check_limits(parts: Parts) -> None:
    """Stop after the first validation where the one limit that there is counts nothing.

    Raises:
        ConfigError: The limit is of what agents do, and the program has taken no turn as one.
    """
    given = [name for name in LIMITS if getattr(parts.budget, name) is not None]
    if given and ENV_LIMITS.keys() >= set(given) and not parts.runner.turns.turns:
        only = "is the only limit" if len(given) == 1 else "are the only limits"
        raise ConfigError(
            f"{' and '.join(given)} {only}, and would never be reached: in the first validation "
            "the program took no turn in an environment (fst_dspy.env). Give max_rollouts, "
            "max_cycles or max_seconds, alone or besides"
        )


def time_spent(parts: Parts, seconds: Mapping[str, float]) -> str | None:
    """``"620 of 600 s"`` where time is up on this process's clock; ``seconds`` by channel."""
    asked, spent = parts.budget.max_seconds, sum(seconds.values())
    return f"{spent:.0f} of {asked:g} s" if asked is not None and spent >= asked else None


def fits(parts: Parts, rollouts: int, turns: TurnCounts, *, step: bool) -> bool:
    """Whether what comes next, and the validation behind it, stays within what is counted.

    Args:
        rollouts, turns: Up to now. An agent's next rollouts are taken to be like those so far.
        step: It is an optimizer step; else an iteration of prompts.
    """
    budget, fast, slow = parts.budget, parts.config.fast, parts.config.slow
    more = slow.problems_per_step * slow.group_size if step else 2 * fast.minibatch_size
    # Weights that have moved are validated under all candidates, unless slow rollouts score those.
    scored = fast.population_size if step and parts.fast_on and not parts.fast.reuses else 1
    more += scored * len(parts.val_ids) * parts.config.sampling.val_samples
    if budget.max_rollouts is not None and rollouts + more > budget.max_rollouts:
        return False
    counted = [(getattr(turns, name), limit) for name, limit in budget.env_limits().items()]
    return all(done * (1 + more / max(1, rollouts)) <= limit for done, limit in counted)


def recorded_spent(parts: Parts, state: LoopState) -> str | None:
    """As ``counts_spent``, of the last cycle's record; also where nothing fits in what is left.

    After the first validation something is tried, however little is left.
    """
    record = with_end(parts, state.records)  # of a run of before, which did not say so
    rollouts, turns, share = record.total_rollouts.total, record.turns, share_of(parts, state)
    if spent := counts_spent(parts, rollouts, turns):
        return spent
    if record.cycle == 0 or fits(parts, rollouts, turns, step=share.weights):
        return None
    more = "optimizer step" if share.weights else "iteration"
    return f"{rollouts:,} rollouts, as the next {more} and its validation would go beyond the limit"


def share_of(parts: Parts, state: LoopState) -> Share:
    """Who has the rollouts of the cycle under way."""
    if state.share is not None and state.share.name:  # else it had ended, and goes on all the same
        return state.share
    opening = parts.has_opening and state.cycle == 0  # or a run of before there were turns
    return Share(parts.fast_on, parts.learner is not None and not opening)


def shared_out(parts: Parts, state: LoopState, found: Validation) -> tuple[LoopState, Decision]:
    """The state with what a cycle has shown, and who has the rollouts of the next one."""
    now, last, fast = share_of(parts, state), state.records[-1:], parts.config.fast
    accepted = parts.fast.report().get("accepted", 0)
    accepted -= last[0].proposals.get("accepted", 0) if last else 0
    fresh = not is_scored(parts, state, found.population)
    name, total = now.name if last else "", parts.runner.counts.total
    shown = Evidence(name, found.score_V, accepted, total, fresh)
    state = replace(state, evidence=(*state.evidence, shown)[-KEPT:])
    # The settings may leave prompts out after the opening, or from the start.
    turns = parts.fast.reuses and min(fast.first_cycle_iterations, fast.cycle_iterations) > 0
    decision = next_share(
        state.evidence,
        now,
        turns=turns,
        perfect_score=fast.perfect_score,
        interrupted=bool(last) and bool(opening_left(parts, state)),
    )
    if decision.over and parts.config.budget.on_no_signal == "warn":
        decision = Decision(Share(parts.fast_on, parts.learner is not None))
    # Without turns, the opening is followed by cycles of both all the same.
    elif parts.fast.reuses and not turns and not decision.over and last:
        decision = replace(decision, share=Share(True, True))
    return state, decision


def iterations_of(parts: Parts, state: LoopState, alone: bool) -> int:
    """Iterations of a fast phase: the first has most to learn, one alone more than others."""
    fast = parts.config.fast
    if state.cycle == int(parts.slow_opens):
        return fast.first_cycle_iterations
    if alone and (left := opening_left(parts, state)):
        return left
    return max(fast.cycle_iterations, alone * fast.first_cycle_iterations // 2)


def opening_left(parts: Parts, state: LoopState) -> int:
    """Iterations that the first phase has left, where it was interrupted; asked then, and next."""
    if not parts.has_opening or state.cycle > 1:
        return 0
    found = parts.fast.report()
    left = parts.config.fast.first_cycle_iterations - found["iterations"]
    return max(0, left) if found["proven"] else 0
