"""Environments whose methods are asynchronous, and programs that are awaited."""

from __future__ import annotations

import asyncio
import threading

import dspy
from dspy.utils import DummyLM
from environments import Hall

import fst_dspy

CHAT = dspy.ChatAdapter(use_json_adapter_fallback=False)


class Served:
    """A client with a task that reads in the background, as one of a web socket has."""

    def __init__(self) -> None:
        self.done, self.reward = False, 0.0

    async def reset(self) -> str:
        self.asked, self.answers = asyncio.Queue(), asyncio.Queue()
        self.reader = asyncio.create_task(self._read())
        return "connected"

    async def _read(self) -> None:
        while True:
            await self.answers.put((await self.asked.get()).upper())

    async def say(self, text: str) -> str:
        """Say something."""
        await self.asked.put(text)
        self.reward += 1.0
        return await asyncio.wait_for(self.answers.get(), timeout=10)


def played(program: dspy.Module) -> dspy.Prediction:
    lm = DummyLM([{"action": "hello"}, {"action": "bye"}])
    with dspy.context(lm=lm, adapter=CHAT):
        return program()


def test_what_reset_has_begun_lives_as_long_as_the_environment() -> None:
    before = threading.active_count()
    pred = played(fst_dspy.env(Served, max_turns=2))
    assert [(turn.result, turn.status) for turn in pred.turns] == [("HELLO", "ok"), ("BYE", "ok")]
    assert threading.active_count() == before


def test_so_it_does_in_a_process_of_its_own() -> None:
    pred = played(fst_dspy.env(Served, max_turns=2, processes=True))
    assert [turn.result for turn in pred.turns] == ["HELLO", "BYE"]


def test_it_plays_where_a_loop_is_running() -> None:
    async def notebook() -> dspy.Prediction:
        return played(fst_dspy.env(Served, max_turns=2))

    assert asyncio.run(notebook()).reward == 2.0


def test_an_environment_can_be_awaited() -> None:
    async def main() -> dspy.Prediction:
        with dspy.context(lm=DummyLM([{"action": "left"}]), adapter=CHAT):
            return await fst_dspy.env(Hall).acall(way="left")

    assert asyncio.run(main()).reward == 1.0
