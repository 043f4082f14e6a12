"""What the tests of DSPy's own weight optimizers need to train a random model for real."""

from __future__ import annotations

import dspy
from dspy.utils.callback import BaseCallback
from helpers import RawAdapter


class SampledAdapter(RawAdapter):
    """Renders an answer again as it was sampled, so that GRPO learns what earned the reward."""

    def format_assistant_message_content(self, signature, outputs, missing_field_message=None):
        return "".join(str(outputs[name]) for name in signature.output_fields)


class Events(BaseCallback):
    """Keeps the scores of evaluations and the names of optimizers that ran."""

    def __init__(self):
        self.scores = []
        self.compiles = []

    def on_evaluate_end(self, call_id, outputs, exception=None):
        if outputs is not None:
            self.scores.append(outputs.score)

    def on_compile_start(self, call_id, instance, inputs):
        self.compiles.append((call_id, type(instance).__name__, "start"))

    def on_compile_end(self, call_id, outputs, exception=None):
        self.compiles.append((call_id, isinstance(outputs, dspy.Module), "end"))


def scripted_proposer(candidate, reflective_dataset, components_to_update):
    """An instruction proposer for dspy.GEPA that needs no LM: one more word a proposal."""
    return {name: f"{candidate[name]} Again." for name in components_to_update}


def late_letters(gold, pred, trace=None, pred_name=None, pred_trace=None):
    """Share of characters that are not the letters a to m: what ``vowels`` rewards least."""
    text = pred.answer
    score = sum(not "a" <= c.lower() <= "m" for c in text) / max(1, len(text))
    return dspy.Prediction(score=score, feedback="Lesson: write no early letters.")
