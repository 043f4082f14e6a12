"""How the value of a field is written in an answer: types as pieces of a grammar.

A piece is an expression in llguidance's variant of Lark. Whatever it lets through, DSPy's
``parse_value`` must take for the type; so options (of Literals, enums and bools) are asked of it
one by one, and a type that cannot be written so has no piece and is left as free text.
"""

from __future__ import annotations

import copy
import datetime
import decimal
import enum
import fractions
import inspect
import json
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import dspy
import pydantic
from dspy.adapters.utils import parse_value
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from fst_dspy.grammar import bounds
from fst_dspy.grammar.limits import LONGEST, refusal, steps_below_zero

DIGITS = 300
"""Digits of a number at most: ``int`` takes 4,300, ``float`` is infinite from 309."""
FLOAT_DIGITS = 21
"""Behind the point at most: ``repr`` gives 17 after the zeros, of which there are up to four."""
STEP_DIGITS = 10
"""Of them at most, where a number is also to be within limits: llguidance takes no finer steps."""
EXACT_DIGITS = 15
"""Of a number within limits in front of the point, which are floats there."""

_WHOLE, _BEHIND = rf"(?:0|[1-9][0-9]{{0,{DIGITS}}})", rf"(?:\.[0-9]{{1,{FLOAT_DIGITS}}})?"
_POWER = r"[eE][+\-]?(?:[0-9]{1,2}|[12][0-9]{2}|30[0-7])"
_REAL = rf"(?:{_WHOLE}{_BEHIND}|[0-9]{_BEHIND}{_POWER})"
INT, FLOAT = f"-?{_WHOLE}", f"-?{_REAL}"
_YEAR = r"(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP = (
    r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"  # not 0000
)
DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    rf"|{_LEAP}-02-29)"
)
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
_ZONE = r"(?:Z|[+\-](?:0[0-9]|1[0-3]):[0-5][0-9])"
_SECONDS = r"[0-9]{1,5}(?:\.[0-9]{1,6})?S"
_MINUTES = rf"[0-9]{{1,4}}M(?:{_SECONDS})?"
_DAYS = r"(?:[0-9]{1,4}Y(?:[0-9]{1,6}D)?|[0-9]{1,6}D)"  # pydantic's years have 365 days
_SPAN = rf"T(?:[0-9]{{1,4}}H(?:{_MINUTES}|{_SECONDS})?|{_MINUTES}|{_SECONDS})"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_GROUP = "[0-9a-f]{1,4}"
_IPV6 = (
    rf"(?:{_GROUP}(?::{_GROUP}){{7}}|::(?:{_GROUP}(?::{_GROUP}){{0,6}})?|"
    + "|".join(
        rf"{_GROUP}(?::{_GROUP}){{{left - 1}}}::(?:{_GROUP}(?::{_GROUP}){{0,{6 - left}}})?"
        for left in range(1, 7)
    )
    + ")"
)
_OF_32, _OF_128 = "/(?:[12]?[0-9]|3[0-2])", "/(?:[1-9]?[0-9]|1[01][0-9]|12[0-8])"
_ATOM, _DOMAIN = "[A-Za-z0-9]{1,20}", r"(?:[A-Za-z0-9]{1,20}(?:-[A-Za-z0-9]{1,20})?\.){1,3}"
FORMATS = {
    "date": DATE,
    "time": rf"{_CLOCK}{_ZONE}?",
    "date-time": rf"{DATE}T{_CLOCK}{_ZONE}?",
    "duration": rf"-?P(?:{_DAYS}(?:{_SPAN})?|{_SPAN})",
    "email": rf"{_ATOM}(?:[._+\-]{_ATOM}){{0,2}}@{_DOMAIN}[A-Za-z]{{2,10}}",
    "fraction": rf"{INT}(?:/[1-9][0-9]{{0,{FLOAT_DIGITS}}})?",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "ipvanyaddress": f"(?:{_IPV4}|{_IPV6})",
    "ipv4interface": f"{_IPV4}{_OF_32}",
    "ipv6interface": f"{_IPV6}{_OF_128}",
    "ipvanyinterface": f"(?:{_IPV4}{_OF_32}|{_IPV6}{_OF_128})",
    **{
        f"uuid{version}": rf"[0-9a-f]{{8}}-[0-9a-f]{{4}}-{version}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}"
        r"-[0-9a-f]{12}"
        for version in range(1, 9)
    },
}
"""By the name that JSON schema has for them. Its own patterns would let through February 30,
durations without end and, within XML, any text."""
STANDARD = {**FORMATS, "time": _CLOCK + _ZONE, "date-time": f"{DATE}T{_CLOCK}{_ZONE}"}
"""The same, as JSON schema has them: what pydantic reads without a zone is none of its times."""
ANY_TEXT = frozenset({"binary", "password", "path"})
"""Formats that any text has."""
_LABEL = r"[A-Za-z0-9]{1,20}(?:-[A-Za-z0-9]{1,20}){0,3}"
_HOST = rf"(?:localhost|{_IPV4}|{_LABEL}(?:\.{_LABEL}){{0,4}}\.[A-Za-z]{{2,10}})"
_PORT = r"(?::(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}))?"
_IN_URL = r"(?:[A-Za-z0-9_.~!$'()*+,;=:@&\-]|%[0-9A-Fa-f]{2})"
_URL = (
    rf"://{_HOST}{_PORT}(?:/{_IN_URL}{{0,40}}){{0,9}}"
    rf"(?:\?(?:{_IN_URL}|[/?]){{0,200}})?(?:#(?:{_IN_URL}|[/?]){{0,60}})?"
)
"""Within the 2,083 characters that pydantic takes, also where it escapes some of them."""

