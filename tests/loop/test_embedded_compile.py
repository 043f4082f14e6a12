"""Compiles on the packaged model: the product's main job, at small budgets."""

import random

import dspy
import pytest

from fst_dspy import FST, LocalLM
from fst_dspy.config import SamplingConfig
from fst_dspy.embedded.corpus.words import ENGLISH, HELD_OUT
from fst_dspy.rollouts.evaluate import evaluate
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import seed_candidate
from fst_dspy.tasks import load_task

pytestmark = pytest.mark.slow


def test_triage_improves_by_both_channels_at_low_drift():
    task, lm = load_task("triage", seed=3), LocalLM("embedded")
    settings = {"max_cycles": 1, "steps_per_cycle": 3, "max_tokens": 40}
    fst = FST(task.metric, seed=3, track_stats=True, **settings)
    with dspy.context(lm=lm):
        compiled = fst.compile(task.program, trainset=task.trainset, valset=task.valset)
    result = compiled.detailed_results
    first, last = result.records[0], result.records[-1]
    assert first.val_score < 0.2
    # The opening is validated once a candidate is proven, and then has its other iterations.
    proven, opened = result.records[1:3]
    assert {proven.share, opened.share} == {"prompts"} and proven.proposals["proven"] == 1
    assert proven.proposals["iterations"] < 8 == opened.proposals["iterations"]
    assert first.val_score < proven.val_score
    assert result.best.score > 0.6
    assert result.best.candidate.id != result.seed_candidate.id
    assert 0 < last.kl_to_base < 1
    assert last.failure_shares.get("parse", 0) < 0.1


class ShelveFinding(dspy.Signature):
    """Say on which shelf the finding is kept."""

    finding: str = dspy.InputField()
    shelf: str = dspy.OutputField()


def unseen_task():
    """Keys, values, fields and sentences that the corpus of the embedded model does not hold."""
    words = sorted(HELD_OUT)
    assert not set(words) & set(ENGLISH)
    random.Random(0).shuffle(words)
    shelves = dict(zip(words[:5], words[5:10], strict=True))
    sentences = [
        f"{lead} {word} {tail}"
        for word in shelves
        for lead in ("Found a", "There was one", "Diggers saw the", "Old")
        for tail in ("under the wall.", "next to a pot.", "in trench nine.", "yesterday.")
    ]
    random.Random(1).shuffle(sentences)
    examples = []
    for text in sentences:
        word = next(w for w in shelves if w in text.split())
        examples.append(dspy.Example(finding=text, word=word, shelf=shelves[word]))
    return [example.with_inputs("finding") for example in examples]


def shelf_metric(gold, pred, trace=None, pred_name=None, pred_trace=None):
    right = pred.shelf.strip() == gold.shelf
    feedback = f"Lesson: {gold.word} findings go to {gold.shelf}."
    return dspy.Prediction(score=float(right), feedback=feedback)


def test_a_program_whose_signature_and_words_the_model_never_saw_improves():
    examples = unseen_task()
    train, val, test = examples[:40], examples[40:56], examples[56:]
    program, lm = dspy.ChainOfThought(ShelveFinding), LocalLM("embedded")
    settings = {"max_cycles": 1, "steps_per_cycle": 3, "learning_rate": 3e-4, "max_tokens": 48}
    fst = FST(shelf_metric, seed=0, track_stats=True, **settings)
    with dspy.context(lm=lm):
        result = fst.compile(program, trainset=train, valset=val).detailed_results
        runner = RolloutRunner(program, shelf_metric, lm, SamplingConfig(max_tokens=48), 9)
        before, after = (
            evaluate(runner, [candidate], test, samples=2, version=version).mean_K[0]
            for candidate, version in (
                (seed_candidate(program), result.base_version),
                (result.best.candidate, result.best.version),
            )
        )
    assert before < 0.1
    assert after > before + 0.1
