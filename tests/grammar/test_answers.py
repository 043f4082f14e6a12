"""Whatever the grammar of a signature lets through, the adapter reads."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import ipaddress
import logging
import pathlib
import re
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, Any, Literal, Optional

import dspy
import pydantic
import pytest
from dspy.utils.exceptions import AdapterParseError
from held_answers import drawn_answer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_model

from fst_dspy.grammar.answers import grammar_of_answer, grammar_of_json_schema
from fst_dspy.grammar.limits import steps_below_zero
from fst_dspy.grammar.values import json_piece
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.model.policy import Policy
from fst_dspy.model.sampling import vocabulary
from fst_dspy.types import Grammar

ADAPTERS = [dspy.ChatAdapter(), dspy.XMLAdapter(), dspy.JSONAdapter()]


class Desk(enum.Enum):
    """Values that XML has to escape."""

    GOLD = "gold & silver"
    SAND = "<sand>"


class Color(enum.StrEnum):
    """Whose values are texts."""

    RED = "red"
    BLUE = "blue"


class Level(enum.Enum):
    """Of which DSPy reads the names in text, and the values in JSON."""

    ONE = 1
    TWO = 2


class Person(pydantic.BaseModel):
    """Constraints, defaults, a date and a list."""

    name: str
    age: int = pydantic.Field(ge=0, le=120)
    born: datetime.date
    nicknames: list[str] = []
    desk: Literal["a", "b"] | None = None


class Place(enum.Enum):
    """Values that no text is read as; their names are."""

    HERE = (1, 2)
    THERE = (3, 4)


class Parcel(pydantic.BaseModel):
    """Types that JSON schema calls texts, each of which is read from few."""

    number: uuid.UUID
    price: decimal.Decimal
    paid: decimal.Decimal = pydantic.Field(ge=0, le=10)
    on_the_way: datetime.timedelta
    site: pydantic.HttpUrl
    code: str = pydantic.Field(min_length=2, max_length=4)


class Node(pydantic.BaseModel):
    """A model within itself."""

    value: int
    children: list[Node] = []


class Folder(pydantic.BaseModel):
    """Another, within a dict."""

    size: int
    inside: dict[str, Folder] = {}


class Named(pydantic.BaseModel):
    """Read by its fields' names, which DSPy writes, and by their aliases, which it does not."""

    model_config = pydantic.ConfigDict(populate_by_name=True)
    first: int = pydantic.Field(alias="firstName")


class Aliased(pydantic.BaseModel):
    """Written by its aliases, with a model in it that is written by its names."""

    model_config = pydantic.ConfigDict(validate_by_name=True, serialize_by_alias=True)
    last: int = pydantic.Field(alias="lastName")
    named: Named


class Cat(pydantic.BaseModel):
    """One of two animals."""

    lives: int


class Dog(pydantic.BaseModel):
    """The other, with a list."""

    tricks: list[str]


DAY, NEW_YEAR = datetime.date(2024, 2, 29), datetime.date(2024, 1, 1)


class Trip(pydantic.BaseModel):
    """A date within bounds, within a model."""

    left: datetime.date = pydantic.Field(ge=DAY)


class Event(pydantic.BaseModel):
    """A union within a model."""

    who: int | str
    note: str | None = None


@dataclasses.dataclass
class Size:
    """What DSPy writes as JSON in all three formats."""

    width: int
    label: Literal["a<b", "c"] = "c"


class Letter(pydantic.BaseModel):
    """One of what is told apart by a tag, which has a default."""

    kind: Literal["letter"] = "letter"
    pages: int


class Box(pydantic.BaseModel):
    """The other, which may hold both."""

    kind: Literal["box"] = "box"
    inside: Mail


Mail = Annotated[Letter | Box, pydantic.Field(discriminator="kind")]
Box.model_rebuild()


class Post(pydantic.BaseModel):
    """A union by a tag, none of which holds another."""

    sent: Annotated[Letter | Returned, pydantic.Field(discriminator="kind")]


class Returned(pydantic.BaseModel):
    """One that came back."""

    kind: Literal["returned", "lost"] = "lost"
    why: Literal["a", "b"]


Post.model_rebuild()