_FORMED: Mapping[Any, str] = {
    datetime.date: FORMATS["date"],
    datetime.time: FORMATS["time"],
    datetime.datetime: FORMATS["date-time"],
    fractions.Fraction: FORMATS["fraction"],
}
_ENDS = ("ge", "gt", "le", "lt")
_LIMITS = (*_ENDS, "multiple_of")
STRING = r'"(?:[^"\\\x00-\x1f\x7f]|\\["\\/bfnrt])*"'
"""A string in JSON, without ``\\u``, by which surrogates would come in that are no text."""

_IN_LINE = r'\x00-\x1f\x7f-\x9f\x{2028}\x{2029}\[\]{}"\\'
LINE = rf"(?:[0-9]{{1,9}} )?(?:\.{{0,2}}/|[\p{{L}}_~])(?:[^{_IN_LINE}]*[^{_IN_LINE}\s])?"
"""A line of text that DSPy takes as it is, though it looks for JSON and Python's literals in it."""
NO_LINE = (  # but for these
    r"(?:True|False|None|true|false|null|NaN|Infinity)\s*(?:[,#].*)?|[bBrRuU]{1,2}'.*|set *\(.*"
)

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As ``json.dumps`` writes it."""
INDENTED = {"whitespace_pattern": "\\n {0,24}| "}
"""As it writes it with ``indent=2``, or in one line; whitespace that cannot go on for ever."""

FROM_TEXT = "read from text, too"
"""The comment in a schema of numbers of which texts are read as well."""

Spell = Callable[[str, str], str]
"""A text as the tokenizer spells it (``fst_dspy.grammar.tokens``), and what stands before it."""


def regex(pattern: str) -> str:
    """A terminal in Lark."""
    return "/" + pattern.replace("/", r"\/") + "/"


def literal(text: str) -> str:
    """A string in Lark."""
    return json.dumps(text, ensure_ascii=False)


def escaped(text: str) -> str:
    """A text as a regular expression that matches it alone."""
    marks = r"\.+*?()|[]{}^$"
    return "".join(
        {"\n": r"\n", "\t": r"\t", "\r": r"\r"}.get(c, f"\\{c}" if c in marks else c) for c in text
    )


def is_text(annotation: Any) -> bool:
    """Whether any text is a value of a type."""
    if annotation in (str, Any, object) or is_text_of_dspy(annotation):
        return True
    if get_origin(annotation) is Annotated:
        return is_text(get_args(annotation)[0])
    return _is_union(annotation) and str in get_args(annotation) and _allows_none(annotation)


def is_text_of_dspy(annotation: Any) -> bool:
    """Whether a type is one of DSPy's own that are written as the text that they hold."""
    if annotation is dspy.Reasoning:
        return True
    return inspect.isclass(annotation) and issubclass(annotation, dspy.Code)


