"""Where the first validation shows nothing to learn from: what gives it something.

A model that never answers in the adapter's format, or never earns another reward, gives neither
channel anything to compare. What helps is tried in the order of what it costs, and each is told:

1. *Structured decoding* costs nothing: answers are held to the format from then on. It is switched
   on where many answers cannot be read, whatever the rewards, and left off again where that does
   not help.
2. *Labelled demos* cost prompt tokens: training examples, shown in a candidate beside the student's
   own texts, as ``dspy.LabeledFewShot`` does. They are kept where they do better by more than
   chance (``decide.LEVEL``): whatever is learned from then on is learned under them.
3. *What the adapter could not read*, as feedback: whoever proposes instructions then reads what was
   wrong, and what had been asked for.

The first two are followed by another validation, whose rollouts count like all others.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from fst_dspy.errors import ConfigError, ProgramError
from fst_dspy.fast.decide import better
from fst_dspy.fast.population import blocks_of, mean
from fst_dspy.fast.proposers.demos import DEMO_SHARE, DemoProposer
from fst_dspy.loop.parts import Parts, count_tokens
from fst_dspy.loop.state import LoopState
from fst_dspy.loop.validation import Validation, score, scored_now, with_better
from fst_dspy.model.sampling import vocabulary
from fst_dspy.rollouts.health import Tally, is_unread, told_failures, unread_share
from fst_dspy.student.candidate import (
    DEMOS,
    component_name,
    decode_demos,
    encode_demos,
    example_id,
    make_candidate,
    split_component,
)
from fst_dspy.student.modules import every_predictor
from fst_dspy.types import Candidate, Rollout

logger = logging.getLogger(__name__)

UNREAD_SHARE = 0.1
"""Share of answers that cannot be read, above which they are held to the format."""


def warmed_up(parts: Parts, state: LoopState, found: Validation) -> tuple[LoopState, Validation]:
    """The state and validation to go on from; those given, where there is something to learn from.

    Args:
        found: The first validation.
    """
    runner, fast, sampling = parts.runner, parts.config.fast, parts.config.sampling
    unread = unread_share(found.rollouts)
    if sampling.structured == "auto" and not runner.structured and unread > UNREAD_SHARE:
        state, found = _held(parts, state, found)
    if parts.fast_on and fast.cold_start_demos and _is_flat(parts, found):
        state, found = _shown(parts, state, found)
    unread = unread_share(found.rollouts)
    if parts.fast_on and fast.format_feedback and unread > UNREAD_SHARE:
        runner.explains_format = True
        state = _told(
            state,
            f"{unread:.0%} of the answers cannot be read: feedback now says what was wrong with "
            "them (format_feedback)",
        )
    return state, found


def _held(parts: Parts, state: LoopState, found: Validation) -> tuple[LoopState, Validation]:
    """Answers held to their format; as before, where that lets no more of the rollouts succeed."""
    before, tally = unread_share(found.rollouts), parts.runner.tally
    unread = f"{before:.0%} of the answers cannot be read, and"
    try:
        vocabulary(parts.policy)
    except ConfigError as error:
        return _told(state, f"{unread} they cannot be held to the adapter's format: {error}"), found
    parts.runner.structured = True
    held = _again(parts, state)
    after = 1.0 if held is None else _failed_share(held.rollouts)
    if held is None or after >= _failed_share(found.rollouts):
        failed = parts.runner.tally
        parts.runner.structured, parts.runner.tally = False, tally
        text = (
            f"{unread} where they are held to the adapter's format {after:.0%} of the rollouts "
            "fail: left free (structured)"
        )
        causes = told_failures(failed.shares, failed.messages, parts.policy.tokenizer)
        return _told(state, "; held: ".join([text, *causes[:1]])), found
    text = (
        f"{before:.0%} of the answers could not be read: they are held to the adapter's format "
        f"from here on (structured), and {unread_share(held.rollouts):.0%} cannot"
    )
    return _told(state, text), held


def _shown(parts: Parts, state: LoopState, found: Validation) -> tuple[LoopState, Validation]:
    """A candidate with labelled demos beside the student's own, where it does better."""
    candidate, tally = _with_labels(parts), parts.runner.tally
    if candidate is None:
        return state, found
    parts.runner.tally = Tally()  # the record is of the validation that stands
    shown = scored_now(parts, [candidate])
    (rollouts,), (score_V,) = shown.rollouts_K, shown.score_K_V
    failed = Tally().plus(rollouts, learned_from=False)
    if sum(failed.failures.values()) > sum(r.failure is not None for r in found.rollouts):
        parts.runner.tally = tally
        first = next(iter(failed.messages.values()))
        text = f"labelled demos made answers fail, and were left out (cold_start_demos): {first}"
        return _told(state, text), found
    demos = sum(
        len(decode_demos(text))
        for name, text in candidate.components.items()
        if split_component(name)[1] == DEMOS
    )
    text = f"every answer had the reward {found.val_score:g}, and with {demos} labelled demos "
    text += f"(cold_start_demos) the mean is {mean(score_V):.3f}"
    if not better(blocks_of(score_V, found.score_V)):
        parts.runner.tally = tally
        return _told(state, f"{text}, no more than by chance: they were left out"), found
    found = with_better(parts, found, candidate, shown)
    state = replace(state, population=found.population)
    return _told(state, f"{text}: a candidate with them was added"), found


def _with_labels(parts: Parts) -> Candidate | None:
    """The student's own texts, with demos from training labels where it has none."""
    fast, own = parts.config.fast, parts.seed_candidate
    count = partial(count_tokens, parts.policy)
    # Where no demos are learned (demo_tokens=0), or not yet, labels are shown all the same.
    told = fast.demo_tokens != "auto" and fast.demo_tokens
    proposer = DemoProposer(told or int(DEMO_SHARE * parts.policy.context_length), count)
    proposer.study({example_id(example): example for example in parts.trainset})
    components = dict(own.components)
    for name, predictor in every_predictor(parts.runner.program).items():
        component = component_name(name, DEMOS)
        if component not in components or decode_demos(components[component]):
            continue
        signature = predictor.signature
        proposer.know(name, list(signature.input_fields), list(signature.output_fields))
        (text,) = proposer.propose(components, {component: []}, [component]).values()
        components[component] = encode_demos(decode_demos(text)[: fast.cold_start_demos])
    if components == dict(own.components):
        return None
    return make_candidate(components, (own.id,), source="demos")


def _again(parts: Parts, state: LoopState) -> Validation | None:
    """The validation once more; ``None`` where the program fails on every example of it."""
    parts.runner.tally = Tally()  # the record is of the validation that stands
    try:
        return score(parts, state)
    except ProgramError as error:  # this attempt's, for before it did not
        logger.debug("the program fails where answers are held to their format: %s", error)
        return None


def _failed_share(rollouts: Sequence[Rollout]) -> float:
    """Share of the rollouts that failed in any way, or in part, 0 to 1."""
    return sum(r.failure is not None or is_unread(r) for r in rollouts) / len(rollouts)


def _is_flat(parts: Parts, found: Validation) -> bool:
    """Whether all rewards are equal, and there is something left to learn.

    A reward above ``perfect_score`` shows that the metric's best is another.
    """
    rewards = {rollout.reward for rollout in found.rollouts}
    return len(rewards) <= 1 and max(rewards, default=0) != parts.config.fast.perfect_score


def _told(state: LoopState, text: str) -> LoopState:
    logger.warning("cold start: %s", text)
    return replace(state, cold_start=(*state.cold_start, text))