class Rank(enum.IntEnum):
    """Of which pydantic reads the numbers from text as well."""

    LOW = 1
    HIGH = 2


class Nothing(pydantic.BaseModel):
    """Without a field."""


TYPES: dict[str, Any] = {
    "literal": Literal["a", "b c", "d"],
    "numbers": Literal[1, 2, 30],
    "enum": Desk,
    "numbered": Level,
    "bool": bool,
    "int": int,
    "float": float,
    "date": datetime.date,
    "datetime": datetime.datetime,
    "time": datetime.time,
    "ints": list[int],
    "texts": list[str],
    "dates": list[datetime.date],
    "dict": dict[str, int],
    "keyed": dict[int, str],
    "chosen": dict[Literal["x", "y"], bool],
    "optional": Optional[int],  # noqa: UP045 - both ways to write it
    "choice": Literal["x", "y"] | None,
    "day": datetime.date | None,
    "model": Person,
    "models": list[Person],
    "maybe": Person | None,
    "tree": Node,
    "folder": Folder,
    "folders": list[Folder],
    "named": Named,
    "aliased": Aliased,
    "set": set[int],
    "place": Place,
    "parcel": Parcel,
    "span": datetime.timedelta,
    "by desk": dict[Color, int],
    "by day": dict[datetime.date, bool],
    "pair": tuple[int, str],
    "listed": list[Literal[1, 2]],
    "reasoning": dspy.Reasoning,
    "code": dspy.Code["python"],
    "maybe code": dspy.Code | None,
    "thought": dspy.Reasoning | None,
    "number or text": int | str,
    "uuid": uuid.UUID,
    "address": pydantic.HttpUrl,
    "addresses": dict[pydantic.HttpUrl, uuid.UUID] | None,
    "animal": Cat | Dog,
    "event": Event,
    "mixed": list[int | str],
    "some": list[Cat | int],
    "odd keys": dict[Literal["R&D", 'a "b"', "x"], int],
    "list or text": list[int] | str,
    "versioned": dict[pydantic.UUID4, ipaddress.IPv6Address],
    "price": decimal.Decimal,
    "size": Size,
    "bag": set[str],
    "mixed bag": set,
    "anything": list,
    "pairs": list[tuple[str, float]],
    "hosts": tuple[pydantic.IPvAnyAddress, ...],
    "post": Post,
    "mail": Box,
    "file": pathlib.Path,
    "no file": pathlib.Path | None,
    "raw": bytes,
    "short": Optional[Annotated[str, pydantic.Field(max_length=4)]],  # noqa: UP045
    "cat or text": Cat | str,
    "any": Any,
    "ratio": fractions.Fraction,
    "imaginary": complex,
    "ranks": dict[Rank, list[Rank]],
    "nothing": Nothing,
}
"""Types that answers can be held to, in all three formats."""
SELDOM_ENDED = ("code", "maybe code", "thought", "any")
"""Texts."""
ONLY_TEXT = {"XMLAdapter": {"tree", "place", "listed", "mail"}}
"""Of those that DSPy cannot read in an adapter's format, though it may write them so."""


def signature_of(**types: Any) -> type[dspy.Signature]:
    fields: dict[str, Any] = {"question": (str, dspy.InputField())}
    short = {"max_length": 12}
    for name, kind in types.items():
        text = kind in (str, dspy.Reasoning)
        fields[name] = (kind, dspy.OutputField(**short) if text else dspy.OutputField())
    return dspy.Signature(fields)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return Policy.load(save_model(tmp_path_factory.mktemp("answers") / "tiny-llama", "llama"))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_answers_of_every_type_are_read(adapter: Any, kind: str, policy: Policy) -> None:
    if kind in ONLY_TEXT.get(type(adapter).__name__, ()):
        pytest.skip("DSPy does not read it")
    signature = signature_of(first=TYPES[kind], last=str)
    text = grammar_of_answer(adapter, signature)
    assert text is not None
    answers = [drawn_answer(policy, Grammar(text), seed) for seed in range(8)]
    whole = [answer for answer in answers if answer is not None]
    assert len(whole) >= (kind not in SELDOM_ENDED)
    for answer in whole:
        assert adapter.parse(signature, answer).keys() == {"first", "last"}


