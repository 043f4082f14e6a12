"""Programs of every shape run in a rollout, and once compiled, as DSPy runs them.

Each is called plainly, run in a rollout, and compiled; the requests that reach the language models
(messages, settings, whose), and what comes out, must be the same.
"""

from __future__ import annotations

import asyncio
import datetime
import functools
import json
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import dspy
import numpy as np
import pytest
from dspy.predict.aggregation import majority
from helpers import RawAdapter
from shape_models import (
    DRAFT,
    QA,
    QUESTION,
    Kind,
    Models,
    Place,
    Shapes,
    look,
    models_over,
    module,
    one_in_three_ways,
    plainly,
    roll,
)

from fst_dspy import load, save
from fst_dspy.config import SamplingConfig
from fst_dspy.errors import ProgramError
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.lm.predictors import bound_to, find_local_lm
from fst_dspy.rollouts.checks import check_input
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.run.records import as_read_back, with_plain_traces
from fst_dspy.student.candidate import example_id, make_candidate, seed_candidate


@pytest.fixture
def models(tiny_qwen3: Any) -> Models:
    return models_over(tiny_qwen3)


# --- the shapes -----------------------------------------------------------------------------------

OUR_WORDS = (
    "program, example, candidate, version, seed, like, find, given, method",
    "name, task, job, call, calls, cls, owner, kind, args, module, runner",
    "predictor, predictors, prediction, gold, pred, trace, score, feedback, metric",
)
"""Fields that are called what arguments of ours are."""

SHAPES = Shapes()
shape = SHAPES.add


for title, make, inputs in [
    ("Predict", lambda m: dspy.Predict(QA), {}),
    ("ChainOfThought", lambda m: dspy.ChainOfThought(QA), {}),
    ("ReAct", lambda m: dspy.ReAct(QA, [look], max_iters=3), {}),
    *((f"ChainOfThought of {names}", lambda m, names=names: dspy.ChainOfThought(
     f"{names} -> answer"), dict.fromkeys(names.split(", "), "x")) for names in OUR_WORDS),
    ("config of a predictor", lambda m: dspy.Predict(QA, temperature=0.3, max_tokens=300), {}),
    ("n completions", lambda m: dspy.Predict(QA, n=3), {}),
    ("model", lambda m: dspy.Predict(dspy.Signature({"place": (Place, dspy.InputField()),
     "answer": (str, dspy.OutputField())})), {"place": Place(city="Bonn", zip=3)}),
    ("list of models", lambda m: dspy.Predict(dspy.Signature({"places": (list[Place],
     dspy.InputField()), "answer": (str, dspy.OutputField())})),
     {"places": [Place(city="Bonn", zip=3)]}),
    ("Enum", lambda m: dspy.Predict(dspy.Signature({"kind": (Kind, dspy.InputField()),
     "answer": (str, dspy.OutputField())})), {"kind": Kind.COLD}),
    ("date", lambda m: dspy.Predict(dspy.Signature({"day": (datetime.date, dspy.InputField()),
     "answer": (str, dspy.OutputField())})), {"day": datetime.date(2020, 1, 2)}),
    ("History", lambda m: dspy.Predict(dspy.Signature({"history": (dspy.History,
     dspy.InputField()), "question": (str, dspy.InputField()),
     "answer": (str, dspy.OutputField())})),
     {"history": dspy.History(messages=[{"question": "a", "answer": "b"}]), "question": "c"}),
    ("Tool", lambda m: dspy.Predict(dspy.Signature({"tool": (dspy.Tool, dspy.InputField()),
     "answer": (str, dspy.OutputField())})), {"tool": dspy.Tool(look)}),
    ("Code", lambda m: dspy.Predict(dspy.Signature({"code": (dspy.Code, dspy.InputField()),
     "answer": (str, dspy.OutputField())})), {"code": dspy.Code(code="1 + 1")}),
    ("Example", lambda m: module(lambda self, shot: self.a(question=shot.question),
     a=dspy.Predict(QA)), {"shot": dspy.Example(question="x", answer="y")}),
    ("Optional", lambda m: dspy.Predict(dspy.Signature({"question": (str | None,
     dspy.InputField()), "answer": (str, dspy.OutputField())})), {"question": None}),
]:  # fmt: skip
    SHAPES[title] = (make, inputs or QUESTION)

