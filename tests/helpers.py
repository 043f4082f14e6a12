"""Programs and metrics that give a random model something to be rewarded for."""

from __future__ import annotations

import time

import dspy


class RawAdapter(dspy.ChatAdapter):
    """Takes the whole completion for the answer, so that a random model's text can be scored."""

    def format(self, signature, demos, inputs):
        """A short prompt: the tiny models' context is short."""
        text = " ".join(f"{k}: {v}" for k, v in inputs.items())
        return [
            {"role": "system", "content": signature.instructions},
            {"role": "user", "content": text},
        ]

    def parse(self, signature, completion):
        if completion.startswith("!"):
            raise dspy.utils.exceptions.AdapterParseError("RawAdapter", signature, completion)
        return {name: completion for name in signature.output_fields}


class Echo(dspy.Module):
    """One predictor."""

    def __init__(self):
        super().__init__()
        self.say = dspy.Predict(dspy.Signature("question -> answer", "Say something."))

    def forward(self, question):
        return self.say(question=question)


class Twice(dspy.Module):
    """Two predictors; the second is called one to three times."""

    def __init__(self):
        super().__init__()
        self.first = dspy.Predict(dspy.Signature("question -> draft", "Draft."))
        self.second = dspy.Predict(dspy.Signature("draft -> answer", "Finish."))

    def forward(self, question):
        draft = self.first(question=question).draft
        for _ in range(1 + len(question) % 3):
            answer = self.second(draft=draft[:20]).answer
        return dspy.Prediction(answer=answer)


def vowels(gold, pred, trace=None, pred_name=None, pred_trace=None):
    """Share of letters a to m in the answer: a reward that random text spreads over."""
    text = pred.answer
    score = sum("a" <= c.lower() <= "m" for c in text) / max(1, len(text))
    return dspy.Prediction(score=score, feedback=f"Lesson: write early letters, like {text[:1]!r}.")


def questions(count, start=0):
    return [
        dspy.Example(question=f"number {start + n}", answer="").with_inputs("question")
        for n in range(count)
    ]


def wait_for(condition, seconds=240):
    """Wait for what other threads or processes do."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