@settings(max_examples=8)
@given(
    kinds=st.lists(st.sampled_from(sorted(TYPES)), min_size=1, max_size=3, unique=True),
    adapter=st.sampled_from(ADAPTERS),
    reasons=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_random_model_under_the_mask_always_parses(
    policy: Policy, kinds: list[str], adapter: Any, reasons: bool, seed: int
) -> None:
    kinds = [k for k in kinds if k not in ONLY_TEXT.get(type(adapter).__name__, ())]
    fields = {f"f_{kind.replace(' ', '_')}": TYPES[kind] for kind in kinds}
    types = ({"reasoning": str} if reasons else {}) | fields
    if not types:
        return
    signature = signature_of(**types)
    text = grammar_of_answer(adapter, signature)
    assert text is not None
    prompt = tuple(policy.tokenizer.encode("where does it go?", add_special_tokens=False))
    requests = [
        GenerationRequest(prompt, 300, seed=seed + n, grammar=Grammar(text)) for n in range(3)
    ]
    for result in generate(policy, requests):
        if result.finish_reason == "stop":
            assert adapter.parse(signature, result.text).keys() == types.keys()


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_an_answer_is_written_as_the_adapter_writes_a_demo(adapter: Any, policy: Policy) -> None:
    """So that demos, which the model sees, and what it is held to do not contradict each other."""
    values = {
        "reasoning": "Since 3 < 4.",
        "desk": "b c",
        "count": 12,
        "share": 0.5,
        "sure": True,
        "tags": ["one", "two"],
        "scores": {"a": 1},
        "who": Person(name="A", age=3, born=datetime.date(2020, 2, 29), nicknames=["x"], desk="a"),
    }
    kinds: dict[str, Any] = {
        "reasoning": str,
        "desk": Literal["a", "b c"],
        "count": int,
        "share": float,
        "sure": bool,
        "tags": list[str],
        "scores": dict[str, int],
        "who": Person,
    }
    if isinstance(adapter, dspy.XMLAdapter):
        del values["scores"], kinds["scores"]  # a key as a tag: no grammar can close what it opened
    signature = dspy.Signature(
        {"question": (str, dspy.InputField())}
        | {name: (kind, dspy.OutputField()) for name, kind in kinds.items()}
    )
    text = grammar_of_answer(adapter, signature)
    assert text is not None
    written = adapter.format_assistant_message_content(signature, values).rstrip()
    matcher = vocabulary(policy).matcher(text)
    ids = policy.tokenizer.encode(written, add_special_tokens=False)
    taken = matcher.try_consume_tokens(ids)
    assert taken == len(ids), policy.tokenizer.decode(ids[:taken])
    assert matcher.is_accepting()


@pytest.mark.parametrize(
    "text",
    [
        "[[ ## answer ## ]]\nyes",  # without what comes first
        "[[ ## reasoning ## ]]\nso\n\n[[ ## answer ## ]]\nmaybe\n\n[[ ## completed ## ]]",
        "[[ ## reasoning ## ]]\n[[ ## so ## ]]\n\n[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]",
        "[[ ## reasoning ## ]]\nso\n\n[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]\nmore",
    ],
)
def test_other_answers_are_not_let_through(text: str, policy: Policy) -> None:
    signature = dspy.Signature("question -> reasoning, answer: Literal['yes', 'no']")
    grammar = grammar_of_answer(dspy.ChatAdapter(), signature)
    assert grammar is not None
    matcher = vocabulary(policy).matcher(grammar)
    ids = policy.tokenizer.encode(text, add_special_tokens=False)
    assert matcher.try_consume_tokens(ids) < len(ids)


def test_constraints_of_a_field_hold(policy: Policy) -> None:
    class Constrained(dspy.Signature):
        question: str = dspy.InputField()
        code: str = dspy.OutputField(pattern=r"^[A-Z]{3}-[0-9]+$", max_length=8)
        share: int = dspy.OutputField(ge=3, le=12)

    for adapter in ADAPTERS:
        text = grammar_of_answer(adapter, Constrained)
        assert text is not None
        for seed in range(6):
            answer = drawn_answer(policy, Grammar(text), seed)
            assert answer is not None
            read = adapter.parse(Constrained, answer)
            assert re.fullmatch(r"[A-Z]{3}-[0-9]+", read["code"]) and len(read["code"]) <= 8
            assert 3 <= read["share"] <= 12


def is_let_through(policy: Policy, adapter: Any, kind: Any, value: Any, **constraints: Any) -> bool:
    """Whether an answer may be what the adapter writes for a value."""
    field = dspy.OutputField(**constraints)
    signature = dspy.Signature({"question": (str, dspy.InputField()), "first": (kind, field)})
    text = grammar_of_answer(adapter, signature)
    assert text is not None
    written = adapter.format_assistant_message_content(signature, {"first": value}).rstrip()
    return takes(policy, text, written)


def takes(policy: Policy, text: str, written: str) -> bool:
    ids = policy.tokenizer.encode(written, add_special_tokens=False)
    matcher = vocabulary(policy).matcher(text)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize(
    ("kind", "constraints", "good", "bad"),
    [
        (Optional[int], {"ge": 1, "le": 5}, [5, None], [99, 0]),  # noqa: UP045
        (float | None, {"ge": 0, "le": 1}, [0.5, None], [7.5]),
        (list[int] | None, {"max_length": 1}, [[3]], [[1, 2, 3]]),
        (bool | int, {"le": 5}, [5, True], [6]),
        (int | bool, {"pattern": "^a$"}, [5, True], []),  # neither can have it
        (datetime.date, {"ge": DAY, "lt": datetime.date(2024, 5, 1)}, [DAY], [NEW_YEAR]),
        (datetime.date | None, {"ge": DAY}, [DAY, None], [NEW_YEAR]),
        (Trip, {}, [Trip(left=DAY)], [Trip.model_construct(left=NEW_YEAR)]),
        (str, {"pattern": r"^\d+\$"}, ["5$ each"], ["5"]),
        (str, {"pattern": "(?i)^ab$"}, ["aB"], ["aBc"]),
        (Optional[Annotated[str, pydantic.Field(pattern="^[a-c]+$")]], {}, ["ab", None], ["d"]),  # noqa: UP045
    ],
)
def test_constraints_hold_for_a_type_and_its_parts(
    policy: Policy, adapter: Any, kind: Any, constraints: Any, good: list[Any], bad: list[Any]
) -> None:
    for value in (*good, *bad):
        held = is_let_through(policy, adapter, kind, value, **constraints)
        assert held == (value in good), value


class Price(pydantic.BaseModel):
    """Decimals within bounds, which are decimals as well, and of so many digits."""

    amount: Annotated[
        decimal.Decimal, pydantic.Field(gt=decimal.Decimal("0.5"), max_digits=4, decimal_places=2)
    ]
    share: Annotated[decimal.Decimal, pydantic.Field(max_digits=2, decimal_places=2)]
    size: Annotated[decimal.Decimal, pydantic.Field(max_digits=3)]
    left: Annotated[decimal.Decimal, pydantic.Field(lt=2, max_digits=3)]


PRICE = {"amount": "12.34", "share": '"0.25"', "size": '"1.25"', "left": "-0.25"}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("amount", ["0.51", "99.99", "7"], ["0.5", "100", "1.234"]),
        ("share", ['"0.2"', '"-0.25"'], ['"1.5"', '"0"', '"0.125"']),
        ("size", ['"125"', '"12.5"', '"0.125"'], ['"1250"', '"12.25"', '"0.1255"']),
        ("left", ["-125", "1.25"], ["2.5", "-12.25", "-1250"]),
    ],
)
def test_decimals_have_as_many_digits_as_they_may(
    policy: Policy, name: str, good: list[str], bad: list[str]
) -> None:
    signature = signature_of(first=Price)
    text = grammar_of_answer(dspy.ChatAdapter(), signature)
    assert text is not None
    for value in (*good, *bad):
        price = ", ".join(f'"{key}": {said}' for key, said in {**PRICE, name: value}.items())
        written = f"[[ ## first ## ]]\n{{{price}}}\n\n[[ ## completed ## ]]"
        with nullcontext() if value in good else pytest.raises(AdapterParseError):
            dspy.ChatAdapter().parse(signature, written)
        if value in good or steps_below_zero():
            assert takes(policy, text, written) == (value in good), value


