"""``dspy.Parallel`` in several rollouts at once."""

from weakref import WeakSet

import dspy
import pytest
from shape_models import QA, QUESTION, models_over, module, roll
from tqdm import tqdm


@pytest.fixture
def emptied_as_one_opens(monkeypatch):
    """Another call of ``dspy.Parallel`` begins just while a bar opens, as its first line does."""
    free = tqdm._get_free_pos.__func__

    def race(cls, instance=None):
        tqdm._instances.clear()
        return free(cls, instance)

    monkeypatch.setattr(tqdm, "_instances", WeakSet())
    monkeypatch.setattr(tqdm, "_get_free_pos", classmethod(race))


def parallel(self, question):
    run = dspy.Parallel(num_threads=2, disable_progress_bar=True)
    found = run([(self.a, {"question": f"{question} {n}"}) for n in range(2)])
    return dspy.Prediction(answer=found[0].answer)


def test_bars_that_another_thread_forgets_fail_no_rollout(tiny_qwen3, emptied_as_one_opens):
    with pytest.raises(KeyError):
        tqdm(total=1, disable=True)
    models = models_over(tiny_qwen3)
    with dspy.context(lm=models.local()):
        rollouts, _ = roll(module(parallel, a=dspy.Predict(QA)), QUESTION, count=4)
    assert [r.failure for r in rollouts] == [None] * 4
    tqdm(total=1, disable=True)
