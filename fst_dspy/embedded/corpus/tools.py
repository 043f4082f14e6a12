"""The skill of using tools: the steps of ``dspy.ReAct``, and the answer drawn from what they found.

Every tool knows one thing about anything. Which tool that is, is in its description, in a rule of
the instruction, or nowhere. ReAct itself makes the signatures and writes the trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import dspy

from fst_dspy.embedded.corpus.base import Message, Question, Stage
from fst_dspy.embedded.corpus.render import HEAVY, LIGHT, Piece, Turn, draw_adapter, render_chat
from fst_dspy.embedded.corpus.words import ENGLISH, HELD_OUT, NAMES, TOWNS, made_up, word_list

TOOLS = word_list("search lookup find fetch ask query call check get read see tell")
ARGUMENTS = word_list("query name item text key word thing topic subject input")
QUESTIONS = ("What is the {k} of {e}?", "Which {k} has {e}?", "Tell me the {k} of {e}.")
DESCRIPTIONS = ("Finds the {k}.", "Knows the {k} of everything.", "Gives the {k} of a thing.",
                "Looks up the {k}.", "{k}")  # fmt: skip
NEUTRAL = ("A tool.", "Looks things up.", "Finds something out.", "Knows many things.")
RULES = ("Use {t} for the {k}.", "For the {k} use {t}.", "{k} -> {t}", "The {k} is found by {t}.")
Step = tuple[str, str, dict[str, str], str]
"""Thought, tool, arguments and observation."""
FOUND = ("The {k} of {e} is {v}.", "{e}: {v}", "{v}")


def agent(
    tools: Sequence[str], arguments: Sequence[str], described: Sequence[str], task: str | None
) -> dspy.ReAct:
    """A ReAct with such tools, which is asked a question."""
    signature: Any = "question -> answer"
    if task is not None:
        signature = dspy.Signature(signature, task)
    made = [
        dspy.Tool(
            lambda **given: given, name=name, desc=said,
            args={argument: {"type": "string"}}, arg_types={argument: str},
        )
        for name, argument, said in zip(tools, arguments, described, strict=True)
    ]  # fmt: skip
    return dspy.ReAct(signature, tools=made)


def trajectory(adapter: dspy.Adapter, steps: Sequence[Step]) -> str:
    """Thoughts, tools, arguments and observations as ReAct shows them."""
    names = ("thought", "tool_name", "tool_args", "observation")
    fields = {
        f"{name}_{number}": value
        for number, step in enumerate(steps)
        for name, value in zip(names, step, strict=True)
    }
    signature = dspy.Signature(f"{', '.join(fields)} -> x") if fields else dspy.Signature("-> x")
    return adapter.format_user_message_content(signature, fields)


class _Case:
    """A question, the tools there are, and the way to its answer."""

    def __init__(self, rng: Random, words: Sequence[str], count: int, names: Sequence[str]) -> None:
        self.topics, self.tools = rng.sample(words, count), list(names)
        self.arguments = [rng.choice(ARGUMENTS) for _ in names]
        self.draw(rng, [word for word in words if word not in self.topics])

    def draw(self, rng: Random, words: Sequence[str]) -> None:
        """Another question to the same tools."""
        self.index = rng.randrange(len(self.tools))
        *drawn, self.value = rng.sample(words, 4)
        self.entity = rng.choice([*NAMES, *TOWNS, *drawn])
        topic, entity = self.topics[self.index], self.entity
        self.question = rng.choice(QUESTIONS).format(k=topic, e=entity)
        self.found = rng.choice(FOUND).format(k=topic, e=entity, v=self.value)
        self.thought = f"I need the {topic} of {entity}."

    def steps(self, done: int) -> list[Step]:
        """The first steps of the trajectory: the call, then the end."""
        arguments = {self.arguments[self.index]: self.entity}
        call: Step = (self.thought, self.tools[self.index], arguments, self.found)
        topic = self.topics[self.index]
        know = f"The {topic} of {self.entity} is {self.value}."
        end: Step = (know, "finish", {}, "Completed.")
        return [call, end][:done]

    def turn(self, adapter: dspy.Adapter, done: int, decided: bool) -> Turn:
        """The step after ``done`` ones: the call, the end, or the answer."""
        topic, entity = self.topics[self.index], self.entity
        inputs = {"question": self.question, "trajectory": trajectory(adapter, self.steps(done))}
        is_so = [
            Piece("The "), Piece(topic, HEAVY), Piece(" of "), Piece(entity, HEAVY),
            Piece(" is "), Piece(self.value, HEAVY), Piece("."),
        ]  # fmt: skip
        if done == 2:
            return Turn(inputs, {"reasoning": is_so, "answer": [Piece(self.value, HEAVY)]})
        tool, argument = "finish", [Piece("{}")]
        thought = is_so
        if done == 0:
            tool = self.tools[self.index]
            name = self.arguments[self.index]
            thought = [
                Piece("I need the "), Piece(topic, HEAVY), Piece(" of "), Piece(entity, HEAVY),
                Piece("."),
            ]  # fmt: skip
            argument = [
                Piece('{"'), Piece(name, HEAVY), Piece('": '), Piece('"'), Piece(entity, HEAVY),
                Piece('"}'),
            ]  # fmt: skip
        return Turn(
            inputs,
            {
                "next_thought": thought,
                "next_tool_name": [Piece(tool, HEAVY if decided or done else LIGHT)],
                "next_tool_args": argument,
            },
        )


def chat(rng: Random) -> list[Message]:
    """A chat of one of ReAct's two predictors, under one of the adapters."""
    adapter = draw_adapter(rng)
    mode = rng.choices(["described", "ruled", "bare"], [0.6, 0.25, 0.15])[0]
    count = rng.randint(1, 4)
    names = rng.sample(TOOLS, count)
    if rng.random() < 0.3:
        names = [made_up(rng) for _ in names]
    case = _Case(rng, ENGLISH, count, names)
    form = rng.choice(DESCRIPTIONS)
    described = [
        form.format(k=topic) if mode == "described" else rng.choice(NEUTRAL)
        for topic in case.topics
    ]
    task = None if rng.random() < 0.4 else "Answer the question."
    if mode == "ruled":
        rule = rng.choice(RULES)
        rules = [rule.format(t=t, k=k) for t, k in zip(names, case.topics, strict=True)]
        task = "\n".join([task or "Answer the question.", *rng.sample(rules, count)])
    react = agent(names, case.arguments, described, task)
    extracts = rng.random() < 0.2
    signature = react.extract.predict.signature if extracts else react.react.signature
    decided = mode != "bare" or count == 1
    turns = []
    for _ in range(rng.choice([1, 2, 3])):
        done = 2 if extracts else rng.choice([0, 0, 0, 1])
        turns.append(case.turn(adapter, done, decided))
        case.draw(rng, [word for word in ENGLISH if word not in case.topics])
    return render_chat(adapter, signature, turns)


class Tools:
    """See the module docstring; satisfies ``Family``."""

    name = "tools"
    warmup: tuple[Stage, ...] = ()
    share = 0.4

    def sample(self, rng: Random, stage: str) -> list[Message]:
        """Steps and answers in DSPy's formats."""
        return chat(rng)

    def questions(self, rng: Random, count: int, unseen: bool = False) -> list[Question]:
        """First steps: which of four tools of like descriptions the instruction names."""
        words = sorted(HELD_OUT if unseen else ENGLISH)
        questions = []
        for _ in range(count):
            names = rng.sample(TOOLS, 4)
            case = _Case(rng, words, 4, names)
            react = agent(names, case.arguments, [NEUTRAL[1]] * 4, "Answer the question.")
            signature = react.react.signature
            rules = [f"Use {t} for the {k}." for t, k in zip(names, case.topics, strict=True)]
            ideal = "\n".join([signature.instructions, *rules])
            inputs = {"question": case.question, "trajectory": ""}
            answer = names[case.index]
            questions.append(Question(signature, ideal, inputs, "next_tool_name", answer))
        return questions
