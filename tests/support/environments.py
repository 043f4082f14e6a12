"""Environments for agents, by TRL's contract; importable, so that other processes can make them."""

from __future__ import annotations

import os
import time
from typing import Literal


class Hall:
    """Find the way out: a step in the right direction ends the episode with reward 1."""

    closed = 0

    def reset(self, way: str, **fields: object) -> str:
        self.way, self.done, self.reward, self.feedback = way, False, 0.0, ""
        return "you stand in a hall"

    def go(self, direction: Literal["left", "right", "up"]) -> str:
        """Go in a direction."""
        if direction == "up":
            raise ValueError("there are no stairs")
        self.done = direction == self.way
        self.reward = float(self.done)
        self.feedback = "" if self.done else f"the way out was {self.way}"
        return "you are out" if self.done else "a wall"

    def close(self) -> None:
        Hall.closed += 1


class Fragile:
    """An environment that does what its example says: crashes, hangs, prints, or works."""

    def __init__(self) -> None:
        self.reward = 0.0

    def reset(self, harm: str) -> str:
        self.harm = harm
        return "ready"

    def push(self) -> str:
        """Push the button."""
        if self.harm == "crash":
            os._exit(3)
        if self.harm == "hang":
            time.sleep(3600)
        if self.harm == "slow":
            time.sleep(1.0)
        if self.harm == "print":
            print("noise on the standard output", flush=True)
        if self.harm == "raise":
            raise ValueError("stuck")
        if self.harm == "offline":
            raise ConnectionError("the server is down")
        self.reward = 1.0
        return "done"

    def wait(self) -> str:
        """Wait."""
        return "waited"


class Broken:
    """An environment that cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("no display")

    def reset(self) -> None: ...

    def act(self) -> None: ...
