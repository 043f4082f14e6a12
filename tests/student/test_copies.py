"""What a program and a metric are given is their own, as far as it can be."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import dspy
import numpy as np
import pytest
from pydantic import BaseModel, PrivateAttr

from fst_dspy.student.copies import own_value

Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass
class Cart:
    items: list[str]
    lock: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    items: list[str]


class Model(BaseModel):
    count: int = 1
    items: list[str] = []
    _seen: list[str] = PrivateAttr(default_factory=list)


class Log(list):
    """Of a class of its own, with an attribute."""

    def __init__(self, items: Any = ()) -> None:
        super().__init__(items)
        self.notes: list[str] = []


class Node:
    def __init__(self) -> None:
        self.items: list[str] = []


class Game:
    """The state of a game, whose parts know each other."""

    def __init__(self) -> None:
        self.moves: list[str] = []
        self.me, self.play = self, self.move
        self.nodes = [Node()]
        self.worth = {self.nodes[0]: 1}
        self.board = np.zeros(3)

    def move(self) -> None:
        self.moves.append("one")


class Client:
    """Half a copy of it would use its connections too."""

    def __init__(self) -> None:
        self.connections: list[str] = []
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    "value",
    [
        [["a"]],
        deque([["a"]], maxlen=3),
        Log([["a"]]),
        {"x": {"y": ["a"]}},
        OrderedDict(x=["a"]),
        defaultdict(list, x=["a"]),
        Counter("aab"),
        {1, (2, "b")},
        Pair(["a"], 1),
        (["a"], 1),
        Cart(["a"]),
        Frozen(["a"]),
        Model(items=["a"]),
        dspy.History(messages=[{"question": "a"}]),
        dspy.Example(q=["a"]).with_inputs("q"),
        dspy.Prediction.from_completions([{"x": "1"}, {"x": "2"}]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_copy_is_equal_and_of_the_same_class(value: Any) -> None:
    own = own_value(value)
    assert type(own) is type(value) and own == value and own is not value


def test_whatever_is_written_into_a_copy_stays_in_it() -> None:
    given: dict[str, Any] = {
        "list": ["a"], "deque": deque(["a"]), "log": Log(["a"]), "default": defaultdict(list),
        "cart": Cart(["a"]), "frozen": Frozen(["a"]), "model": Model(items=["a"]),
        "pair": Pair(["a"], 1), "node": Node(),
    }  # fmt: skip
    before = copy.deepcopy(given)
    own = own_value(given)
    for held in (own["list"], own["deque"], own["log"], own["log"].notes, own["default"]["x"]):
        held.append("b")
    for held in (own["cart"], own["frozen"], own["model"], own["node"]):
        held.items.append("b")
    own["model"].count, own["cart"].lock = 2, "b"
    own["model"]._seen.append("b")
    own["pair"].left.append("b")
    assert given.pop("node").items == before.pop("node").items == []
    assert given == before and given["log"].notes == [] and given["model"]._seen == []


def test_what_lies_in_a_value_twice_does_so_in_its_copy() -> None:
    items: list[Any] = ["a"]
    items.append(items)
    own = own_value({"x": items, "y": items})
    assert own["x"] is own["y"] is own["x"][1] is not items
    game = Game()
    twin = own_value(game)
    twin.play()
    assert game.moves == [] and twin.moves == ["one"] and twin.me is twin
    assert twin.nodes[0] is not game.nodes[0] and twin.worth[twin.nodes[0]] == 1


def test_what_cannot_be_copied_is_shared_and_so_is_an_object_that_holds_it() -> None:
    class Large(Node):
        def __init__(self) -> None:
            self.items = ["a"] * 20_000

    class Odd:
        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    class ItsOwn:
        def __init__(self) -> None:
            self.items: list[str] = []

        def __deepcopy__(self, memo: Any) -> Any:
            return self

    client, lock = Client(), threading.Lock()
    holder = Node()
    holder.items = [client]  # type: ignore[list-item]
    shared = [
        client, holder, Large(), Odd(), ItsOwn(), object(), lock, np.zeros(3), len, Node,
        dspy.Predict("question -> answer"), dspy.LM("openai/none"), (item for item in "a"),
    ]  # fmt: skip
    own = own_value(shared)
    assert own is not shared
    assert [type(b) for a, b in zip(own, shared, strict=True) if a is not b] == []
    cart = own_value(Cart(["a"], lock))
    assert cart.lock is lock and cart == Cart(["a"], lock)
    game = Game()
    assert own_value(game).board is game.board


def test_a_class_may_say_how_its_objects_are_copied() -> None:
    class Room:
        def __init__(self, number: int = 0) -> None:
            self.number = number

        def copy_for_rollout(self) -> Room:
            return Room(self.number + 1)

    own = own_value({"room": Room(), "rooms": [Room(5)]})
    assert own["room"].number == 1 and own["rooms"][0].number == 6
