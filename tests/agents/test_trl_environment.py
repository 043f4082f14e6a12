"""An environment as TRL's guide to OpenEnv has them: a client, one tool, done, reward, no more."""

from __future__ import annotations

import types

import dspy
from dspy.utils import DummyLM

import fst_dspy


class Client:
    """What stands for the server of a word game: it repeats the whole game each time."""

    def __init__(self) -> None:
        self.said = "Guess the word."

    def reset(self):
        return types.SimpleNamespace(text=self.said)

    def step(self, message: str):
        self.said += f"\n{message}: {'right' if message == '[crane]' else 'wrong'}"
        over = message == "[crane]"
        return types.SimpleNamespace(text=self.said, reward=float(over), done=over)


class WordGame:
    def __init__(self):
        self.client = Client()

    def reset(self, **kwargs) -> str | None:
        result = self.client.reset()
        self._seen = result.text
        self.reward = 0.0
        self.done = False
        return self._seen

    def guess(self, guess: str) -> str:
        """
        Make a guess in the game.

        Args:
            guess: The guessed word, formatted as '[abcde]'

        Returns:
            What the game answers.
        """
        if self.done:
            raise ValueError("Game over.")
        result = self.client.step(guess)
        answer = result.text[len(self._seen) :]
        self._seen = result.text
        self.reward, self.done = result.reward, result.done
        return answer


def test_it_runs_unchanged():
    program = fst_dspy.env(WordGame, "prompt, observation, history -> action")
    lm = DummyLM([{"action": "[stone]"}, {"action": "[crane]"}])
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        pred = program(prompt="You are an expert at word games.")
    assert [turn.result.strip() for turn in pred.turns] == ["[stone]: wrong", "[crane]: right"]
    assert fst_dspy.env_reward(None, pred).score == 1.0
    assert "Make a guess in the game." in lm.history[0]["messages"][0]["content"]


def test_its_rewards_in_turns_are_what_each_turn_gained():
    program = fst_dspy.env(WordGame, "observation -> action", max_turns=3)
    with dspy.context(lm=DummyLM([{"action": "[crane]"}] * 3), adapter=dspy.ChatAdapter()):
        pred = program()
    assert [turn.reward for turn in pred.turns] == [1.0]


def test_its_tool_serves_react_too():
    program = fst_dspy.env(WordGame, "observation -> answer", agent=dspy.ReAct, max_turns=3)
    guess = {
        "next_thought": "",
        "next_tool_name": "guess",
        "next_tool_args": '{"guess": "[crane]"}',
    }
    with dspy.context(lm=DummyLM([guess]), adapter=dspy.ChatAdapter()):
        pred = program()
    assert (pred.reward, pred.done) == (1.0, True)