for out, kind in {
    "place": Place, "places": list[Place], "kind": Kind, "day": datetime.date, "score": float,
    "count": int, "flag": bool, "tags": list[str], "choice": Literal["left", "right"],
    "maybe": str | None, "table": dict[str, int],
}.items():  # fmt: skip
    SHAPES[f"output {out}"] = (
        lambda m, out=out, kind=kind: dspy.Predict(
            dspy.Signature({"question": (str, dspy.InputField()), out: (kind, dspy.OutputField())})
        ),
        QUESTION,
    )


@shape("two in a row")
def _(m):
    return module(
        lambda self, question: self.b(draft=self.a(question=question).draft),
        a=dspy.Predict(DRAFT),
        b=dspy.ChainOfThought("draft -> answer"),
    )


@shape("shared twice")
def _(m):
    one = dspy.Predict(QA)

    def forward(self, question):
        return self.b(question=self.a(question=question).answer)

    return module(forward, a=one, b=one)


@shape("nested modules")
def _(m):
    inner = module(lambda self, question: self.a(question=question), a=dspy.Predict(QA))
    return module(lambda self, question: self.inner(question=question), inner=inner)


@shape("frozen")
def _(m):
    inner = module(lambda self, question: self.a(question=question), a=dspy.Predict(DRAFT))
    inner._compiled = True
    return module(
        lambda self, question: self.a(question=self.inner(question=question).draft),
        inner=inner,
        a=dspy.Predict(QA),
    )


@shape("nested containers")
def _(m):
    parts = {"x": [dspy.Predict(DRAFT), (dspy.Predict(QA),)]}

    def forward(self, question):
        return self.parts["x"][1][0](question=self.parts["x"][0](question=question).draft)

    return module(forward, parts=parts, a=dspy.Predict(QA))


@shape("list")
def _(m):
    return module(
        lambda self, question: [step(question=question) for step in self.steps][-1],
        steps=[dspy.Predict(DRAFT), dspy.Predict(QA)],
    )


@shape("made in forward")
def _(m):
    def forward(self, question):
        return self.a(question=dspy.Predict(DRAFT)(question=question).draft)

    return module(forward, a=dspy.Predict(QA))


@shape("bound method as a tool")
def _(m):
    class Agent(dspy.Module):
        def __init__(self):
            super().__init__()
            self.ask = dspy.Predict(DRAFT)
            self.agent = dspy.ReAct(QA, [dspy.Tool(self.look, name="look")], max_iters=2)

        def look(self, word: str) -> str:
            """Looks."""
            return self.ask(question=word).draft

        def forward(self, question):
            return self.agent(question=question)

    return Agent()


@shape("closure and partial")
def _(m):
    a, b = dspy.Predict(DRAFT), dspy.Predict(QA)

    def forward(self, question):
        return self.last(question=self.first(question).draft)

    return module(forward, a=a, first=lambda q: a(question=q), last=functools.partial(b))


def longer(args, pred):
    return float(len(pred.answer) > 100)


def pair():
    return module(
        lambda self, question: self.b(draft=self.a(question=question).draft),
        a=dspy.Predict(DRAFT), b=dspy.Predict("draft -> answer"),
    )  # fmt: skip


SHAPES["BestOfN"] = (lambda m: dspy.BestOfN(dspy.Predict(QA), 2, longer, 1.0), QUESTION)
SHAPES["BestOfN of two"] = (lambda m: dspy.BestOfN(pair(), 2, longer, 1.0), QUESTION)
SHAPES["Refine"] = (lambda m: dspy.Refine(dspy.ChainOfThought(QA), 2, longer, 1.0), QUESTION)


@shape("MultiChainComparison")
def _(m):
    def forward(self, question):
        tries = [self.a(question=question) for _ in range(3)]
        return self.compare(tries, question=question)

    return module(forward, a=dspy.ChainOfThought(QA), compare=dspy.MultiChainComparison(QA))


