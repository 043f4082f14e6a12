"""What an answer must look like: from an adapter and a signature to a grammar.

The adapter writes an answer with a placeholder for each output field. What it puts around them is
fixed text, so subclasses with other markers are held to their own; in the places of the fields
stands what their types let through (``fst_dspy.grammar.values``): plainly for ChatAdapter, as
escaped text and nested elements for XMLAdapter, as JSON for JSONAdapter. Free text goes on to the
first place where the text that must follow it does.
"""

from __future__ import annotations

import copy
import decimal
import functools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, get_args, get_origin

import dspy
from dspy.adapters.chat_adapter import ChatAdapter
from dspy.adapters.json_adapter import JSONAdapter
from dspy.adapters.xml_adapter import XMLAdapter
from pydantic.fields import FieldInfo

from fst_dspy.grammar.limits import LONGEST
from fst_dspy.grammar.values import (
    COMPACT,
    INDENTED,
    LINE,
    NO_LINE,
    STANDARD,
    STRING,
    Spell,
    as_text,
    bare_pattern,
    bodies_of,
    escaped,
    formed,
    is_text,
    is_text_of_dspy,
    is_valid,
    json_piece,
    json_values_of,
    length_bodies,
    literal,
    members,
    number,
    options,
    reads_as,
    regex,
    schema_of,
    texts_of,
    unheld_formats,
    unheld_patterns,
    whole_pattern,
    with_own_formats,
    with_tags,
)
from fst_dspy.grammar.xml_values import TEXT as XML_TEXT
from fst_dspy.grammar.xml_values import NestedXml, json_in_xml, xml_escaped

logger = logging.getLogger(__name__)

HEADER = "%llguidance {}"
"""The first line, by which others than llguidance know whose grammar it is."""
CHAT_MARK = "[[ ##"
"""What ChatAdapter takes for the beginning of a field, also of one that was not asked for."""
ANY_TEXT = "(?s:.*)"
_LENGTHS = ("min_length", "max_length")


def grammar_of_answer(
    adapter: dspy.Adapter, signature: type[dspy.Signature], spell: Spell | None = None
) -> str | None:
    """The grammar of the answers that an adapter reads.

    A field whose type cannot be held to is free text, and one whose lengths llguidance cannot count
    has any length; both are told, and the rest stands.

    Args:
        adapter: A ChatAdapter, XMLAdapter or JSONAdapter, or a subclass of one.
        signature: As the adapter was given it, without fields that go another way (native tools).
        spell: How the tokenizer spells texts, where it does not spell them as they are.

    Returns:
        ``None`` for adapters of other kinds, and where the answer has no fields.
    """
    # Where words are spelled by what stands before them, a marker may be a token together with the
    # white space behind it, which no other token writes.
    template = _template(adapter, signature, whole=spell is not None)
    if template is None:
        return None
    fields = {
        name: _without_lengths(info) if _is_too_long(info) else info
        for name, info in signature.output_fields.items()
    }
    shorter = {name: _without_lengths(info) for name, info in fields.items()}
    for held in (fields, shorter):
        writer = _writer(adapter, template, spell)
        text = writer.write(held)
        if is_valid(text.split("\n", 1)[1].removeprefix("start: ")):
            break
    else:
        logger.warning("answers of %s cannot be held to its format", type(adapter).__name__)
        return None
    for name, info in signature.output_fields.items():
        if name in writer.left_free:
            _tell_free(type(adapter).__name__, name, info.annotation)
        elif held[name] is not info:
            _tell_free(type(adapter).__name__, name, info.annotation, "the lengths of ")
        else:
            schema = _schema(_annotated(info)) or {}
            _tell_unheld(_NO_PATTERN, name, unheld_patterns(schema))
            _tell_unheld(_NO_FORMAT, name, unheld_formats(schema) - writer.formats)
    return text


def _writer(adapter: Any, template: Template, spell: Spell | None) -> _Plain:
    if isinstance(adapter, JSONAdapter):
        return _Json(template, spell)
    if isinstance(adapter, XMLAdapter):
        return _Xml(template, spell)
    return _Plain(template, spell, mark=CHAT_MARK if CHAT_MARK in template.texts[0] else None)