@pytest.mark.parametrize("newer", [False, True])
def test_steps_are_left_out_where_they_would_keep_numbers_above_0(
    newer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fst_dspy.grammar.values.steps_below_zero", lambda: newer)
    for bounds, kept in (({}, newer), ({"exclusiveMinimum": -1}, newer), ({"minimum": 0}, True)):
        piece = json_piece({"items": {"type": "number", "multipleOf": 0.5, **bounds}}, {})
        assert piece is not None and ("multipleOf" in piece) == kept, bounds


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int | str, "abc"),
        (float | str, "n/a"),
        (Event, Event(who="bob")),
        (Event, Event(who=3, note="x")),
        (list[int | str], ["a", "b"]),
        (dict[Literal["x y"], int | str], {"x y": "b"}),
        (list[int] | str, "abc"),
        (list[Cat | int], [Cat(lives=1), 3]),
        (dict[Literal["R&D", "<c>"], int], {"R&D": 3, "<c>": 4}),
        (dict[Literal["R&D"], list[int]], {"R&D": []}),
        (list[str], []),
        (Person | None, Person(name="A", age=3, born=datetime.date(2020, 2, 29))),
        (Folder, Folder(size=1, inside={"a b": Folder(size=2, inside={"&": Folder(size=3)})})),
    ],
)
def test_xml_takes_each_type_of_a_union_and_any_key(policy: Policy, kind: Any, value: Any) -> None:
    assert is_let_through(policy, dspy.XMLAdapter(), kind, value)