@shape("Ensemble")
def _(m):
    from dspy.teleprompt import Ensemble

    return Ensemble(reduce_fn=majority).compile([dspy.Predict(QA), dspy.ChainOfThought(QA)])


@shape("Parallel")
def _(m):
    def forward(self, question):
        run = dspy.Parallel(num_threads=3, disable_progress_bar=True)
        found = run([(self.a, {"question": f"{question} {n}"}) for n in range(4)])
        return dspy.Prediction(answer=" ".join(one.answer for one in found))

    return module(forward, a=dspy.Predict(QA))


@shape("own threads")
def _(m):
    def forward(self, question):
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(self.a, question=f"{question} {n}") for n in range(3)]
        return asked[0].result()

    program = module(forward, a=dspy.Predict(QA))
    program.set_lm(m.local())  # DSPy's settings do not reach such threads
    return program


@shape("acall")
def _(m):
    async def aforward(self, question):
        return await self.a.acall(question=question)

    return module(aforward, a=dspy.ChainOfThought(QA))


@shape("gather")
def _(m):
    async def aforward(self, question):
        calls = [self.a.acall(question=f"{question} {n}") for n in range(3)]
        return (await asyncio.gather(*calls))[0]

    return module(aforward, a=dspy.Predict(QA))


@shape("asyncify")
def _(m):
    async def aforward(self, question):
        return await dspy.asyncify(self.a)(question=question)

    return module(aforward, a=dspy.Predict(QA))


@shape("an LM in context")
def _(m):
    lm = m.local(temperature=0.4, max_tokens=300, stop=["zzz"])

    def forward(self, question):
        with dspy.context(lm=lm):
            draft = self.a(question=question).draft
        return self.b(question=draft)

    return module(forward, a=dspy.Predict(DRAFT), b=dspy.Predict(QA))


@shape("a remote LM in context")
def _(m):
    def forward(self, question):
        with dspy.context(lm=m.remote()):
            draft = self.a(question=question).draft
        return self.b(question=draft)

    return module(forward, a=dspy.Predict(DRAFT), b=dspy.Predict(QA))


@shape("an LM as argument")
def _(m):
    lm = m.local(max_tokens=250)
    return module(lambda self, question: self.a(question=question, lm=lm), a=dspy.Predict(QA))


@shape("the LM called plainly")
def _(m):
    def forward(self, question):
        dspy.settings.lm(f"Well, {question}")
        return self.a(question=question)

    return module(forward, a=dspy.Predict(QA))


@shape("two predictors, one remote")
def _(m):
    program = pair()
    program.a.lm = m.remote(max_tokens=44)
    return program


@shape("predictors with LMs of their own settings")
def _(m):
    program = pair()
    program.a.lm = m.local(max_tokens=200, temperature=0.2, stop=["qqq"])
    program.b.lm = m.local(max_tokens=333, top_p=0.9)
    return program


@shape("set_lm")
def _(m):
    program = pair()
    program.set_lm(m.local())
    return program


@shape("an adapter in context")
def _(m):
    def forward(self, question):
        with dspy.context(adapter=dspy.JSONAdapter()):
            return self.a(question=question)

    return module(forward, a=dspy.Predict(QA))


@shape("demos")
def _(m):
    program = dspy.Predict(QA)
    program.demos = [dspy.Example(question="p", answer="q")]
    return program


@shape("a signature given in the call")
def _(m):
    return module(
        lambda self, question: self.a(question=question, signature=DRAFT), a=dspy.Predict(QA)
    )


class Compact(dspy.ChatAdapter):
    """A user's own adapter."""

    def format_task_description(self, signature: Any) -> str:
        return "Do."