def _is_too_long(info: FieldInfo) -> bool:
    lengths = (getattr(m, name, None) for m in info.metadata for name in _LENGTHS)
    return is_text(info.annotation) and any((length or 0) > LONGEST for length in lengths)


def _without_lengths(info: FieldInfo) -> FieldInfo:
    """A field with its other constraints alone; the same one where it has no lengths."""
    kept = [m for m in info.metadata if not any(hasattr(m, name) for name in _LENGTHS)]
    if len(kept) == len(info.metadata):
        return info
    own = copy.copy(info)
    own.metadata = kept
    return own


def _tell_free(adapter: str, name: str, annotation: Any, what: str = "") -> None:
    """Say so, once for an adapter and a type."""
    shown = getattr(annotation, "__name__", None) if not get_args(annotation) else None
    kind = (adapter, what + (shown or str(annotation)))
    if kind in _told:
        return
    _told.add(kind)
    if what:
        logger.warning(
            "answers are not held to %s, the type of the field %r, under %s: they are too much to "
            "count, and an answer may be of another length",
            kind[1],
            name,
            adapter,
        )
    else:
        logger.warning(
            "answers are not held to %s, the type of the field %r, under %s: it is free text "
            "within its markers, and may not be read",
            kind[1],
            name,
            adapter,
        )


_NO_PATTERN = (
    "answers are not held to the pattern %r of the field %r, which llguidance has not; write it "
    "without look-around and \\b, and with ^ and $ at its ends alone"
)
_NO_FORMAT = (
    "answers are not held to the format %r of the field %r: there it is any text, and may not be "
    "read"
)


def _tell_unheld(message: str, name: str, constraints: Iterable[str]) -> None:
    """Say so, once for each."""
    for constraint in constraints:
        if (message, constraint) not in _told:
            _told.add((message, constraint))
            logger.warning(message, constraint, name)


_told: set[tuple[str, str]] = set()


def grammar_of_json_schema(schema: Mapping[str, Any]) -> str | None:
    """The grammar of JSON that keeps to a schema; ``{}`` is any JSON. ``None`` where there is none.

    Keywords that llguidance does not know are left out of account.
    """
    piece = json_piece(with_own_formats(with_tags(schema), STANDARD), INDENTED)
    return None if piece is None else f"{HEADER}\nstart: {piece}"


@dataclass
class Template:
    """An answer, cut at its fields.

    Attributes:
        names: The output fields, in the order in which the adapter writes them.
        texts: What stands before, between and after them: one more.
    """

    names: list[str]
    texts: list[str]


def _template(
    adapter: Any, signature: type[dspy.Signature], *, whole: bool = False
) -> Template | None:
    names = list(signature.output_fields)
    if not isinstance(adapter, ChatAdapter) or not names:
        return None
    places = {name: f"\ue000{index}\ue001" for index, name in enumerate(names)}
    written = adapter.format_assistant_message_content(signature, places)
    texts = []
    for name in names:
        before, found, written = written.partition(places[name])
        if not found:
            return None
        texts.append(before)
    if any(place in text for text in (*texts, written) for place in places.values()):
        return None
    return Template(names, [*texts, written if whole else written.rstrip()])