def test_a_dict_in_xml_has_as_many_entries_as_it_may(policy: Policy) -> None:
    field = dspy.OutputField(min_length=1, max_length=2)
    signature = dspy.Signature({"q": (str, dspy.InputField()), "x": (dict[str, int], field)})
    text = grammar_of_answer(dspy.XMLAdapter(), signature)
    assert text is not None
    entries = [f'<entry key="{key}">1</entry>' for key in "abc"]
    held = [takes(policy, text, f"<x>{''.join(entries[:count])}</x>") for count in range(4)]
    assert held == [False, True, True, False]


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        (pydantic.Field(pattern="^[a-z]+$"), "ab", "a1"),
        (pydantic.Field(pattern="b"), "abc", "ac"),
        (pydantic.Field(max_length=2), "ab", "abc"),
        (pydantic.Field(pattern=r"\bab"), "ab", None),  # not known: any
    ],
)
def test_keys_keep_to_their_constraints(
    policy: Policy, key: Any, good: str, bad: str | None
) -> None:
    kind = dict[Annotated[str, key], int]
    for adapter in (dspy.ChatAdapter(), dspy.JSONAdapter()):
        assert is_let_through(policy, adapter, kind, {good: 1})
        assert bad is None or not is_let_through(policy, adapter, kind, {bad: 1})
    text = grammar_of_answer(dspy.XMLAdapter(), signature_of(x=kind))
    assert text is not None
    for written in filter(None, (good, bad)):
        held = takes(policy, text, f'<x><entry key="{written}">1</entry></x>')
        assert held == (written == good)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Cat | Dog, Cat(lives=9)),
        (Cat | Dog, Dog(tricks=["sit", "a > b", "[[1]]"])),
        (set[str], {"a"}),
        (tuple[int, ...], ()),
        (tuple[str, Size], ("x", Size(3))),
        (Size, Size(3)),
        (dict, {"a": [1, None, {"b": "c"}]}),
        (Sequence[int], [1]),
        (int | list[int], 3),
        (int | list[int], [3]),
    ],
    ids=repr,
)
def test_what_xml_does_not_nest_is_json_in_it(policy: Policy, kind: Any, value: Any) -> None:
    """So DSPy asks for it in the prompt, and writes it in demos."""
    assert is_let_through(policy, dspy.XMLAdapter(), kind, value)


def test_json_in_xml_is_escaped(policy: Policy) -> None:
    text = grammar_of_answer(dspy.XMLAdapter(), signature_of(first=set[str]))
    assert text is not None
    held = {said: takes(policy, text, f'<first>\n["{said}"]\n</first>') for said in _IN_XML}
    assert held == _IN_XML
    read = dspy.XMLAdapter().parse(signature_of(first=set[str]), '<first>["&amp;&lt;"]</first>')
    assert read["first"] == {"&<"}