def options(
    annotation: Any,
    write: Callable[[Any], list[Any]],
    reads_as: Callable[[Any, Any], bool],
) -> list[Any]:
    """The ways to write each value of a type that has few: the first of each that DSPy takes.

    Args:
        annotation: A Literal, an enum, ``bool`` or ``None``.
        write: A value's spellings, the best one first.
        reads_as: Whether DSPy reads a spelling as a value.

    Returns:
        Empty for other types.
    """
    if annotation is bool:
        values: Sequence[Any] = (True, False)
    elif annotation in (None, type(None)):
        values = (None,)
    elif get_origin(annotation) is Literal:
        values = get_args(annotation)
    elif inspect.isclass(annotation) and issubclass(annotation, enum.Enum):
        values = list(annotation)
    else:
        return []
    found = []
    for value in values:
        found += [text for text in write(value) if reads_as(text, value)][:1]
    return found


def texts_of(value: Any) -> list[Any]:
    """A value's spellings in plain text; of members of enums their names as well."""
    if isinstance(value, enum.Enum):
        return [str(value.value), value.name]
    return [str(value)]


def json_values_of(value: Any) -> list[Any]:
    """A value's spellings in JSON, as they are when they are read again."""
    spellings = [value.value, value.name] if isinstance(value, enum.Enum) else [value]
    try:
        return [json.loads(json.dumps(spelling)) for spelling in spellings]
    except (TypeError, ValueError):  # JSON has nothing for it
        return [value.name] if isinstance(value, enum.Enum) else []


def number(annotation: Any) -> str | None:
    """The pattern of a number's type; ``None`` for other types."""
    if annotation is int:
        return INT
    return FLOAT if annotation in (float, decimal.Decimal) else None


def formed(annotation: Any) -> str | None:
    """The pattern of a date's, time's or fraction's type; ``None`` for other types."""
    return next((_FORMED[kind] for kind in _FORMED if annotation is kind), None)


def members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; of others none."""
    return get_args(annotation) if _is_union(annotation) else ()


def schema_of(annotation: Any, *, by_alias: bool = True) -> dict[str, Any]:
    """The JSON schema of a type, with what DSPy will parse in place of what pydantic describes.

    Raises:
        Exception: pydantic has none for it.
    """
    schema = TypeAdapter(annotation).json_schema(by_alias=by_alias, schema_generator=_Schema)
    return with_own_formats(with_tags(schema))


def schema_of_model(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    """The same of a model that may say itself what its schema is; errors as ``schema_of``."""
    return with_own_formats(with_tags(model.model_json_schema(schema_generator=_Schema)))


def with_tags(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema that requires what tells the models of a union apart.

    Where that has a default it may be left out, by pydantic's schema; but pydantic does not read
    them without.
    """
    own = copy.deepcopy(dict(schema))
    _require_tags(own, own.get("$defs", {}))
    return own


def _require_tags(part: Any, named: Mapping[str, Any]) -> None:
    if isinstance(part, list):
        for item in part:
            _require_tags(item, named)
    if not isinstance(part, dict):
        return
    for item in part.values():
        _require_tags(item, named)
    tag, choices = part.get("discriminator"), part.get("oneOf")
    if not (isinstance(tag, dict) and isinstance(choices, list)):
        return
    name = tag.get("propertyName")
    for choice in choices:
        if not isinstance(choice, dict):
            continue
        own = named.get(choice.get("$ref", "").rsplit("/", 1)[-1], choice)
        if name in own.get("properties", {}):
            own["required"] = list(dict.fromkeys([*own.get("required", []), name]))


def bare_pattern(schema: Mapping[str, Any]) -> str | None:
    """The pattern of a type that is written as a text of its own form, such as a UUID."""
    pattern = str(schema.get("pattern", ""))
    own = schema.keys() == {"type", "pattern"} and pattern.startswith("^(?:")
    return pattern.removeprefix("^(?:").removesuffix(")$") if own else None


def as_text(pattern: str) -> dict[str, Any]:
    """The schema of a type that is written as a text by a pattern, as ``bare_pattern`` knows it."""
    return {"type": "string", "pattern": f"^(?:{pattern})$"}


def whole_pattern(pattern: str) -> str:
    """A constraint's pattern, which may begin and end within a text, for the text as a whole."""
    found = re.fullmatch(r"(?s)((?:\(\?[a-z]+\))?)(\^?)((?:\\.|[^\\])*?)(\$?)", pattern)
    if found is None:
        return pattern  # it ends in a lone backslash, and is none
    flags, begins, inner, ends = found.groups()
    before, after = ("" if anchor else "(?s:.*)" for anchor in (begins, ends))
    return f"{before}(?:{flags}{inner}){after}"