@dataclass
class _Plain:
    """Writes the grammar of values in plain text, as ChatAdapter has them.

    Attributes:
        mark: What may not stand in free text, other than where it ends.
        left_free: Fields whose types cannot be held to.
    """

    template: Template
    spell: Spell | None
    mark: str | None = None
    definitions: list[str] = field(default_factory=list)
    left_free: list[str] = field(default_factory=list)

    def write(self, fields: Mapping[str, FieldInfo]) -> str:
        texts = self.template.texts
        parts = [self.fixed(texts[0])] if texts[0] else []
        for name, before, after in zip(self.template.names, texts, texts[1:], strict=False):
            info = fields[name]
            piece = self.value(_annotated(info), info.annotation, before)
            if piece is None or piece == self.unheld:
                self.note_free(name, info)
            if piece is None:
                parts.append(self.free_text(info, after))
            else:
                parts.append(f"({piece})")
                parts += [self.fixed(after)] if after else []
        return "\n".join([HEADER, f"start: {' '.join(parts)}", *self.definitions])

    def value(self, annotation: Any, whole: Any, before: str) -> str | None:
        """The piece of a type; ``None`` for free text.

        Args:
            annotation: The type, with the field's constraints.
            whole: The type of the field, of which it may be a part.
            before: What stands before it.
        """
        bare = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
        if (bare is str or is_text_of_dspy(bare)) and not is_text(whole):
            return self.line(annotation)
        if is_text(bare):
            return self.text_value(annotation)
        reads = functools.partial(self.reads_as, whole)
        if written := options(bare, self.spellings, reads):
            return " | ".join(self.fixed(self.dumped(value), before) for value in written)
        if (pattern := number(bare)) is not None:
            bounded = _schema(annotation) if bare is not annotation else None
            if bare is decimal.Decimal and (own := bare_pattern(bounded or as_text(pattern))):
                return " | ".join(map(regex, dict.fromkeys((own, self.quoted(own)))))
            return (bounded and json_piece(bounded, COMPACT)) or regex(pattern)
        if (pattern := formed(bare)) is not None:
            bounded = _schema(annotation) if bare is not annotation else None
            return regex(self.quoted((bounded and bare_pattern(bounded)) or pattern))
        if parts := [self.value(part, whole, before) for part in _parts(annotation)]:
            return None if None in parts else " | ".join(f"({part})" for part in parts)
        return self.structure(annotation, whole)

    def note_free(self, name: str, info: FieldInfo) -> None:
        if not is_text(info.annotation):
            self.left_free.append(name)

    def fixed(self, text: str, before: str = "") -> str:
        return literal(self.spelled(text, before))

    def spelled(self, text: str, before: str = "") -> str:
        return self.spell(text, before) if self.spell is not None else text

    # --- what the kinds of adapter write in different ways --------------------------------------

    formats: ClassVar[frozenset[str]] = frozenset({"email", "hostname", "idn-email", "uri"})
    """Those of JSON schema that llguidance itself holds texts to."""
    unheld: ClassVar[str | None] = None
    """The piece of a type that cannot be held to; ``None`` for free text."""

    def reads_as(self, whole: Any, text: Any, value: Any) -> bool:
        return reads_as(text, whole, value)

    def text_value(self, annotation: Any) -> str | None:
        return None

    def spellings(self, value: Any) -> list[Any]:
        # An adapter reads a value without the white space around it.
        texts = [text for text in texts_of(value) if text == text.strip()]
        return [text for text in texts if self.mark is None or self.mark not in text]

    def dumped(self, value: Any) -> str:
        return value

    def quoted(self, pattern: str) -> str:
        return pattern

    def line(self, annotation: Any) -> str | None:
        """The piece of a text where DSPy looks for other values first: a line, or JSON."""
        schema = None if self.spell is not None else _schema(annotation)
        if schema is None or not all(t.startswith("\n") for t in self.template.texts[1:] if t):
            return None
        return " | ".join(filter(None, (self.line_of(schema), json_piece(schema, COMPACT))))

    def line_of(self, schema: Mapping[str, Any]) -> str:
        held = (regex(self.quoted(f"(?:{body})")) for body in (LINE, *bodies_of(schema)))
        return self.terminal([*held, "~" + regex(self.quoted(f"(?:{NO_LINE})"))])

    def structure(self, annotation: Any, whole: Any) -> str | None:
        schema = None if self.spell is not None else _schema(annotation)
        if schema is None:
            return None
        if _is_any_text(schema):
            return self.line(annotation)
        pattern = bare_pattern(schema)
        return json_piece(schema, COMPACT) if pattern is None else regex(pattern)

    def free_text(self, info: FieldInfo, after: str) -> str:
        """A rule for free text, and the fixed text after it, by which it is known to have ended."""
        end = escaped(self.spelled(after))
        parts = [regex(body + end) for body in _bodies(info)]
        if self.mark is not None:
            mark = escaped(self.mark)
            parts.append("~" + regex(f"{ANY_TEXT}{mark}{ANY_TEXT}{mark}{ANY_TEXT}"))
        return self.terminal(parts, lazy=bool(after))

    def terminal(self, parts: Sequence[str], *, lazy: bool = False) -> str:
        number = len(self.definitions)
        self.definitions.append(f"T{number}: {' & '.join(parts)}")
        self.definitions.append(f"t{number}{'[lazy]' if lazy else ''}: T{number}")
        return f"t{number}"


