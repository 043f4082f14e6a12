"""Agents, programs that write code, and programs of unusual make run as DSPy runs them.

As ``test_shapes.py``, whose plainer shapes come first: a call, a rollout and the compiled program
make the same requests and give the same types.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextvars
import copy
import datetime
import decimal
import functools
import logging
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import dspy
import numpy as np
import pydantic
import pytest
from dspy.predict.aggregation import majority
from dspy.primitives.local_interpreter import LocalInterpreter
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
    roll,
)
from typing_extensions import TypedDict

from fst_dspy import FST
from fst_dspy.errors import ProgramError
from fst_dspy.student.modules import copy_program, every_predictor

SHAPES = Shapes()
shape = SHAPES.add


@pytest.fixture
def models(tiny_qwen3: Any) -> Models:
    return models_over(tiny_qwen3)


async def look_slowly(word: str) -> str:
    """Looks a word up."""
    await asyncio.sleep(0.001)
    return f"{word} is jade"


# --- agents, and programs that write code ---------------------------------------------------------


def deprecated(name: str, *args: Any, **kwargs: Any) -> Any:
    """A module that DSPy is about to drop, or a skipped test once it has."""
    if not hasattr(dspy, name):
        pytest.skip(f"this DSPy has no {name} any more")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(dspy, name)(*args, **kwargs)


# With DSPy's interpreter that needs no Deno: what a rollout does with it is the same.
for title, make in {
    "ProgramOfThought": lambda m: deprecated(
        "ProgramOfThought", QA, interpreter_factory=LocalInterpreter
    ),
    "CodeAct": lambda m: deprecated(
        "CodeAct", QA, [look], max_iters=2, interpreter_factory=LocalInterpreter
    ),
    "RLM": lambda m: dspy.RLM(QA, max_iters=2, interpreter_factory=LocalInterpreter),
    "RLM with an LM of its own": lambda m: dspy.RLM(
        QA, max_iters=2, interpreter_factory=LocalInterpreter,
        sub_lm=m.local(max_tokens=99, temperature=0.1),
    ),
    "RLM with a remote LM": lambda m: dspy.RLM(
        QA, max_iters=2, interpreter_factory=LocalInterpreter, sub_lm=m.remote(max_tokens=99)
    ),
    "ReActV2": lambda m: dspy.ReActV2(QA, [look], max_iters=3),
    "ReActV2 within": lambda m: module(
        lambda self, question: self.agent(question=question),
        agent=dspy.ReActV2(QA, [look], max_iters=3),
    ),
}.items():  # fmt: skip
    SHAPES[title] = (make, QUESTION)


@shape("ReAct, awaited, with an async tool")
def _(m):
    async def aforward(self, question):
        return await self.agent.acall(question=question)

    return module(aforward, agent=dspy.ReAct(QA, [dspy.Tool(look_slowly, name="look")], 3))


@shape("ReAct with an async tool, called")
def _(m):
    def forward(self, question):
        with dspy.context(allow_tool_async_sync_conversion=True):
            return self.agent(question=question)

    return module(forward, agent=dspy.ReAct(QA, [dspy.Tool(look_slowly, name="look")], 3))


@shape("a tool that is an object")
def _(m):
    class Look:
        """Looks a word up."""

        def __init__(self):
            self.ask = dspy.Predict(DRAFT)

        def __call__(self, word: str) -> str:
            return self.ask(question=word).draft

    return dspy.ReAct(QA, [dspy.Tool(Look(), name="look")], max_iters=2)


@shape("agents within an agent")
def _(m):
    inner = dspy.ReAct("word -> answer", [look], max_iters=2)

    def ask(word: str) -> str:
        """Asks another agent."""
        return inner(word=word).answer

    return dspy.ReAct(QA, [dspy.Tool(ask, name="look")], max_iters=2)


@shape("a conversation that grows")
def _(m):
    signature = dspy.Signature(
        {"history": (dspy.History, dspy.InputField()), "question": (str, dspy.InputField()),
         "answer": (str, dspy.OutputField())}
    )  # fmt: skip

    def forward(self, question):
        history = dspy.History(messages=[])
        for turn in range(3):
            asked = f"{question} {turn}"
            answer = self.a(history=history, question=asked).answer
            history.messages.append({"question": asked, "answer": answer})
        return dspy.Prediction(answer=answer, history=history)

    return module(forward, a=dspy.Predict(signature))


# --- where predictors lie -------------------------------------------------------------------------


@dataclass
class Parts:
    """A dataclass of modules."""

    a: dspy.Module = field(default_factory=lambda: dspy.Predict(DRAFT))
    rest: list[dspy.Module] = field(default_factory=lambda: [dspy.ChainOfThought(QA)])


@dataclass(frozen=True)
class Fixed:
    a: dspy.Module


@dataclass(slots=True)
class Narrow:
    a: dspy.Module


class Model(pydantic.BaseModel, arbitrary_types_allowed=True):
    a: dspy.Module


class Pair(NamedTuple):
    a: dspy.Module
    b: dspy.Module


class Slotted:
    """An object without a ``__dict__``."""

    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = dspy.Predict(DRAFT)


class Uncopied:
    """An object that forbids copies."""

    def __init__(self, a: dspy.Module) -> None:
        self.a, self.lock = a, threading.Lock()

    def __copy__(self) -> Any:
        raise TypeError("there is one of me")


class Its(Uncopied):
    """An object that is its own copy."""

    def __copy__(self) -> Any:
        return self


class Around:
    """A wrapper that hands everything on, also before it has what it wraps."""

    def __init__(self, a: dspy.Module) -> None:
        self.a = a

    def __getattr__(self, name: str) -> Any:
        return getattr(self.a, name)


class OfItsClass(dspy.Module):
    """A predictor that all instances share."""

    a = dspy.Predict(DRAFT)

    def __init__(self) -> None:
        super().__init__()
        self.b = dspy.Predict(QA)

    def forward(self, question: str) -> Any:
        return self.b(question=self.a(question=question).draft)


def by_draft(get: Callable[[Any], Any], parts: Any) -> dspy.Module:
    """A program that finds its first predictor somewhere, and its second at ``b``."""
    return module(
        lambda self, question: self.b(question=get(self.parts)(question=question).draft),
        parts=parts, b=dspy.Predict(QA),
    )  # fmt: skip


for title, make in {
    "in a dataclass": lambda m: by_draft(lambda p: p.a, Parts()),
    "in a frozen dataclass": lambda m: by_draft(lambda p: p.a, Fixed(dspy.Predict(DRAFT))),
    "in a dataclass with slots": lambda m: by_draft(lambda p: p.a, Narrow(dspy.Predict(DRAFT))),
    "in a pydantic model": lambda m: by_draft(lambda p: p.a, Model(a=dspy.Predict(DRAFT))),
    "in a named tuple": lambda m: by_draft(
        lambda p: p.a, Pair(dspy.Predict(DRAFT), dspy.Predict(QA))
    ),
    "in an object with slots": lambda m: by_draft(lambda p: p.a, Slotted()),
    "in a dict by number": lambda m: by_draft(lambda p: p[3][0], {3: (dspy.Predict(DRAFT),)}),
    "in a default dict": lambda m: by_draft(
        lambda p: p["x"], collections.defaultdict(lambda: None, x=dspy.Predict(DRAFT))
    ),
    "in an ordered dict": lambda m: by_draft(
        lambda p: p["x"][0], collections.OrderedDict(x=collections.deque([dspy.Predict(DRAFT)], 3))
    ),
    "in a set": lambda m: by_draft(lambda p: next(iter(p)), {dspy.Predict(DRAFT)}),
    "in an object that forbids copies": lambda m: by_draft(
        lambda p: p.a, Uncopied(dspy.Predict(DRAFT))
    ),
    "in an object that is its own copy": lambda m: by_draft(
        lambda p: p.a, Its(dspy.Predict(DRAFT))
    ),
    "in a wrapper": lambda m: by_draft(lambda p: p.a, Around(dspy.Predict(DRAFT))),
    "of its class": lambda m: OfItsClass(),
}.items():
    SHAPES[title] = (make, QUESTION)


@shape("of a module of Python")
def _(m):
    outside = dspy.Predict(DRAFT)
    globals()["OUTSIDE"] = outside
    return module(
        lambda self, question: self.b(question=OUTSIDE(question=question).draft),  # noqa: F821
        b=dspy.Predict(QA),
    )


@shape("a subclass of Predict")
def _(m):
    class Louder(dspy.Predict):
        def forward(self, **kwargs):
            return super().forward(**{**kwargs, "question": kwargs["question"].upper()})

    return module(lambda self, question: self.a(question=question), a=Louder(QA))


@shape("a subclass of ChainOfThought")
def _(m):
    class Twice(dspy.ChainOfThought):
        def forward(self, **kwargs):
            first = super().forward(**kwargs)
            return super().forward(**{**kwargs, "question": first.answer})

    return Twice(QA)


@shape("copied in forward")
def _(m):
    def forward(self, question):
        first = self.a.deepcopy()(question=question)
        again = copy.deepcopy(self.a)(question=first.draft)
        return self.b.reset_copy()(question=again.draft)

    return module(forward, a=dspy.Predict(DRAFT), b=dspy.Predict(QA))


@shape("replaced in forward")
def _(m):
    def forward(self, question):
        self.a = dspy.ChainOfThought(QA)
        return self.a(question=question)

    return module(forward, a=dspy.Predict(QA))


@shape("a signature changed in forward")
def _(m):
    def forward(self, question):
        self.a.signature = self.a.signature.with_instructions("Be brief.")
        return self.a(question=question)

    return module(forward, a=dspy.Predict(QA))


@shape("demos chosen in forward")
def _(m):
    shots = [dspy.Example(question=q, answer=q * 2).with_inputs("question") for q in "abcd"]
    embed = dspy.Embedder(lambda texts: np.array([[float(len(t)), 1.0] for t in texts]))
    near = dspy.KNN(2, shots, embed)

    def forward(self, question):
        return self.a(question=question, demos=self.near(question=question))

    return module(forward, a=dspy.Predict(QA), near=near)


@shape("KNNFewShot")
def _(m):
    shots = [dspy.Example(question=q, answer="jade").with_inputs("question") for q in "abcd"]
    embed = dspy.Embedder(lambda texts: np.array([[float(len(t)), 1.0] for t in texts]))
    few = dspy.KNNFewShot(2, shots, embed, metric=lambda *_: True, max_bootstrapped_demos=1)
    return few.compile(dspy.Predict(QA))


@shape("BootstrapFewShot")
def _(m):
    shots = [dspy.Example(question=q, answer="jade").with_inputs("question") for q in "ab"]
    few = dspy.BootstrapFewShot(metric=lambda *_: True, max_bootstrapped_demos=1)
    found = few.compile(dspy.ChainOfThought(QA), trainset=shots)
    m.take()
    return found


# --- which language model, and how ----------------------------------------------------------------


@shape("an LM set in forward")
def _(m):
    lm = m.local(max_tokens=123, temperature=0.7)

    def forward(self, question):
        self.a.lm = lm
        return self.b(question=self.a(question=question).draft)

    return module(forward, a=dspy.Predict(DRAFT), b=dspy.Predict(QA))


@shape("set_lm in forward")
def _(m):
    def forward(self, question):
        self.set_lm(dspy.settings.lm.copy(temperature=0.25))
        return self.a(question=question)

    return module(forward, a=dspy.Predict(QA))


@shape("a remote LM set in forward")
def _(m):
    def forward(self, question):
        self.a.lm = m.remote(max_tokens=77)
        return self.b(question=self.a(question=question).draft)

    return module(forward, a=dspy.Predict(DRAFT), b=dspy.Predict(QA))


@shape("the LM copied in forward")
def _(m):
    def forward(self, question):
        with dspy.context(lm=dspy.settings.lm.copy(temperature=0.15, max_tokens=222)):
            return self.a(question=question)

    return module(forward, a=dspy.Predict(QA))


@shape("the LM called with messages, and awaited")
def _(m):
    async def aforward(self, question):
        await dspy.settings.lm.acall(messages=[{"role": "user", "content": question}])
        return await self.a.acall(question=question)

    return module(aforward, a=dspy.Predict(QA))


@shape("an adapter used by hand")
def _(m):
    def forward(self, question):
        adapter, lm = dspy.settings.adapter or dspy.ChatAdapter(), dspy.settings.lm
        found = adapter(lm, {}, self.a.signature, [], {"question": question})
        return self.a(question=found[0]["answer"])

    return module(forward, a=dspy.Predict(QA))


@shape("an adapter per predictor")
def _(m):
    def forward(self, question):
        with dspy.context(adapter=dspy.XMLAdapter()):
            draft = self.a(question=question).draft
        with dspy.context(adapter=dspy.JSONAdapter()):
            return self.b(question=draft)

    return module(forward, a=dspy.Predict(DRAFT), b=dspy.Predict(QA))


@shape("an LM that gives several completions")
def _(m):
    program = dspy.Predict(QA)
    program.lm = m.local(n=2)
    return program


@shape("several completions, as the call says")
def _(m):
    def forward(self, question):
        first = self.a(question=question, config={"n": 2})
        second = self.a(question=question, config={"n": 3, "temperature": 0.8})
        assert len(first.completions) == 2
        return majority(second.completions, field="answer")

    return module(forward, a=dspy.Predict(QA))


@shape("rollout ids")
def _(m):
    def forward(self, question):
        found = [
            self.a(question=question, config={"rollout_id": n, "temperature": 1.0})
            for n in range(3)
        ]
        return majority(found, field="answer")

    return module(forward, a=dspy.Predict(QA))


@shape("usage is tracked")
def _(m):
    def forward(self, question):
        with dspy.track_usage():
            return self.a(question=question)

    return module(forward, a=dspy.Predict(QA))


@shape("a callback of the program's own")
def _(m):
    class Hears(dspy.utils.callback.BaseCallback):
        def __init__(self):
            self.heard = 0

        def on_module_start(self, call_id, instance, inputs):
            self.heard += 1

    hears = Hears()

    def forward(self, question):
        with dspy.context(callbacks=[hears]):
            return self.a(question=question)

    return module(forward, a=dspy.Predict(QA))


# --- how it runs ----------------------------------------------------------------------------------


@shape("batch")
def _(m):
    def forward(self, question):
        rows = [dspy.Example(question=f"{question} {n}").with_inputs("question") for n in range(4)]
        return self.a.batch(rows, num_threads=2, disable_progress_bar=True)[-1]

    return module(forward, a=dspy.Predict(QA))


@shape("Evaluate within")
def _(m):
    rows = [dspy.Example(question=q, answer="jade").with_inputs("question") for q in "ab"]

    def forward(self, question):
        score = dspy.Evaluate(devset=rows, num_threads=2)(self.a, metric=lambda g, p, t=None: 1.0)
        return self.a(question=f"{question} {score.score}")

    return module(forward, a=dspy.Predict(QA))


@shape("threads with the settings' context")
def _(m):
    def forward(self, question):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            asked = [
                pool.submit(contextvars.copy_context().run, self.a, question=f"{question} {n}")
                for n in range(3)
            ]
        return asked[0].result()

    return module(forward, a=dspy.Predict(QA))


@shape("both forward and aforward")
def _(m):
    class Both(dspy.Module):
        def __init__(self):
            super().__init__()
            self.a = dspy.Predict(QA)

        def forward(self, question):
            return self.a(question=question)

        async def aforward(self, question):
            return await self.a.acall(question=question)

    return Both()


@shape("a loop of its own")
def _(m):
    def forward(self, question):
        return asyncio.run(self.a.acall(question=question))

    return module(forward, a=dspy.Predict(QA))


@shape("syncify")
def _(m):
    async def aforward(self, question):
        return await self.a.acall(question=question)

    return dspy.syncify(module(aforward, a=dspy.Predict(QA)))


@shape("tasks and threads of a loop")
def _(m):
    async def aforward(self, question):
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(self.a.acall(question=question))
            other = tasks.create_task(asyncio.to_thread(self.a, question=f"{question} !"))
        assert other.result().answer
        return first.result()

    return module(aforward, a=dspy.Predict(QA))


@shape("Refine of BestOfN")
def _(m):
    def longer(args, pred):
        return float(len(pred.answer) > 100)

    return dspy.Refine(dspy.BestOfN(dspy.Predict(QA), 2, longer, 1.0), 2, longer, 1.0)


@shape("BestOfN whose reward looks at the trace")
def _(m):
    def reward(args, pred):
        return float(len(dspy.settings.trace or []) + len(pred.answer)) / 100

    return dspy.BestOfN(dspy.ChainOfThought(QA), 2, reward, 1.0)


@shape("BestOfN whose reward asks a model")
def _(m):
    judge = dspy.Predict("answer -> score: float")

    def reward(args, pred):
        return judge(answer=pred.answer).score

    return dspy.BestOfN(dspy.Predict(QA), 2, reward, 1.0)


@shape("locks, files, generators")
def _(m):
    def forward(self, question):
        with self.lock:
            self.file.write("x")
            word = next(self.words)
        return self.a(question=f"{question} {word}")

    return module(
        forward, a=dspy.Predict(QA), lock=threading.RLock(), file=tempfile.TemporaryFile("w"),
        words=iter(lambda: "again", None), local=threading.local(), log=logging.getLogger("own"),
        gate=threading.Semaphore(1), kinds={Kind.COLD: 1}, pool=None,
    )  # fmt: skip


@shape("retries by hand")
def _(m):
    def forward(self, question):
        for attempt in range(3):
            try:
                found = self.a(question=f"{question} {attempt}")
                if attempt < 1:
                    raise ValueError("again")
                return found
            except ValueError:
                continue
        return None

    return module(forward, a=dspy.Predict(QA))


@shape("gives a text")
def _(m):
    return module(lambda self, question: self.a(question=question).answer, a=dspy.Predict(QA))


@shape("gives a dict")
def _(m):
    return module(lambda self, question: dict(self.a(question=question)), a=dspy.Predict(QA))


@shape("gives a tuple")
def _(m):
    return module(lambda self, question: (self.a(question=question), 1), a=dspy.Predict(QA))


@shape("a forward of the instance")
def _(m):
    program = module(lambda self, question: None, a=dspy.Predict(DRAFT), b=dspy.Predict(QA))
    program.forward = lambda question: program.b(question=program.a(question=question).draft)
    return program


@shape("any arguments", question="where?", extra=[1, {"a": 2}])
def _(m):
    return module(lambda self, **given: self.a(question=str(given)), a=dspy.Predict(QA))


# --- types ----------------------------------------------------------------------------------------


class Point(TypedDict):
    x: float
    y: int


@pydantic.dataclasses.dataclass
class Spot:
    x: float
    y: int


for out, kind in {
    "kinds": list[Kind], "by_name": dict[str, Place], "either": int | str, "both": tuple[str, int],
    "point": Point, "amount": decimal.Decimal,
}.items():  # fmt: skip
    SHAPES[f"output {out}"] = (
        lambda m, out=out, kind=kind: dspy.Predict(
            dspy.Signature({"question": (str, dspy.InputField()), out: (kind, dspy.OutputField())})
        ),
        QUESTION,
    )

for title, kind, value in [
    ("a decimal", decimal.Decimal, decimal.Decimal("1.50")),
    ("an id", uuid.UUID, uuid.UUID(int=7)),
    ("a time", datetime.datetime, datetime.datetime(2020, 1, 2, 3, 4, tzinfo=datetime.UTC)),
    ("a set", set[str], {"a"}),
    ("a dataclass", Spot, Spot(x=1.0, y=2)),
    ("a dict of models", dict[str, Place], {"a": Place(city="Bonn", zip=3)}),
    ("bytes", bytes, b"abc"),
    ("a list of Enums", list[Kind], [Kind.COLD, Kind.WARM]),
    ("a date in a tuple", tuple[datetime.date, int], (datetime.date(2020, 1, 2), 3)),
]:
    SHAPES[f"input {title}"] = (
        lambda m, kind=kind: dspy.Predict(
            dspy.Signature(
                {"value": (kind, dspy.InputField()), "answer": (str, dspy.OutputField())}
            )
        ),
        {"value": value},
    )


@shape("streamify within")
def _(models: Models) -> dspy.Module:
    class Streamed(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.say = dspy.Predict(QA)

        def forward(self, question: str) -> dspy.Prediction:
            stream = dspy.streamify(self.say, async_streaming=False)
            *_, last = stream(question=question)
            return last

    return Streamed()


CASES = [("Chat", name) for name in SHAPES] + [
    ("JSON", name) for name in ("ReActV2", "RLM", "in a dataclass", "output by_name")
]
ADAPTERS = {"Chat": dspy.ChatAdapter, "JSON": dspy.JSONAdapter}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("adapter", "name"), CASES, ids=[f"{n}, {a}" for a, n in CASES])
def test_a_call_a_rollout_and_the_compiled_program_are_one(
    models: Models, adapter: str, name: str
) -> None:
    make, inputs = SHAPES[name]
    one_in_three_ways(models, ADAPTERS[adapter](), make, inputs)


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("in a")])
def test_a_predictor_is_named_and_copied_wherever_it_lies(models: Models, name: str) -> None:
    make, inputs = SHAPES[name]
    with dspy.context(lm=models.local()):
        program = make(models)
        (rollout,), _ = roll(program, inputs)
    first, last = [call.predictor for call in rollout.calls]
    own = every_predictor(program)[first]
    assert first.startswith("parts") and last == "b"
    assert own not in list(every_predictor(copy_program(program)).values())
    assert not own.callbacks and own.lm is None


def test_a_function_with_a_cache_is_left_as_it_was(models: Models) -> None:
    a = dspy.Predict(DRAFT)

    @functools.lru_cache
    def ask(question: str) -> Any:
        return a(question=question)

    inner, program = ask.__wrapped__, by_draft(lambda p: lambda question: p(question), ask)
    with dspy.context(lm=models.local()):
        (rollout,), _ = roll(program, {"question": "where?"})
    assert rollout.failure is None and ask.__wrapped__ is inner


@pytest.mark.filterwarnings("ignore")
def test_a_tool_call_that_an_adapter_keeps_apart_is_read_as_text(models: Models) -> None:
    with dspy.context(lm=models.local(), adapter=dspy.JSONAdapter()):
        found = dspy.ReActV2(QA, [look], max_iters=3)(**QUESTION)
    assert found.termination_reason == "submit"
    (prompt,) = (one[1] for one in models.take() if "is jade" in one[1])
    assert '{"name": "look", "args": {"word": "x"}}<|im_end|>' in prompt
    assert "<|im_start|>user\nlook: x is jade<|im_end|>" in prompt


class Pictured(dspy.Module):
    """Shows its model an image."""

    def __init__(self) -> None:
        super().__init__()
        self.a = dspy.Predict("picture: dspy.Image -> answer")

    def forward(self, picture: dspy.Image) -> Any:
        assert isinstance(picture, dspy.Image)
        return self.a(picture=picture)


PIXEL = dspy.Image("data:image/png;base64,iVBORw0KGgo=")


def test_an_image_reaches_program_and_remote_model_as_it_is(models: Models) -> None:
    def forward(self, picture):
        self.keep(picture)
        return self.b(question=self.a(picture=picture).answer)

    seen: list[Any] = []
    program = module(forward, a=Pictured().a, b=dspy.Predict(QA), keep=seen.append)
    program.a.lm = models.remote()
    with dspy.context(lm=models.local()):
        roll(program, {"picture": PIXEL}, count=2)
    assert [type(one) for one in seen] == [dspy.Image] * 2
    assert [one[0] for one in models.take()] == ["local", "local", "remote", "remote"]
    assert models.parts == {"text", "image"}


def test_a_picture_for_a_model_of_texts_is_refused_before_training(models: Models) -> None:
    data = [dspy.Example(picture=PIXEL, answer=w).with_inputs("picture") for w in "abcdef"]
    with (
        dspy.context(lm=models.local()),
        pytest.raises(ProgramError, match="reads text only, not image"),
    ):
        FST(metric=lambda gold, pred, trace=None: 1.0, max_cycles=1).compile(
            Pictured(), trainset=data
        )
    assert not models.take()
