"""The process of an environment: asked over its standard input, answers over its standard output.

It imports neither DSPy nor torch, so that it starts as fast as the environment itself does.
"""

from __future__ import annotations

import inspect
import os
import struct
import sys
from contextlib import suppress
from typing import IO, Any

import cloudpickle

from fst_dspy.agents import contract
from fst_dspy.agents.event_loop import EventLoop
from fst_dspy.agents.gym import made
from fst_dspy.errors import LOST

_LENGTH = struct.Struct(">Q")


def send(stream: IO[bytes], value: Any) -> None:
    """Write one message."""
    data = cloudpickle.dumps(value)
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one message.

    Raises:
        EOFError: The other side has gone.
    """
    (length,) = _LENGTH.unpack(_read(stream, _LENGTH.size))
    return cloudpickle.loads(_read(stream, length))


def serve() -> None:
    """Make an environment, play in it and close it, again and again, until nobody asks any more."""
    questions = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What an environment prints is not to get between the answers, nor is it, or a program that it
    # starts, to read the questions.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    environment: Any = None
    loop = EventLoop()
    while True:
        try:
            what, arguments, more = receive(questions)
        except (EOFError, KeyboardInterrupt):
            return
        except Exception as error:  # read, and of something that cannot be made here
            send(answers, ("raised", contract.said_of(error), {}))
            continue
        try:
            if what == "make":
                environment = made(more[0])
                value: Any = _shape(environment)
            elif what == "close":
                contract.close(environment, loop)
                environment = value = None
            elif what == "reset":
                value = contract.reset(environment, arguments, loop)
            elif what == "final_reward":
                value = contract.final_reward(environment, loop)
            elif what == "get":
                value = (hasattr(environment, more[0]), getattr(environment, more[0], None))
            else:
                value = loop.finished(contract.tool_of(environment, more[0])(**arguments))
            # Before the reset there is no state that could be asked about.
            told = {} if what in ("make", "close") else _attributes(environment)
            send(answers, ("returned", value, told))
        except Exception as error:
            kind = "lost" if isinstance(error, LOST) else "raised"
            told = {}
            with suppress(Exception):  # one of these may be what has raised
                told = _attributes(environment)
            send(answers, (kind, contract.said_of(error), told))


def _read(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return data


def _attributes(environment: Any) -> dict[str, Any]:
    """How far the episode is, which is sent with each answer."""
    return {
        "done": contract.is_done(environment),
        "reward": contract.reward_so_far(environment),
        "feedback": contract.feedback_of(environment),
    }


def _shape(environment: Any) -> dict[str, Any]:
    """An environment's tools, by name, as signatures and descriptions."""
    return {
        name: (inspect.signature(tool, eval_str=True), tool.__doc__)
        for name, tool in contract.tools_of(environment).items()
    }


if __name__ == "__main__":
    serve()