class _Xml(_Plain):
    """Writes the grammar of values as XMLAdapter has them."""

    formats = frozenset()

    def reads_as(self, whole: Any, text: Any, value: Any) -> bool:
        try:
            read = dspy.XMLAdapter().parse(_only(whole), f"<x>{xml_escaped(text)}</x>")
        except Exception:  # AdapterParseError, and what DSPy trips over
            return False
        return bool(read["x"] == value)

    def line(self, annotation: Any) -> str | None:
        return None  # any text: where what stands in it is no value, DSPy takes the text itself

    def dumped(self, value: Any) -> str:
        return xml_escaped(value)

    def structure(self, annotation: Any, whole: Any) -> str | None:
        schema = None if self.spell is not None else _schema(annotation)
        pattern = None if schema is None else bare_pattern(schema)
        if pattern is not None:
            return self.terminal([regex(pattern), regex(XML_TEXT)])
        if schema is None or _is_any_text(schema) or _nests(whole):
            return None  # ``write`` puts elements in their places
        return json_piece(json_in_xml(schema), COMPACT)

    def write(self, fields: Mapping[str, FieldInfo]) -> str:
        nested: dict[str, str] = {}
        for name in self.template.names:
            annotation = _annotated(fields[name])
            bare = fields[name].annotation
            if self.value(annotation, bare, "\n") is None and not _takes_texts(bare):
                schema = _schema(annotation, by_alias=False)
                if schema is None:  # with constraints that not every part can have
                    schema = _schema(bare, by_alias=False)
                piece = schema and NestedXml(self, schema).element(name, schema, top=True)
                if piece and type(None) in members(bare) and self.reads_as(bare, "None", None):
                    # The tag by itself, as of other values: what goes on from it would be it alone.
                    none = (self.fixed(f"<{name}>"), self.fixed(f"\nNone\n</{name}>"))
                    piece = f"({piece} | {' '.join(none)})"
                if piece:
                    nested[name] = piece
        texts = self.template.texts
        parts, at = [], 0
        text = texts[0]
        for at, name in enumerate(self.template.names, 1):
            after, info = texts[at], fields[name]
            opening, closing = f"<{name}>\n", f"\n</{name}>"
            if name in nested and text.endswith(opening) and after.startswith(closing):
                text = text.removesuffix(opening)
                parts += [self.fixed(text)] if text else []
                parts.append(nested[name])
                text = after.removeprefix(closing)
                continue
            parts += [self.fixed(text)] if text else []
            piece = self.value(_annotated(info), info.annotation, text)
            if piece is None:
                self.note_free(name, info)
                end = closing if after.startswith(closing) else after
                parts.append(self.free_text(info, end))
                text = after.removeprefix(end)
            else:
                parts.append(f"({piece})")
                text = after
        parts += [self.fixed(text)] if text else []
        return "\n".join([HEADER, f"start: {' '.join(parts)}", *self.definitions])

    def note_free(self, name: str, info: FieldInfo) -> None:
        if not _takes_texts(info.annotation):
            super().note_free(name, info)

    def free_text(self, info: FieldInfo, after: str) -> str:
        end = escaped(self.spelled(after))
        parts = [regex(XML_TEXT + end), "~" + regex(rf"{ANY_TEXT}\]\]>{ANY_TEXT}")]
        parts += [regex(body + end) for body in _bodies(info) if body != ANY_TEXT]
        if not is_text(info.annotation) or info.annotation is not str:
            # Of other types DSPy reads an empty element as a structure without anything in it.
            parts.append(regex(rf"{ANY_TEXT}[^\s<]{ANY_TEXT}{end}"))
        return self.terminal(parts)


