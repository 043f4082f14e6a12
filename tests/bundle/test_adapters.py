"""A program compiled under one of DSPy's adapters, in this process and in a fresh one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dspy
from helpers import Echo, RawAdapter, questions

import fst_dspy
from fst_dspy import FST, LocalLM
from fst_dspy.lm.predictors import bound_to
from fst_dspy.student.candidate import seed_candidate
from fst_dspy.student.identity import adapter_identity, writes_alike

FRESH = """
import sys, dspy, fst_dspy
def load(folder):
    return fst_dspy.load(folder, program=dspy.Predict("question -> answer"))
def ask(program):
    try:
        program(question="where?")
    except dspy.utils.exceptions.AdapterParseError:
        pass
for folder, same in zip(sys.argv[1::2], sys.argv[2::2]):
    print("next bundle", file=sys.stderr, flush=True)
    dspy.configure(adapter=eval(same))
    ask(load(folder))
    print("now the default", file=sys.stderr, flush=True)
    dspy.configure(adapter=None)
    program = load(folder)
    ask(program)
    ask(program)
"""


def length(gold, pred, trace=None, pred_name=None, pred_trace=None):
    return dspy.Prediction(score=len(str(pred.answer)) % 5 / 5, feedback="Lesson: be brief.")


def test_a_program_runs_and_says_where_its_adapter_is_another(tmp_path: Path) -> None:
    lm = LocalLM("embedded", max_tokens=16)
    fst = FST(
        length, max_cycles=1, steps_per_cycle=1, group_size=2, problems_per_step=2,
        population_size=2, val_size=2, first_cycle_iterations=1, seed=0,
    )  # fmt: skip
    adapters = ("dspy.XMLAdapter(use_native_function_calling=True)", "dspy.JSONAdapter()")
    arguments = []
    for same in adapters:
        arguments += [str(tmp_path / str(len(arguments))), same]
        with dspy.context(lm=lm, adapter=eval(same)):
            program = dspy.Predict("question -> answer")
            compiled = fst.compile(program, trainset=questions(3), valset=questions(2, 3))
            fst_dspy.save(compiled, arguments[-2])
    command = [sys.executable, "-c", FRESH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    _, *bundles = done.stderr.split("next bundle")
    for same, told in zip(adapters, bundles, strict=True):
        before, _, after = told.partition("now the default")
        said = f"was compiled under the adapter {same.partition('(')[0].removeprefix('dspy.')}("
        assert (before.count(said), after.count(said)) == (0, 1), told[-2000:]
        assert "is called under ChatAdapter(" in after


def test_an_adapter_is_no_other_by_its_second_try_alone():
    chat, strict = dspy.ChatAdapter(), dspy.ChatAdapter(use_json_adapter_fallback=False)
    here, there = adapter_identity(chat), adapter_identity(strict)
    assert here != there and writes_alike(here, there)
    assert not writes_alike(here, adapter_identity(dspy.JSONAdapter()))
    native = dspy.ChatAdapter(use_native_function_calling=True)
    assert not writes_alike(here, adapter_identity(native))


class Choosing(Echo):
    """Chooses the adapter of its own calls."""

    def forward(self, question):
        with dspy.context(adapter=RawAdapter(use_json_adapter_fallback=False)):
            return self.say(question=question)


def test_an_adapter_of_the_programs_own_choice_is_no_other(tiny_llama, caplog):
    lm, program = LocalLM(str(tiny_llama), max_tokens=4), Choosing()
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        compiled = bound_to(program, seed_candidate(program), lm)
        for adapter, told in ((dspy.JSONAdapter(), 0), (dspy.XMLAdapter(), 1)):
            with dspy.context(adapter=adapter):
                compiled(question="1")
            assert caplog.text.count("was compiled under") == told