_IN_XML = {"a": True, "&amp;&lt;": True, "<": False, "&": False, "&quot;": False, "]]>": False}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Person | None, None),
        (list[tuple[str, float]], [("a", 1.5)]),
        (pydantic.UUID4, uuid.UUID("12345678-1234-4234-8234-123456789012")),
        (ipaddress.IPv6Address, ipaddress.IPv6Address("fe80::1")),
        (list[Annotated[str, {"what": "a note that has no hash"}]], ["a"]),
        (ipaddress.IPv4Interface, ipaddress.IPv4Interface("10.0.0.1/24")),
        (Annotated[decimal.Decimal, pydantic.Field(max_digits=5, decimal_places=2)], "1.50"),
        (decimal.Decimal, decimal.Decimal("1.50")),
        (list[Named], [Named(first=1)]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_what_dspy_writes_is_let_through(
    policy: Policy, adapter: Any, kind: Any, value: Any
) -> None:
    assert is_let_through(policy, adapter, kind, value)


_lines = st.builds(
    lambda *parts: "".join(parts).strip(),
    st.sampled_from(("a", "É", "/", "./b", "20 b", "true")),
    st.text("aZ09 ._-,'()/é#:%true", max_size=8),
)
_zones = st.sampled_from((None, datetime.UTC, datetime.timezone(datetime.timedelta(hours=2))))
_YEARS = datetime.timedelta(days=9999)
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    float: st.floats(1e-99, 1e99) | st.floats(-1e6, -1e-6),
    complex: st.builds(complex, st.floats(-99, 99, width=16), st.floats(-99, 99, width=16)),
    fractions.Fraction: st.fractions(max_denominator=10**9),
    decimal.Decimal: st.decimals(-(10**9), 10**9, places=3),
    datetime.time: st.times(timezones=_zones),
    datetime.datetime: st.datetimes(timezones=_zones),
    datetime.timedelta: st.timedeltas(-_YEARS, _YEARS),
    uuid.UUID: st.uuids(),
    ipaddress.IPv4Address: st.ip_addresses(v=4),
    ipaddress.IPv6Address: st.ip_addresses(v=6),
    pathlib.Path: _lines.map(pathlib.Path),
    int | str: st.integers(-(10**9), 10**9) | _lines,
    Cat | str: st.builds(Cat, lives=st.integers(0, 9)) | _lines,
    Optional[Annotated[str, pydantic.Field(max_length=4)]]: st.none() | _lines,  # noqa: UP045
    Any: st.integers(-(10**9), 10**9) | st.lists(st.booleans()) | st.just({"a": None}),
    Rank: st.sampled_from(Rank),
    list[Rank]: st.lists(st.sampled_from(Rank)),
    dict[Rank, float]: st.fixed_dictionaries({Rank.LOW: st.floats(-9, 9, width=16)}),
}
_written_types = st.sampled_from([(kind, adapter) for kind in VALUES for adapter in ADAPTERS])


@functools.cache
def _answer_of(adapter: Any, kind: Any) -> tuple[Any, str | None]:
    signature = dspy.Signature(
        {"question": (str, dspy.InputField()), "first": (kind, dspy.OutputField())}
    )
    return signature, grammar_of_answer(adapter, signature)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_dspy_writes_and_reads_again_is_let_through(policy: Policy, data: Any) -> None:
    kind, adapter = data.draw(_written_types)
    value = data.draw(VALUES[kind])
    signature, text = _answer_of(adapter, kind)
    written = adapter.format_assistant_message_content(signature, {"first": value}).rstrip()
    try:
        read = adapter.parse(signature, written)["first"]
    except Exception:  # AdapterParseError, and what DSPy trips over
        return
    if read == value:
        assert text is not None and takes(policy, text, written)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize(
    "value",
    [
        uuid.UUID("12345678-1234-1234-1234-123456789012"),
        datetime.timedelta(days=1, hours=2),
        *map(
            pydantic.HttpUrl,
            (
                "https://a.com",
                "https://www.youtube.com/watch?v=abc#t=1",
                "http://localhost:8000/x/",
                "http://127.0.0.1/",
                "https://en.wikipedia.org/wiki/Foo_(bar)",
                "https://GitHub.com/Foo/bar%20baz",
            ),
        ),
    ],
    ids=str,
)
def test_texts_with_a_form_are_written_as_the_adapter_writes_them(
    policy: Policy, adapter: Any, value: Any
) -> None:
    assert is_let_through(policy, adapter, type(value), value)


