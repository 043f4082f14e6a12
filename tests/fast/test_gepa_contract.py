"""What we rely on of gepa's insides, listed in ``fst_dspy/fast/phase.py``.

Each test is named after, or names, what is missing or otherwise. Only gepa is called.
"""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Sequence
from typing import Any

import pytest

pytestmark = pytest.mark.insides

SEED = {"a.instructions": "A.", "b.instructions": "B."}

NEEDED = {
    "gepa.core.adapter:EvaluationBatch": [
        "outputs", "scores", "trajectories", "objective_scores",
    ],
    "gepa.core.adapter:GEPAAdapter.evaluate": ["batch", "candidate", "capture_traces"],
    "gepa.core.adapter:GEPAAdapter.make_reflective_dataset": [
        "candidate", "eval_batch", "components_to_update",
    ],
    "gepa.core.callbacks:notify_callbacks": ["callbacks", "method_name", "event"],
    "gepa.core.data_loader:ensure_loader": ["data_or_loader"],
    "gepa.core.state:GEPAState": ["seed_candidate", "base_evaluation", "frontier_type"],
    "gepa.core.state:GEPAState.add_budget_hook": ["self", "hook"],
    "gepa.core.state:GEPAState.get_pareto_front_mapping": ["self"],
    "gepa.core.state:GEPAState.increment_evals": ["self", "count"],
    "gepa.core.state:GEPAState.update_state_with_new_program": [
        "parent_program_idx", "new_program", "valset_evaluation", "run_dir",
        "num_metric_calls_by_discovery_of_new_program",
    ],
    "gepa.core.state:ValsetEvaluation": [
        "outputs_by_val_id", "scores_by_val_id", "objective_scores_by_val_id",
    ],
    "gepa.logging.experiment_tracker:ExperimentTracker": [],
    "gepa.proposer.base:CandidateProposal": [
        "candidate", "parent_program_ids", "subsample_scores_before", "subsample_scores_after",
        "eval_after", "tag",
    ],
    "gepa.proposer.merge:sample_and_attempt_merge_programs_by_common_predictors": [
        "agg_scores", "rng", "merge_candidates", "merges_performed", "program_candidates",
        "parent_program_for_candidate",
    ],
    "gepa.proposer.reflective_mutation.base:ReflectionComponentSelector.__call__": [
        "state", "trajectories", "subsample_scores", "candidate_idx", "candidate",
    ],
    "gepa.proposer.reflective_mutation.reflective_mutation:ReflectiveMutationProposer": [
        "logger", "trainset", "adapter", "candidate_selector", "module_selector", "batch_sampler",
        "perfect_score", "skip_perfect_score", "experiment_tracker", "callbacks",
    ],
    "gepa.strategies.acceptance:AcceptanceCriterion.should_accept": ["proposal", "state"],
    "gepa.strategies.acceptance:ImprovementOrEqualAcceptance": [],
    "gepa.strategies.acceptance:StrictImprovementAcceptance": [],
    "gepa.strategies.batch_sampler:EpochShuffledBatchSampler": ["minibatch_size", "rng"],
    "gepa.strategies.candidate_selector:ParetoCandidateSelector": ["rng"],
    "gepa.strategies.component_selector:RoundRobinReflectionComponentSelector": [],
    "gepa.strategies.instruction_proposal:InstructionProposalSignature.prompt_renderer": [
        "input_dict"
    ],
    "gepa.strategies.instruction_proposal:InstructionProposalSignature.output_extractor": [
        "lm_out"
    ],
    "gepa.utils:StopperProtocol.__call__": ["self", "gepa_state"],
}  # fmt: skip
"""What is imported, with the parameters that are passed, in this order where by position."""


def find(place: str) -> Any:
    module, _, name = place.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("place", NEEDED)
