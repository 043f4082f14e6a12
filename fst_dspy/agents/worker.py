"""The process of an environment: asked over its standard input, answers over its standard output.

It imports neither DSPy nor torch, so that it starts as fast as the environment itself does.
"""

from __future__ import annotations

import inspect
import os
import struct
import sys
from typing import IO, Any

import cloudpickle

from fst_dspy.agents import contract
from fst_dspy.errors import LOST

ATTRIBUTES = ("done", "reward", "feedback")
"""Attributes of an environment that are sent with each answer."""
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
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What an environment prints is not to get between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    environment: Any = None
    while True:
        try:
            what, arguments, more = receive(questions)
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if what == "make":
                environment = more[0]()
                value: Any = _shape(environment)
            elif what == "close":
                contract.close(environment)
                environment = value = None
            elif what == "reset":
                value = contract.reset(environment, arguments)
            elif what == "final_reward":
                value = contract.final_reward(environment)
            elif what == "get":
                value = (hasattr(environment, more[0]), getattr(environment, more[0], None))
            else:
                value = contract.finished(getattr(environment, more[0])(**arguments))
            send(answers, ("returned", value, _attributes(environment)))
        except Exception as error:
            kind = "lost" if isinstance(error, LOST) else "raised"
            send(answers, (kind, contract.said_of(error), _attributes(environment)))


def _read(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return data


def _attributes(environment: Any) -> dict[str, Any]:
    found = {name: getattr(environment, name, None) for name in ATTRIBUTES}
    return {name: None if callable(value) else value for name, value in found.items()}


def _shape(environment: Any) -> dict[str, Any]:
    """An environment's tools, by name, as signatures and descriptions."""
    return {
        name: (inspect.signature(tool, eval_str=True), tool.__doc__)
        for name, tool in contract.tools_of(environment).items()
    }


if __name__ == "__main__":
    serve()