def test_an_address_with_an_ampersand_is_escaped_in_xml(policy: Policy) -> None:
    signature = signature_of(first=pydantic.HttpUrl)
    text = grammar_of_answer(dspy.XMLAdapter(), signature)
    assert text is not None
    assert takes(policy, text, "<first>\nhttps://a.com/?a=1&amp;b=2\n</first>")
    assert not takes(policy, text, "<first>\nhttps://a.com/?a=1&b=2\n</first>")


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_code_that_may_be_none_is_any_code(
    adapter: Any, policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    """DSPy looks for JSON in it first: with brackets it can stand in an object, in XML anywhere."""
    signature = dspy.Signature(
        {"q": (str, dspy.InputField()), "x": (dspy.Code | None, dspy.OutputField())}
    )
    text = grammar_of_answer(adapter, signature)
    assert text is not None and not caplog.records
    code = "def f():\n    return [{1: 2}]"
    in_xml = isinstance(adapter, dspy.XMLAdapter)
    for value, read in ((code if in_xml else {"code": code}, code), ("a(1)", "a(1)"), (None, None)):
        written = adapter.format_assistant_message_content(signature, {"x": value}).rstrip()
        assert takes(policy, text, written), written
        if not (in_xml and value is None):  # DSPy writes a text for it there
            assert getattr(adapter.parse(signature, written)["x"], "code", None) == read


def test_a_union_that_xml_cannot_say_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        grammar_of_answer(dspy.XMLAdapter(), signature_of(first=list[Cat | Dog]))
    assert "free text" in caplog.text


def test_a_type_without_a_grammar_is_free_text_within_the_markers(policy: Policy) -> None:
    signature = signature_of(first=list[Literal[1, 2]], last=bool)
    text = grammar_of_answer(dspy.XMLAdapter(), signature)
    assert text is not None
    matcher = vocabulary(policy).matcher(text)
    written = "<first>\nanything at all\n</first>\n\n<last>\nTrue\n</last>"
    assert matcher.consume_tokens(policy.tokenizer.encode(written)) and matcher.is_accepting()


def test_what_is_left_free_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(pydantic.BaseModel):
        numbers: list[Literal[1, 2]]

    with caplog.at_level(logging.WARNING):
        for name in ("one", "two"):
            grammar_of_answer(dspy.XMLAdapter(), signature_of(**{name: Odd}))
            grammar_of_answer(dspy.ChatAdapter(), signature_of(**{name: Odd}))
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
        "answers are not held to Odd, the type of the field 'one', under XMLAdapter"
    ]


def test_a_format_of_texts_that_is_not_known_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for adapter in ADAPTERS:
            grammar_of_answer(adapter, signature_of(first=list[ipaddress.IPv4Network]))
            grammar_of_answer(adapter, signature_of(first=list[bytes]))
    (record,) = caplog.records
    assert "the format 'ipv4network' of the field 'first'" in record.getMessage()


def test_json_takes_each_type_of_an_optional_union_with_texts(policy: Policy) -> None:
    for value in ("a", None, 3, ["b"]):
        assert is_let_through(policy, dspy.JSONAdapter(), str | int | list[str] | None, value)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_fields_may_have_any_name(adapter: Any, policy: Policy) -> None:
    kinds = {"class": bool, "größe": int, "None": Literal["a", "b"], "x_1": str, "x": list[int]}
    signature = signature_of(**kinds)
    text = grammar_of_answer(adapter, signature)
    assert text is not None
    answers = [drawn_answer(policy, Grammar(text), seed) for seed in range(6)]
    read = [adapter.parse(signature, answer) for answer in answers if answer is not None]
    assert read and all(each.keys() == kinds.keys() for each in read)