def test_it_is_there_and_takes_what_we_pass(place: str) -> None:
    parameters = inspect.signature(find(place)).parameters
    given = [name for name in parameters if name in NEEDED[place]]
    assert given == NEEDED[place], f"{place} takes {list(parameters)}"
    required = [
        name
        for name, one in parameters.items()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    assert set(required) - {"self"} <= set(given), f"{place} asks for more: {required}"


def state_of(*rows: Sequence[float]) -> Any:
    """A state built as ours: one candidate at once, the others as if found without parents."""
    from gepa.core.state import GEPAState, ValsetEvaluation

    evaluations: list[Any] = [ValsetEvaluation({}, dict(enumerate(row))) for row in rows]
    state: Any = GEPAState(dict(SEED), evaluations[0])
    for number, evaluation in enumerate(evaluations[1:], start=1):
        texts = {**SEED, "a.instructions": f"A {number}."}
        state.update_state_with_new_program([], texts, evaluation, None, 0)
    state.total_num_evals = 0
    return state


def test_gepa_state_begins_with_several_candidates() -> None:
    state = state_of((1.0, 0.0), (0.0, 1.0))
    assert state.is_consistent()
    assert [texts["a.instructions"] for texts in state.program_candidates] == ["A.", "A 1."]
    assert state.list_of_named_predictors == list(SEED), "list_of_named_predictors"
    turns = state.named_predictor_id_to_update_next_for_program_candidate
    assert turns == [0, 0], "named_predictor_id_to_update_next_for_program_candidate"
    assert state.i == -1 and state.full_program_trace == []


def test_pareto_candidate_selector_draws_from_the_front() -> None:
    from gepa.strategies.candidate_selector import ParetoCandidateSelector

    state = state_of((1.0, 0.0, 0.0), (0.0, 1.0, 1.0), (0.5, 0.5, 0.5))

    def draws(seed: int) -> list[int]:
        selector = ParetoCandidateSelector(random.Random(seed))
        return [selector.select_candidate_idx(state) for _ in range(40)]

    assert set(draws(0)) == {0, 1}, "a candidate that is best nowhere was drawn"
    assert draws(0) == draws(0)
    assert draws(0).count(1) > draws(0).count(0), "not by how often each is on the front"


def test_round_robin_component_selector_moves_the_turn_on() -> None:
    from gepa.strategies.component_selector import RoundRobinReflectionComponentSelector

    state, selector = state_of((1.0,)), RoundRobinReflectionComponentSelector()
    state.list_of_named_predictors = [*reversed(SEED)]
    state.named_predictor_id_to_update_next_for_program_candidate = [1]
    picked = [selector(state, [], [0.0], 0, dict(SEED)) for _ in range(3)]
    assert picked == [["a.instructions"], ["b.instructions"], ["a.instructions"]]


def test_epoch_shuffled_batch_sampler_goes_by_the_states_number() -> None:
    from gepa.core.data_loader import ensure_loader
    from gepa.strategies.batch_sampler import EpochShuffledBatchSampler

    sampler = EpochShuffledBatchSampler(2, random.Random("0|1|minibatches"))
    loader, state = ensure_loader(list("abcdef")), state_of((1.0,))
    batches = []
    for state.i in range(3):
        batches += sampler.next_minibatch_ids(loader, state)
    assert sorted(batches) == list(range(6)), "an epoch is each example once"


@pytest.mark.parametrize(
    ("before", "after", "strict", "as_well"),
    [([0, 1], [1, 1], True, True), ([0, 1], [1, 0], False, True), ([1, 1], [1, 0], False, False)],
)
def test_acceptance_reads_the_proposals_minibatch_scores_alone(
    before: list[float], after: list[float], strict: bool, as_well: bool
) -> None:
    from gepa.proposer.base import CandidateProposal
    from gepa.strategies.acceptance import ImprovementOrEqualAcceptance, StrictImprovementAcceptance

    proposal: Any = CandidateProposal(
        candidate=dict(SEED),
        parent_program_ids=[],
        subsample_scores_before=before,
        subsample_scores_after=after,
        tag="merge",
    )
    nothing: Any = None  # trials and merges have no state of gepa's
    assert StrictImprovementAcceptance().should_accept(proposal, nothing) is strict
    assert ImprovementOrEqualAcceptance().should_accept(proposal, nothing) is as_well


class Adapter:
    """Scores 1 once a text says so; proposes what it is told to."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts
        self.evaluated: list[Any] = []

    def evaluate(self, batch: Any, candidate: Any, capture_traces: bool = False) -> Any:
        from gepa.core.adapter import EvaluationBatch

        self.evaluated.append((list(batch), dict(candidate), capture_traces))
        score = float("better" in candidate["a.instructions"])
        return EvaluationBatch(
            outputs=[None] * len(batch),
            scores=[score] * len(batch),
            trajectories=[f"saw {one}" for one in batch] if capture_traces else None,
        )

    def make_reflective_dataset(self, candidate: Any, eval_batch: Any, components: Any) -> Any:
        return {name: [{"saw": text} for text in eval_batch.trajectories] for name in components}

    def propose_new_texts(self, candidate: Any, dataset: Any, components: Any) -> Any:
        assert components == ["a.instructions"] == list(dataset)
        assert [row["saw"] for row in dataset["a.instructions"]] == [
            f"saw {one}" for one in self.evaluated[-1][0]
        ]
        return self.texts


class Quiet:
    def log(self, message: str) -> None:
        assert isinstance(message, str)


def propose(adapter: Adapter) -> tuple[Any, list[Any]]:
    from gepa.logging.experiment_tracker import ExperimentTracker
    from gepa.proposer.reflective_mutation.reflective_mutation import ReflectiveMutationProposer
    from gepa.strategies.batch_sampler import EpochShuffledBatchSampler
    from gepa.strategies.candidate_selector import ParetoCandidateSelector

    proposer: Any = ReflectiveMutationProposer(
        logger=Quiet(),
        trainset=["x", "y", "z"],
        adapter=adapter,
        candidate_selector=ParetoCandidateSelector(random.Random(0)),
        module_selector=lambda state, trajectories, scores, index, texts: ["a.instructions"],
        batch_sampler=EpochShuffledBatchSampler(2, random.Random(0)),
        perfect_score=None,
        skip_perfect_score=False,
        experiment_tracker=ExperimentTracker(),
    )
    state = state_of((0.0,), (1.0,))
    state.i = 0
    state.full_program_trace.append({"i": 0})
    return state, list(proposer.propose(state))


def test_reflective_mutation_proposer_tries_a_child_on_its_parents_minibatch() -> None:
    adapter = Adapter({"a.instructions": "A better."})
    _, (proposal,) = propose(adapter)
    parent, child = adapter.evaluated
    assert parent[0] == child[0] and len(parent[0]) == 2, "the same minibatch, once each"
    assert parent[2] is child[2] is True, "capture_traces"
    assert parent[1] == {**SEED, "a.instructions": "A 1."}
    assert proposal.candidate == child[1] == {**SEED, "a.instructions": "A better."}
    assert proposal.parent_program_ids == [1], "parent_program_ids"
    assert proposal.subsample_scores_before == [0.0, 0.0], "subsample_scores_before"
    assert proposal.subsample_scores_after == [1.0, 1.0], "subsample_scores_after"
    assert proposal.eval_after.trajectories == [f"saw {one}" for one in child[0]], "eval_after"


def test_reflective_mutation_proposer_skips_an_empty_proposal() -> None:
    adapter = Adapter({})
    _, proposals = propose(adapter)
    assert proposals == [] and len(adapter.evaluated) == 1, "a child like its parent was run"


def test_merge_takes_each_component_from_the_one_that_changed_it() -> None:
    from gepa.proposer.merge import sample_and_attempt_merge_programs_by_common_predictors as merge

    left, right = {**SEED, "a.instructions": "A!"}, {**SEED, "b.instructions": "B!"}
    settings: dict[str, Any] = {"rng": random.Random(0), "merges_performed": ([], [])}
    found = merge(
        agg_scores=[1.0, 2.0, 0.5],
        merge_candidates=range(2),
        program_candidates=[left, right, dict(SEED)],
        parent_program_for_candidate=[[2], [2], []],
        **settings,
    )
    assert found is not None
    texts, first, second, ancestor = found
    assert texts == {"a.instructions": "A!", "b.instructions": "B!"}
    assert ({first, second}, ancestor) == ({0, 1}, 2)
    strangers = merge(
        agg_scores=[1.0, 2.0, 0.5],
        merge_candidates=range(2),
        program_candidates=[left, right, dict(SEED)],
        parent_program_for_candidate=[[], [], []],
        **settings,
    )
    assert strangers is None, "nothing to merge is None"


def test_instruction_proposal_signature_renders_and_extracts() -> None:
    from gepa.strategies.instruction_proposal import InstructionProposalSignature as Proposal

    template = Proposal.default_prompt_template
    assert template.count("<curr_param>") == template.count("<side_info>") == 1
    prompt = Proposal.prompt_renderer(
        {
            "current_instruction_doc": "Say where.",
            "dataset_with_feedback": [{"Inputs": {"ticket": "x"}, "Feedback": "no", "score": 0.0}],
            "prompt_template": f"{template}\n\nKeep it short.",
        }
    )
    assert isinstance(prompt, str) and prompt.endswith("Keep it short.")
    assert all(text in prompt for text in ("Say where.", "## Feedback\nno", "### ticket\nx"))
    for answer in ("```\nGo.\n```", "Here it is:\n```text\nGo.\n```\nDone.", "Go."):
        assert Proposal.output_extractor(answer)["new_instruction"].strip() == "Go."
