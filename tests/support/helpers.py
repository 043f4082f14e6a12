"""Programs and metrics that give a random model something to be rewarded for."""

from __future__ import annotations

import time

import dspy
import torch

from fst_dspy.loop import folder as run_state
from fst_dspy.loop import joint


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


def full_logprobs(policy, request, result):
    """Log-softmax over the vocabulary at every completion position, by one forward pass."""
    ids = torch.tensor([request.prompt_ids_T + result.completion_ids_T], device=policy.device)
    with torch.no_grad():
        logits_TV = policy.model(input_ids=ids).logits[0].float().cpu()
    logits_TV = logits_TV[len(request.prompt_ids_T) - 1 : -1]
    return (logits_TV / (request.temperature or 1.0)).log_softmax(-1)


def sampled_logprobs(policy, request, result):
    """The same, of the tokens that were sampled."""
    ids_T1 = torch.tensor(result.completion_ids_T)[:, None]
    return full_logprobs(policy, request, result).gather(1, ids_T1)[:, 0]


def assert_equal_but_for_rounding(found, expected, rounding=2e-5):
    """Gradients of the same names agree to a share of the largest element of each.

    An element is a sum whose terms, about as large as the largest element, are each rounded to
    6e-8 of themselves; where the terms cancel out, their errors stay. In what order they are summed
    is up to the CPU and the shape of the batch: of several CPUs the worst had 3e-6 of the largest
    element where batches were cut otherwise, 8e-6 where the formula was another.
    """
    assert found and found.keys() == expected.keys()
    for name, tensor in expected.items():
        atol = rounding * tensor.abs().max().item()
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol)


def kill_before_steps(monkeypatch, *calls):
    """Let the loop die before these of its optimizer steps, counted from 1; all that begin."""
    monkeypatch.setattr(run_state.RunFolder, "is_due", lambda self, closes: True)
    real, steps = joint.Run._slow_step, []

    def dying(self, state):
        steps.append(state.step)
        if len(steps) in calls:
            raise RuntimeError("killed")
        return real(self, state)

    monkeypatch.setattr(joint.Run, "_slow_step", dying)
    return steps


class Telling(Echo):
    """It says whether it was given other words than its own."""

    def forward(self, question):
        said = super().forward(question)
        return dspy.Prediction(
            answer=said.answer, changed=self.say.signature.instructions != "Say something."
        )


def changed(gold, pred, trace=None, pred_name=None, pred_trace=None):
    """Any other prompt is better."""
    found = vowels(gold, pred)
    return dspy.Prediction(score=found.score + pred.changed, feedback=found.feedback)