def unheld_patterns(schema: Any) -> list[str]:
    """The patterns within a JSON schema that llguidance cannot hold to."""
    if isinstance(schema, list):
        return [pattern for part in schema for pattern in unheld_patterns(part)]
    if not isinstance(schema, Mapping):
        return []
    own = schema.get("pattern") if schema.get("type") == "string" else None
    found = [own] if isinstance(own, str) and not is_valid(regex(whole_pattern(own))) else []
    return found + [pattern for part in schema.values() for pattern in unheld_patterns(part)]


def unheld_formats(schema: Any) -> set[str]:
    """The formats of texts within a JSON schema that are none of ours, and not any text."""
    if isinstance(schema, list):
        return {kind for part in schema for kind in unheld_formats(part)}
    if not isinstance(schema, Mapping):
        return set()
    found = {kind for part in schema.values() for kind in unheld_formats(part)}
    kind = schema.get("format", schema.get("contentMediaType"))
    return found | {kind} - ANY_TEXT if schema.get("type") == "string" and kind else found


def texts_of_values(schema: Mapping[str, Any], values: Sequence[Any]) -> list[str]:
    """Those of the values of a Literal's or an enum's schema that are read from texts, as texts."""
    numbers = schema.get("$comment") == FROM_TEXT
    return [str(value) for value in values if numbers or isinstance(value, str)]


def json_piece(schema: Mapping[str, Any], layout: Mapping[str, Any]) -> str | None:
    """The piece of a JSON schema; ``None`` where llguidance cannot hold to it."""
    schema = _as_llguidance_reads(schema)
    for lenient in (False, True):  # at worst without the constraints that it does not know
        own = {**layout, "json_allowed_escapes": 'nrbtf\\"', "lenient": lenient}
        piece = f"%json {json.dumps({**schema, 'x-guidance': own})}"
        if is_valid(piece):
            return piece
    return None


def _as_llguidance_reads(part: Any) -> Any:
    """A schema without what llguidance takes in another way.

    Unions do not name their tag, by which it refuses models in models; and numbers that may be
    below 0 need not be multiples where it would let none such through.
    """
    if isinstance(part, list):
        return [_as_llguidance_reads(item) for item in part]
    if not isinstance(part, Mapping):
        return part
    own = {name: _as_llguidance_reads(value) for name, value in part.items()}
    if isinstance(own.get("multipleOf"), int | float) and not steps_below_zero():
        least = max(own.get(name, -math.inf) for name in ("minimum", "exclusiveMinimum"))
        if least < 0:
            del own["multipleOf"]
    if isinstance(own.get("discriminator"), dict) and isinstance(own.get("oneOf"), list):
        del own["discriminator"]
        own["anyOf"] = own.pop("oneOf")  # they are apart, by their tags
    return own


def is_valid(piece: str) -> bool:
    """Whether llguidance takes a piece."""
    return not refusal(f"start: {piece}")