ADAPTERS: dict[str, Callable[[Models], dspy.Adapter]] = {
    "Chat": lambda m: dspy.ChatAdapter(),
    "JSON": lambda m: dspy.JSONAdapter(),
    "XML": lambda m: dspy.XMLAdapter(),
    "BAML": lambda m: __import__("dspy.adapters.baml_adapter", fromlist=["x"]).BAMLAdapter(),
    "TwoStep": lambda m: dspy.TwoStepAdapter(m.remote()),
    "TwoStep, local": lambda m: dspy.TwoStepAdapter(m.local(max_tokens=600)),
    "own": lambda m: Compact(),
}
CASES = [("Chat", name) for name in SHAPES] + [
    (adapter, name)
    for adapter in list(ADAPTERS)[1:]
    for name in ("ChainOfThought", "two in a row", "output place")
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("adapter", "name"), CASES, ids=[f"{n}, {a}" for a, n in CASES])
def test_a_call_a_rollout_and_the_compiled_program_are_one(
    models: Models, adapter: str, name: str
) -> None:
    make, inputs = SHAPES[name]
    one_in_three_ways(models, ADAPTERS[adapter](models), make, inputs)


# --- objects as they are --------------------------------------------------------------------------


def test_traces_and_metrics_get_objects_and_the_pool_gets_json(models: Models) -> None:
    signature = dspy.Signature(
        {"kind": (Kind, dspy.InputField()), "place": (Place, dspy.OutputField())}
    )
    second = dspy.Signature(
        {"place": (Place, dspy.InputField()), "answer": (str, dspy.OutputField())}
    )
    program = module(
        lambda self, kind: self.b(place=self.a(kind=kind).place),
        a=dspy.Predict(signature), b=dspy.Predict(second),
    )  # fmt: skip
    seen: list[Any] = []

    def metric(
        gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None
    ):
        seen.append((gold, pred_name, pred_trace))
        return 1.0

    with dspy.context(lm=models.local()):
        (rollout,), _ = roll(program, {"kind": Kind.COLD}, metric=metric, predictor_feedback=True)
    first, last = rollout.traces
    assert first.inputs == {"kind": Kind.COLD} and isinstance(first.outputs["place"], Place)
    assert last.inputs == {"place": Place(city="Rome", zip=7)}
    by_name = {name: traces for _, name, traces in seen if name}
    assert isinstance(by_name["a"][0][2].place, Place)
    assert by_name["b"][0][1] == {"place": Place(city="Rome", zip=7)}
    back = as_read_back(rollout).traces
    assert back[0].outputs == {"place": {"city": "Rome", "zip": 7}}
    assert json.loads(json.dumps(back[1].inputs)) == {"place": {"city": "Rome", "zip": 7}}
    logged = with_plain_traces(rollout).traces
    assert logged[1].inputs == {"place": {"city": "Rome", "zip": 7}}


def test_an_input_that_a_program_writes_into_is_its_own(models: Models) -> None:
    def forward(self, history):
        history.messages.append({"question": "q", "answer": "a"})
        return self.a(question=str(len(history.messages)))

    history = dspy.History(messages=[])
    example = dspy.Example(history=history).with_inputs("history")
    before = example_id(example)
    with dspy.context(lm=models.local()):
        roll(module(forward, a=dspy.Predict(QA)), {"history": history}, count=6)
    assert all("\n1\n" in prompt for _, prompt, *_ in models.take())
    assert history.messages == [] and example_id(example) == before


# --- whose language model -------------------------------------------------------------------------


def test_what_dspy_sends_elsewhere_goes_elsewhere(models: Models) -> None:
    program = pair()
    program.b.lm = models.local()
    with dspy.context(lm=models.remote()):
        rollouts, _ = roll(program, QUESTION, count=4)
        asked = models.take()
        assert [one[0] for one in asked] == ["local"] * 4 + ["remote"] * 4
        assert all([c.predictor for c in r.calls] == ["b"] for r in rollouts)
        assert all([t.predictor for t in r.traces] == ["a", "b"] for r in rollouts)
        compiled = bound_to(program, seed_candidate(program), program.b.lm)
        assert compiled.a.lm is None and compiled.b.lm is not None


