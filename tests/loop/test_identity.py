"""A run folder goes on with the run that began it, and says what differs."""

from __future__ import annotations

import json
import logging
from functools import partial

import dspy
import pytest
from dspy.datasets.dataset import Dataset
from helpers import Echo, RawAdapter, questions, vowels

from fst_dspy import FST, LocalLM
from fst_dspy.errors import ProgramError, StoreError
from fst_dspy.student.identity import program_identity

SETTINGS = dict(
    max_cycles=1,
    steps_per_cycle=1,
    group_size=4,
    population_size=2,
    problems_per_step=2,
    max_tokens=8,
    val_size=4,
    first_cycle_iterations=1,
)


def run(model, folder, metric=vowels, program=None, lm=None, adapter=None, data=None, **settings):
    fst = FST(metric, log_dir=folder, track_stats=True, **(SETTINGS | settings))
    with dspy.context(lm=lm or LocalLM(str(model)), adapter=adapter or RawAdapter()):
        student = program or Echo()
        train, val = (data.train, data.dev) if data else (questions(6), questions(4, 6))
        return fst.compile(student, trainset=train, valset=val).detailed_results


@pytest.fixture(scope="module")
def finished(tiny_qwen3, tmp_path_factory):
    folder = tmp_path_factory.mktemp("identity") / "run"
    return folder, run(tiny_qwen3, folder)


class WithField(dspy.Module):
    """As ``Echo``, whose fields are described otherwise."""

    def __init__(self):
        super().__init__()
        signature = Echo().say.signature
        name = next(iter(signature.output_fields))
        self.say = dspy.Predict(signature.with_updated_fields(name, desc="in one word"))

    def forward(self, **inputs):
        return self.say(**inputs)


def other_metric(gold, pred, trace=None):
    return 0.5


other_program = Echo()
other_program.more = 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"program": WithField()}, "program"),
        ({"metric": other_metric}, "metric differs"),
        ({"adapter": dspy.JSONAdapter()}, "adapter"),
        ({"learning_rate": 2e-3}, r"learning_rate differs \([\d.e-]+ there, 0.002 here\)"),
    ],
)
def test_what_differs_is_named(tiny_qwen3, finished, change, named):
    with pytest.raises(StoreError, match=f"holds another run: .*{named}"):
        run(tiny_qwen3, finished[0], **change)


class Failing(Echo):
    """A program with a mistake in it."""

    def forward(self, question):
        raise KeyError("a mistake")


def test_a_run_that_failed_before_it_kept_anything_is_mended_in_its_folder(tiny_qwen3, tmp_path):
    with pytest.raises(ProgramError, match="a mistake"):
        run(tiny_qwen3, tmp_path, program=Failing())
    assert run(tiny_qwen3, tmp_path, learning_rate=2e-3).records
    with pytest.raises(StoreError, match=r"holds another run: .*program"):
        run(tiny_qwen3, tmp_path, program=Failing(), learning_rate=2e-3)


def test_settings_of_the_language_model_count(tiny_qwen3, finished):
    with pytest.raises(StoreError, match=r"lm\.settings"):
        run(tiny_qwen3, finished[0], lm=LocalLM(str(tiny_qwen3), stop=["x"]))


def test_a_folder_without_its_config_is_refused(tiny_qwen3, finished):
    config = finished[0] / "config.json"
    kept = config.read_bytes()
    config.unlink()
    try:
        with pytest.raises(StoreError, match=r"not its config\.json"):
            run(tiny_qwen3, finished[0], learning_rate=2e-3)
    finally:
        config.write_bytes(kept)


def test_a_run_of_examples_of_dspys_datasets_goes_on(tiny_qwen3, tmp_path):
    """They have another ``dspy_uuid`` in every process."""

    class Asked(Dataset):
        def __init__(self):
            super().__init__(input_keys=["question"])
            self._train = [example.toDict() for example in questions(6)]
            self._dev = [example.toDict() for example in questions(4, 6)]

    known = [run(tiny_qwen3, tmp_path, data=Asked()).records for _ in range(2)]
    assert known[0] == known[1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"metric": partial(vowels, trace=5)}, "metric.trace differs (null there, 5 here) since"),
        ({"program": other_program}, "program.more differs (null there, 3 here) since"),
    ],
)
def test_what_has_other_values_is_told_of(tiny_qwen3, finished, caplog, change, named):
    with caplog.at_level(logging.WARNING):
        run(tiny_qwen3, finished[0], **change)
    assert named in caplog.text and "scores of before are the old one's" in caplog.text
    run(tiny_qwen3, finished[0])
    caplog.clear()
    run(tiny_qwen3, finished[0])
    assert "differs" not in caplog.text


@pytest.mark.parametrize("what", ["metric", "program"])
def test_what_has_another_source_is_told_of(what, tiny_qwen3, finished, caplog):
    config = finished[0] / "config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {what: plain[what] | {"source": "0" * 12}}))
    with caplog.at_level(logging.WARNING):
        run(tiny_qwen3, finished[0])
    assert f"the {what}'s source has changed" in caplog.text and caplog.text.count("source") == 1
    caplog.clear()
    run(tiny_qwen3, finished[0])
    assert "source" not in caplog.text and json.loads(config.read_text()) == plain


def test_a_program_is_known_by_the_source_of_all_its_modules():
    def outer(part):
        program = dspy.Module()
        program.part = part
        return program_identity(program)

    class Upper(Echo):
        def forward(self, question):
            return super().forward(question.upper())

    one, same, other = outer(Echo()), outer(Echo()), outer(Upper())
    assert one == same and one["class"] == other["class"] and one["source"] != other["source"]
    assert "source" not in program_identity(dspy.Predict("question -> answer"))


def test_folders_of_earlier_versions_are_taken_up(tiny_qwen3, finished):
    config = finished[0] / "config.json"
    plain = json.loads(config.read_text())
    later = ("program", "adapter", "lm", "metric")
    old = {k: v for k, v in plain.items() if k not in later}
    without = {k: {n: v for n, v in plain[k].items() if n != "values"} for k in later}
    for earlier in (old, old | without):
        config.write_text(json.dumps(earlier))
        run(tiny_qwen3, finished[0])
        assert json.loads(config.read_text()) == plain


def test_a_finished_run_is_extended_by_raising_its_budget(tiny_qwen3, tmp_path, finished):
    whole = run(tiny_qwen3, tmp_path / "whole", max_cycles=2)
    short = run(tiny_qwen3, tmp_path / "parts")
    longer = run(tiny_qwen3, tmp_path / "parts", max_cycles=2)
    assert short.records[-1].cycle < longer.records[-1].cycle == whole.records[-1].cycle
    assert longer.weights_version == whole.weights_version
    assert json.loads((tmp_path / "parts" / "result.json").read_text())["records"][-1]["cycle"] == 3