class _Schema(GenerateJsonSchema):
    """JSON schemas of what can be read again from text, where pydantic says less, or more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.takes_aliases = self.by_alias

    def model_schema(self, schema: Any) -> dict[str, Any]:
        return self._as_shown(super().model_schema, schema)

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        return self._as_shown(super().dataclass_schema, schema)

    def typed_dict_schema(self, schema: Any) -> dict[str, Any]:
        return self._as_shown(super().typed_dict_schema, schema)

    def _as_shown(self, make: Callable[[Any], dict[str, Any]], schema: Any) -> dict[str, Any]:
        """By the names of fields where they are read, as demos have them, else by the aliases."""
        config, before = schema.get("config", {}), self.by_alias
        writes_aliases = config.get("serialize_by_alias") and config.get("validate_by_alias", True)
        by_name = config.get("validate_by_name") and not writes_aliases
        self.by_alias = self.takes_aliases and not by_name
        try:
            return make(schema)
        finally:
            self.by_alias = before

    def enum_schema(self, schema: Any) -> dict[str, Any]:
        # Of these, ``IntEnum`` among them, pydantic reads the values from text as well.
        own = super().enum_schema(schema)
        return own | {"$comment": FROM_TEXT} if schema.get("sub_type") in ("int", "float") else own

    def dict_schema(self, schema: Any) -> dict[str, Any]:
        keys = self._keys(schema["keys_schema"]) if "keys_schema" in schema else None
        if keys is None:
            return super().dict_schema(schema)
        values = self.generate_inner(schema["values_schema"]) if "values_schema" in schema else {}
        own: dict[str, Any] = {"type": "object", "additionalProperties": False}
        if isinstance(keys, str):
            return own | {"patternProperties": {f"^(?:{keys})$": values}}
        return own | {"properties": dict.fromkeys(keys, values)}

    def _keys(self, schema: Any) -> str | list[str] | None:
        """What the keys of a dict may be, which are texts: a pattern, or each; ``None`` for all."""
        keys: Any = self.generate_inner(schema)
        if "$ref" in keys:
            keys = self.get_schema_from_definitions(keys["$ref"]) or {}
        values = keys.get("enum", [keys["const"]] if "const" in keys else None)
        if values is not None:
            if texts := texts_of_values(keys, values):
                return texts
            raise ValueError("none of a dict's keys is a text")
        if keys.get("type") == "boolean":
            return ["true", "false"]
        if keys.get("type") in ("integer", "number"):
            return INT if keys["type"] == "integer" else FLOAT
        if keys.get("type") == "string" and keys.keys() & {"pattern", "minLength", "maxLength"}:
            return _text_within(keys)
        return bare_pattern(with_own_formats(keys))

    def set_schema(self, schema: Any) -> dict[str, Any]:
        return _with_hashes(super().set_schema(schema))

    def frozenset_schema(self, schema: Any) -> dict[str, Any]:
        return _with_hashes(super().frozenset_schema(schema))

    def decimal_schema(self, schema: Any) -> dict[str, Any]:
        digits, places = schema.get("max_digits"), schema.get("decimal_places")
        limits = {name: schema[name] for name in _LIMITS if name in schema}
        if not limits:
            return as_text(f"-?(?:{'|'.join(_decimals(digits, places))})")
        if digits is None or places is not None:
            return self._limited_decimal(limits, digits, places)
        counts = range(min(digits, STEP_DIGITS) + 1)
        return {"anyOf": [self._limited_decimal(limits, digits, count) for count in counts]}

    def _limited_decimal(
        self, limits: Mapping[str, Any], digits: int | None, places: int | None
    ) -> dict[str, Any]:
        """Numbers within limits, of so many digits, of which so many are behind the point."""
        own: Any = {"type": "float", **limits}
        if places is not None:
            step = decimal.Decimal(1).scaleb(-min(places, STEP_DIGITS))
            own.setdefault("multiple_of", step)
        if digits is not None and places is not None:
            most = 10 ** min(max(0, digits - places), EXACT_DIGITS)
            own |= {"lt": min(own.get("lt", most), most), "gt": max(own.get("gt", -most), -most)}
        return self.float_schema(own)

    def complex_schema(self, schema: Any) -> dict[str, Any]:
        return as_text(rf"-?(?:{_REAL}[+\-])?{_REAL}j")

    def url_schema(self, schema: Any) -> dict[str, Any]:
        schemes = "|".join(schema.get("allowed_schemes") or ("https", "http"))
        return as_text(f"(?:{schemes}){_URL}")

    def date_schema(self, schema: Any) -> dict[str, Any]:
        if not schema.keys() & {*_ENDS, "now_op"}:
            return super().date_schema(schema)
        least, most = datetime.date.min.toordinal(), datetime.date.max.toordinal()
        least, most = _reached(schema, datetime.date.today().toordinal(), 1, least, most)
        days = bounds.limits(schema, datetime.date.toordinal, 1, least, most)
        return as_text(bounds.dates(*map(datetime.date.fromordinal, days)))

    def time_schema(self, schema: Any) -> dict[str, Any]:
        if not schema.keys() & {*_ENDS}:
            return super().time_schema(schema)
        last = bounds.DAY - 1
        return as_text(bounds.clocks(*bounds.limits(schema, bounds.exact, bounds.SECOND, 0, last)))

    def datetime_schema(self, schema: Any) -> dict[str, Any]:
        zone = {"aware": _ZONE, "naive": ""}.get(schema.get("tz_constraint"), f"{_ZONE}?")
        ends = [schema[name] for name in _ENDS if name in schema]
        if not ends and "now_op" not in schema:
            return as_text(f"{DATE}T{_CLOCK}{zone}")
        if ends:  # in the bounds' own zone, or in none as they are
            zone = "Z" if zone == _ZONE or any(end.tzinfo for end in ends) else ""
        least, most = (bounds.exact(t) // bounds.SECOND for t in _FIRST_AND_LAST)
        now = bounds.exact(datetime.datetime.now(datetime.UTC)) // bounds.SECOND
        least, most = _reached(schema, now, bounds.DAY, least, most)
        seconds = bounds.limits(schema, bounds.exact, bounds.SECOND, least, most)
        return as_text(bounds.date_times(*seconds) + zone)

    def timedelta_schema(self, schema: Any) -> dict[str, Any]:
        if not schema.keys() & {*_ENDS}:
            return super().timedelta_schema(schema)
        most = 10**9 - 1  # nine digits are what pydantic reads
        return as_text(
            bounds.durations(*bounds.limits(schema, bounds.exact, bounds.SECOND, -most, most))
        )


def _decimals(digits: int | None, places: int | None) -> list[str]:
    """The patterns of numbers without a sign, of so many digits, and so many behind the point."""
    if digits is None:
        places = FLOAT_DIGITS if places is None else places
        digits = DIGITS + places
    if places is None:
        counts = range(1, min(digits, FLOAT_DIGITS) + 1)
        return [_whole(digits), *(rf"{_whole(digits - n)}\.[0-9]{{{n}}}" for n in counts)]
    behind = rf"\.[0-9]{{1,{min(digits, places)}}}" if places else ""
    # pydantic counts a 0 in front of a point as no digit, and one by itself as one.
    return [_whole(digits - places) + (f"(?:{behind})?" if digits > places else behind)]


def _whole(digits: int) -> str:
    return f"(?:0|[1-9][0-9]{{0,{digits - 1}}})" if digits > 0 else "0"


def _with_hashes(schema: dict[str, Any]) -> dict[str, Any]:
    """A set's schema; where it may hold anything, no lists and objects, which no set can hold."""
    anything = {"anyOf": [{"type": ["null", "boolean", "number"]}, {"type": "string"}]}
    return schema if schema.get("items") else {**schema, "items": anything}