def test_the_runs_sampling_is_a_default_and_a_predictors_own_word_wins(models: Models) -> None:
    program = module(
        lambda self, question: [p(question=question) for p in (self.a, self.b, self.c)].pop(),
        a=dspy.Predict(QA), b=dspy.Predict(QA, temperature=0.3), c=dspy.Predict(QA),
    )  # fmt: skip
    lm = models.local(temperature=0.0)
    program.c.lm = lm.copy(temperature=0.6)
    with dspy.context(lm=lm):
        sampling = SamplingConfig(temperature=0.9, max_tokens=500)
        (rollout,), _ = roll(program, QUESTION, lm, sampling=sampling)
    assert [call.temperature for call in rollout.calls] == [0.9, 0.3, 0.6]
    assert {one[2] for one in models.take()} == {500}


def test_a_rollout_takes_no_answer_from_the_cache(models: Models) -> None:
    lm = models.local(cache=True)

    def forward(self, question):
        with dspy.context(lm=lm):
            return self.a(question=question, config={"cache": True})

    with dspy.context(lm=lm):
        program = module(forward, a=dspy.Predict(QA))
        plainly(program, QUESTION)
        plainly(program, QUESTION)
        assert len(models.take()) == 1
        rollouts, _ = roll(program, QUESTION, count=3)
    assert len(models.take()) == 3 and all(len(r.calls) == 1 for r in rollouts)


@pytest.mark.parametrize("several", ["policies", "weights"])
def test_what_cannot_be_served_is_refused_before_training(
    models: Models, several: str, tiny_lfm2: Any
) -> None:
    program = pair()
    program.a.lm = lm = models.local()
    if several == "policies":
        program.b.lm = LocalLM(str(tiny_lfm2))
    else:
        for weight in models.policy.model.parameters():
            weight.data.mul_(1.5)
        models.policy.keep()
        program.b.lm = lm.at(models.policy.version())
    data = [dspy.Example(question=q, answer="").with_inputs("question") for q in "abcdef"]
    with pytest.raises(ProgramError, match="several"):
        check_input(program, lambda gold, pred, trace=None: 1.0, data, None)


# --- whose call -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BestOfN of two", "Refine", "Ensemble", "frozen"])
def test_copies_and_frozen_predictors_are_named_and_traced(models: Models, name: str) -> None:
    make, inputs = SHAPES[name]
    with dspy.context(lm=models.local()):
        (rollout,), _ = roll(make(models), inputs)
    names = [call.predictor for call in rollout.calls]
    assert names == [trace.predictor for trace in rollout.traces]
    expected = {
        "BestOfN of two": ["module.a", "module.b"] * 2,
        "Refine": ["module.predict", "unnamed", "module.predict"],
        "Ensemble": ["programs[0]", "programs[1].predict"],
        "frozen": ["inner.a", "a"],
    }
    assert names == expected[name]
    assert all(trace.outputs and trace.text for trace in rollout.traces)


def test_calls_at_once_keep_their_own_texts_in_one_order(models: Models) -> None:
    class Repeat(RawAdapter):
        pass

    def forward(self, question):
        run = dspy.Parallel(num_threads=4, disable_progress_bar=True)
        found = run([(self.a, {"question": f"{question} {n}"}) for n in range(6)])
        return dspy.Prediction(answer=found[0].answer)

    models.policy.generator = lambda policy, requests: [
        replace(models._answer(r), text=policy.tokenizer.decode(r.prompt_ids_T)) for r in requests
    ]
    runs = []
    with dspy.context(lm=models.local(), adapter=Repeat()):
        for _ in range(2):
            rollouts, _ = roll(module(forward, a=dspy.Predict(QA)), QUESTION, count=12)
            runs.append(rollouts)
    for rollout in runs[0]:
        assert len(rollout.traces) == 6
        for trace, call in zip(rollout.traces, rollout.calls, strict=True):
            assert trace.inputs["question"] in trace.text and trace.text == call.text
    assert runs[0] == runs[1]


# --- the weights that were validated --------------------------------------------------------------