class _Json(_Plain):
    """Writes the grammar of values in JSON, as JSONAdapter has them."""

    def __init__(self, template: Template, spell: Spell | None) -> None:
        # The quotes around the placeholders are the values' own.
        texts = [t.removeprefix('"') if i else t for i, t in enumerate(template.texts)]
        texts = [t.removesuffix('"') for t in texts[:-1]] + texts[-1:]
        super().__init__(Template(template.names, texts), spell)

    def text_value(self, annotation: Any) -> str | None:
        schema = None
        if get_origin(annotation) is Annotated and self.spell is None:
            schema = _schema(annotation)
        piece = (schema and json_piece(schema, COMPACT)) or regex(STRING)
        if annotation in (Any, object) and self.spell is None:
            piece = json_piece({}, INDENTED) or piece
        others = (part for part in members(annotation) if part is not str)
        parts = [self.value(part, annotation, "") for part in others]
        return " | ".join([piece, *(f"({part})" for part in parts if part is not None)])

    def line(self, annotation: Any) -> str | None:
        schema = None if self.spell is not None else _schema(annotation)
        if schema is None:
            return None
        # A JSON string that is no such line would be looked into as well; an object is not.
        whole = json_piece(schema, INDENTED) if schema.get("type") == "object" else None
        return " | ".join(filter(None, (self.line_of(schema), whole)))

    def spellings(self, value: Any) -> list[Any]:
        return json_values_of(value)

    def dumped(self, value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    def quoted(self, pattern: str) -> str:
        return f'"{pattern}"'

    def structure(self, annotation: Any, whole: Any) -> str | None:
        schema = None if self.spell is not None else _schema(annotation)
        if schema is not None and _is_plain_string(schema):
            return self.line(annotation) if _is_any_text(schema) else self.unheld
        return (schema and json_piece(schema, INDENTED)) or self.unheld

    unheld = regex(STRING)


def _annotated(info: FieldInfo) -> Any:
    """A field's type, with its constraints."""
    if not info.metadata:
        return info.annotation
    return Annotated[(info.annotation, *info.metadata)]


def _parts(annotation: Any) -> list[Any]:
    """The types of a union, each with the union's constraints where it can have them."""
    if get_origin(annotation) is not Annotated:
        return list(members(annotation))
    bare, *constraints = get_args(annotation)
    parts = []
    for part in members(bare):
        own = part if part is type(None) else Annotated[(part, *constraints)]
        parts.append(part if _schema(own) is None else own)
    return parts


def _is_plain_string(schema: Mapping[str, Any]) -> bool:
    return schema.get("type") == "string" and not schema.keys() & {"pattern", "enum", "const"}


def _is_any_text(schema: Mapping[str, Any]) -> bool:
    return _is_plain_string(schema) and not unheld_formats(schema)


def _takes_texts(annotation: Any) -> bool:
    """Whether XMLAdapter reads any text: one that is no value of the others is one of these."""
    return is_text(annotation) or any(map(is_text_of_dspy, members(annotation)))


def _nests(annotation: Any) -> bool:
    """Whether XMLAdapter writes, and asks for, a type's values as nested elements, not as JSON."""
    signature = _only.__wrapped__(annotation)  # a type with unhashable notes is no key
    return "<item>" in dspy.XMLAdapter().format_assistant_message_content(signature, {"x": ["y"]})


@functools.lru_cache(16)
def _only(annotation: Any) -> type[dspy.Signature]:
    return dspy.Signature({"q": (str, dspy.InputField()), "x": (annotation, dspy.OutputField())})


def _schema(annotation: Any, *, by_alias: bool = True) -> dict[str, Any] | None:
    try:
        return schema_of(annotation, by_alias=by_alias)
    except Exception as error:  # whatever a type of the user's may raise
        logger.info("%s has no JSON schema: %s", annotation, error)
        return None


def _bodies(info: FieldInfo) -> list[str]:
    """What a field's constraints make of its text, as regular expressions that all hold."""
    bodies = []
    least = next((m.min_length for m in info.metadata if hasattr(m, "min_length")), 0)
    most = next((m.max_length for m in info.metadata if hasattr(m, "max_length")), None)
    bodies += length_bodies(least, most)
    for constraint in info.metadata:
        pattern = getattr(constraint, "pattern", None)
        if isinstance(pattern, str):
            bodies.append(whole_pattern(pattern))
    return [body for body in bodies if is_valid(regex(body))] or [ANY_TEXT]