_FIRST_AND_LAST = (datetime.datetime.min, datetime.datetime.max)


def _text_within(schema: Mapping[str, Any]) -> str:
    """The pattern of a text with a pattern, or else with lengths; of any where it is not known."""
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    given = schema.get("pattern")
    pattern = f"(?s:.{{{least},{most}}})" if given is None else whole_pattern(given)
    return pattern if is_valid(regex(pattern)) else "(?s:.*)"


def _reached(
    schema: Mapping[str, Any], now: int, day: int, least: int, most: int
) -> tuple[int, int]:
    """What is left of a time where it must be past, or to come: by a day, wherever the clock is."""
    when = schema.get("now_op")
    return (now + day if when == "future" else least, now - day if when == "past" else most)


def with_own_formats(part: Any, formats: Mapping[str, str] = FORMATS) -> Any:
    """A schema that JSON can hold, with patterns in place of the formats that there are any for."""
    if isinstance(part, list):
        return [with_own_formats(item, formats) for item in part]
    if isinstance(part, decimal.Decimal):  # a bound, of numbers of any type
        return int(part) if part == int(part) else float(part)
    if not isinstance(part, dict):
        return part
    own = {name: with_own_formats(value, formats) for name, value in part.items()}
    named = own.get("type") == "string" and isinstance(own.get("format"), str)
    if named and own["format"] in formats and "pattern" not in own:
        own["pattern"] = f"^(?:{formats[own.pop('format')]})$"
    return own


def reads_as(text: Any, annotation: Any, value: Any) -> bool:
    """Whether DSPy takes a text, or what JSON holds, for a value of a type."""
    try:
        return bool(parse_value(text, annotation) == value)
    except Exception:
        return False


def length_bodies(least: int, most: int | None) -> list[str]:
    """Texts of some length, after the white space around them is taken off, as expressions."""
    bodies = [f"(?s:.{{0,{most}}})"] if most is not None else []
    if least == 1:
        bodies.append(r"(?s:.*\S.*)")
    elif least:
        bodies.append(rf"(?s:\s*\S.{{{least - 2},}}\S\s*)")
    return bodies


def bodies_of(schema: Mapping[str, Any]) -> list[str]:
    """What a text's schema makes of it, as regular expressions that all hold, as far as it can."""
    lengths = (schema.get(name) for name in ("minLength", "maxLength"))
    least, most = (length if (length or 0) <= LONGEST else None for length in lengths)
    pattern = schema.get("pattern")
    bodies = length_bodies(least or 0, most) + ([whole_pattern(pattern)] if pattern else [])
    return [body for body in bodies if is_valid(regex(body))]


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _allows_none(annotation: Any) -> bool:
    return type(None) in get_args(annotation)