def moved(models: Models) -> tuple[str, str]:
    """New weights, kept; their version and the base's."""
    for weight in models.policy.model.parameters():
        weight.data.mul_(1.5)
    models.policy.keep()
    return models.policy.version(), models.policy.base_version


def weights_asked(models: Models, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    real, versions = models.policy.at, []
    monkeypatch.setattr(
        models.policy, "at", lambda version: [versions.append(version), real(version)][1]
    )
    return versions


@pytest.mark.parametrize(
    "name", ["made in forward", "frozen", "nested containers", "closure and partial", "Refine",
             "an LM in context", "an LM as argument", "Parallel", "the LM called plainly"]
)  # fmt: skip
def test_a_compiled_program_answers_with_the_compiled_weights(
    models: Models, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, inputs = SHAPES[name]
    lm = models.local()
    with dspy.context(lm=lm):
        program = make(models)
        version, _ = moved(models)
        versions = weights_asked(models, monkeypatch)
        compiled = bound_to(program, seed_candidate(program), lm.at(version))
        for one in (compiled, compiled.deepcopy()):
            plainly(one, inputs)
            assert versions and set(versions) == {version}
        versions.clear()
        roll(program, inputs)
        assert set(versions) == {models.policy.live_id}
        versions.clear()
        compiled.set_lm(lm)  # whoever binds it anew means it
        plainly(compiled, inputs)
        if name not in ("frozen", "nested containers", "closure and partial"):
            assert set(versions) == {lm.version}


class MakesOne(dspy.Module):
    """Importable, so that it can be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.a = dspy.Predict(QA)

    def forward(self, question: str) -> Any:
        return self.a(question=dspy.Predict(DRAFT)(question=question).draft)


def test_saved_and_loaded_it_answers_with_the_compiled_weights(
    models: Models, tmp_path: Any
) -> None:
    lm = models.local()
    with dspy.context(lm=lm):
        version, _ = moved(models)
        compiled = bound_to(MakesOne(), seed_candidate(MakesOne()), lm.at(version))
        save(compiled, tmp_path / "bundle")
        again = load(tmp_path / "bundle", MakesOne())
        other = again.a.lm.policy
        other.context_length = 20_000
        other.generator = models.generate
        models.policy.generator = lambda *_: pytest.fail("the base's weights were asked")
        plainly(again, QUESTION)
        assert len(models.take()) == 2


# --- what is copied -------------------------------------------------------------------------------


class Env:
    """A tool with a state, which says how it is copied."""

    def __init__(self) -> None:
        self.moves = 0

    def copy_for_rollout(self) -> Env:
        return Env()


def test_rollouts_share_what_is_no_module(models: Models) -> None:
    seen: list[Any] = []

    def forward(self, question):
        self.env.moves += 1
        self.notes.append(question)
        seen.append((id(self.big), self.env.moves, len(self.notes)))
        return self.a(question=question)

    big = np.ones(50 * 2**20 // 8)
    program = module(forward, a=dspy.Predict(QA), big=big, env=Env(), notes=[])
    with dspy.context(lm=models.local()):
        tracemalloc.start()
        try:
            roll(program, QUESTION, count=32)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 60 * 2**20
    assert set(seen) == {(id(big), 1, 1)} and program.env.moves == 0 and program.notes == []


def test_a_candidates_texts_reach_predictors_behind_tools_and_closures(models: Models) -> None:
    for name, way in {"bound method as a tool": "ask", "closure and partial": "a"}.items():
        make, inputs = SHAPES[name]
        with dspy.context(lm=models.local()):
            program = make(models)
            texts = {**seed_candidate(program).components, f"{way}.instructions": "Be jade."}
            candidate = make_candidate(texts)
            runner = RolloutRunner(
                program, lambda *_: 1.0, find_local_lm(program), SamplingConfig(), 0
            )
            job = RolloutJob(dspy.Example(**inputs).with_inputs(*inputs), candidate)
            runner.run([job], channel="slow", salt=0)
            assert any("Be jade." in one[1] for one in models.take())
            plainly(bound_to(program, candidate, models.local()), inputs)
            assert any("Be jade." in one[1] for one in models.take())