def test_a_pattern_that_cannot_be_held_to_is_left_out_and_told(
    policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    class Bounded(dspy.Signature):
        question: str = dspy.InputField()
        answer: str = dspy.OutputField(pattern=r"^\bab", max_length=6)

    text = grammar_of_answer(dspy.ChatAdapter(), Bounded)
    assert text is not None
    answer = drawn_answer(policy, Grammar(text), 0)
    assert answer is not None
    assert len(dspy.ChatAdapter().parse(Bounded, answer)["answer"]) <= 6
    assert "not held to the pattern '^\\\\bab' of the field 'answer'" in caplog.text


class Compact(dspy.ChatAdapter):
    """A user's own, with other markers."""

    def format_assistant_message_content(
        self, signature: Any, outputs: Any, missing_field_message: Any = None
    ) -> str:
        return "\n".join(f"{name}: {outputs[name]}" for name in signature.output_fields)


def test_subclasses_are_held_to_their_own_markers(policy: Policy) -> None:
    signature = dspy.Signature("message -> why: str, desk: Literal['silver', 'gold']")
    text = grammar_of_answer(Compact(), signature)
    assert text is not None
    matcher = vocabulary(policy).matcher(text)
    assert matcher.consume_tokens(policy.tokenizer.encode("why: it is\ndesk: gold"))
    assert matcher.is_stopped() and not matcher.is_error()


def test_adapters_of_other_kinds_have_none(caplog: pytest.LogCaptureFixture) -> None:
    adapter = dspy.TwoStepAdapter(dspy.LM("openai/none"))
    with caplog.at_level(logging.WARNING):
        assert grammar_of_answer(adapter, signature_of(first=str)) is None
    assert not caplog.records


def test_json_schemas_have_grammars(policy: Policy) -> None:
    text = grammar_of_json_schema(Person.model_json_schema())
    assert text is not None
    for seed in range(5):
        answer = drawn_answer(policy, Grammar(text), seed)
        if answer is not None:
            Person.model_validate_json(answer)
    anything = grammar_of_json_schema({})
    assert anything is not None
    matcher = vocabulary(policy).matcher(anything)
    assert matcher.consume_tokens(policy.tokenizer.encode('{"a": [1, null]}'))


def test_the_tag_of_a_union_is_always_there(policy: Policy) -> None:
    """Pydantic has it left out in its schema, and does not read what is without."""
    for adapter in ADAPTERS:
        assert is_let_through(policy, adapter, Post, Post(sent=Returned(why="a")))
    text = grammar_of_json_schema(Box.model_json_schema())
    assert text is not None
    assert takes(policy, text, '{"kind": "box", "inside": {"kind": "letter", "pages": 3}}')
    assert not takes(policy, text, '{"inside": {"pages": 3}}')


def held_text(**lengths: int) -> type[dspy.Signature]:
    fields: dict[str, Any] = {"question": (str, dspy.InputField())}
    fields["first"] = (str, dspy.OutputField(**lengths))
    fields["last"] = (Literal["a", "b"], dspy.OutputField())
    return dspy.Signature(fields)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_lengths_that_are_too_much_to_count_are_left_out_and_told(
    adapter: Any, policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        text = grammar_of_answer(adapter, held_text(max_length=200_000))
    assert text is not None
    assert vocabulary(policy).matcher(text)
    assert "the lengths of str" in caplog.text and "free text" not in caplog.text


def test_what_llguidance_refuses_is_seen_where_the_grammar_is_made(
    policy: Policy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llguidance import LLParserLimits

    import fst_dspy.grammar.answers as answers_module
    import fst_dspy.grammar.limits as limits_module

    signature, adapter = held_text(max_length=2000), dspy.XMLAdapter()
    text = grammar_of_answer(adapter, signature)
    assert text is not None and "2000" in text
    assert vocabulary(policy).matcher(text)
    narrow = LLParserLimits(initial_lexer_fuel=1_000_000)
    monkeypatch.setattr(limits_module, "parser_limits", lambda: narrow)
    monkeypatch.setattr(answers_module, "_told", set())
    with caplog.at_level(logging.WARNING):
        text = grammar_of_answer(adapter, signature)
    assert text is not None and "2000" not in text
    assert "the lengths of str" in caplog.text
