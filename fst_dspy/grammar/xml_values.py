"""Values as XMLAdapter nests them: lists, dicts and models as elements within elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from xml.sax import saxutils

from fst_dspy.grammar.values import (
    FLOAT,
    INT,
    bodies_of,
    escaped,
    json_piece,
    literal,
    regex,
    texts_of_values,
)

# "<" and "&" begin something else, control characters cannot be in XML at all.
TEXT = r"(?:[^<&\x00-\x08\x0b\x0c\x0e-\x1f\x{FFFE}\x{FFFF}]|&(?:amp|lt|gt|quot|apos);)*"
KEY = r'(?:[^<&"\x00-\x1f\x{FFFE}\x{FFFF}]|&(?:amp|lt|gt|quot|apos);)+'
_READ_FROM_TEXT = ("string", "integer", "number", "boolean")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def xml_escaped(text: str) -> str:
    """As XMLAdapter escapes it."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def json_in_xml(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of JSON that stands as text in XML: what XML reads as marks is escaped in it."""
    own = _texts_in_xml(schema)
    own["$defs"] = {**own.get("$defs", {}), _ANYTHING: _anything()}
    return dict(own)


# Of a string in JSON, as it is written: "&quot;" would end it, and "]]>" is none of XML.
_IN_JSON = (
    r"(?:\]?(?:[^\]<&\x{FFFE}\x{FFFF}]|&(?:amp|lt|gt);)"
    r"|\]\]+(?:[^\]<>&\x{FFFE}\x{FFFF}]|&(?:amp|lt|gt);))*\]*"
)
_JSON_TEXT = {"type": "string", "pattern": f"^(?:{_IN_JSON})$"}
_ANYTHING = "AnyJSON"


def _anything() -> dict[str, Any]:
    inner = {"$ref": f"#/$defs/{_ANYTHING}"}
    items = {"type": "array", "items": inner}
    return {"anyOf": [{"type": ["null", "boolean", "number"]}, _JSON_TEXT, items, _entries(inner)]}


def _entries(values: Any) -> dict[str, Any]:
    keys = _JSON_TEXT["pattern"]
    return {"type": "object", "patternProperties": {keys: values}, "additionalProperties": False}


def _texts_in_xml(schema: Any) -> Any:
    if schema is True or not schema.keys() - {"title", "description", "default"}:
        return {"$ref": f"#/$defs/{_ANYTHING}"}
    own = dict(schema)
    for name in ("$defs", "properties", "patternProperties"):
        if name in own:
            escape = xml_escaped if name == "properties" else str
            own[name] = {escape(key): _texts_in_xml(part) for key, part in own[name].items()}
    for name in ("anyOf", "oneOf", "prefixItems"):
        if name in own:
            own[name] = [_texts_in_xml(part) for part in own[name]]
    if isinstance(own.get("items"), dict):
        own["items"] = _texts_in_xml(own["items"])
    if "required" in own:
        own["required"] = [xml_escaped(name) for name in own["required"]]
    if "enum" in own:
        own["enum"] = [xml_escaped(v) if isinstance(v, str) else v for v in own["enum"]]
    elif isinstance(own.get("const"), str):
        own["const"] = xml_escaped(own["const"])
    elif own.get("type") == "string":
        own["allOf"] = [_JSON_TEXT]
    elif own.get("type") == "object" and not own.keys() & {"properties", "patternProperties"}:
        more = own.pop("additionalProperties", True)
        own |= _entries(_texts_in_xml(more)) if more else {"additionalProperties": False}
    elif own.get("type") == "object":
        own["additionalProperties"] = False  # more than what is named nobody reads
    elif own.get("type") == "array" and "items" not in own and "prefixItems" not in own:
        own["items"] = {"$ref": f"#/$defs/{_ANYTHING}"}
    return own


def _in_attribute(text: str) -> str:
    """As it stands between the quotes of an attribute."""
    return saxutils.escape(text, {'"': "&quot;", "\n": "&#10;", "\t": "&#9;", "\r": "&#13;"})


class Writer(Protocol):
    """What keeps the definitions of a grammar."""

    definitions: list[str]

    def spelled(self, text: str, before: str = "") -> str: ...

    def fixed(self, text: str, before: str = "") -> str: ...


class NestedXml:
    """Elements for the values of one JSON schema.

    Args:
        writer: Where definitions go.
        schema: With the ``$defs`` that it refers to.
    """

    def __init__(self, writer: Writer, schema: Mapping[str, Any]) -> None:
        self.writer, self.named = writer, schema.get("$defs", {})
        self._rules: dict[tuple[str, str, str | None], str] = {}

    def element(
        self,
        tag: str,
        schema: Mapping[str, Any],
        opening: str | None = None,
        *,
        top: bool = False,
    ) -> str | None:
        """The element of a value; ``None`` where XML as DSPy reads it cannot hold to the schema.

        Args:
            opening: The piece of the opening tag, but for its end, where it has more in it than its
                name.
            top: It is a field's own, and not within another.
        """
        if reference := schema.get("$ref"):
            return self._rule(tag, reference.rsplit("/", 1)[-1], opening)
        if choices := schema.get("anyOf", schema.get("oneOf")):
            return self._union(tag, choices, opening, top=top, known="anyOf" in schema)
        begin, end = self._tags(tag, opening)
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if values is not None:
            texts = texts_of_values(schema, values)
            if len(texts) < len(values) or any(text != text.strip() for text in texts):
                return None  # DSPy would have texts for them
            written = (self.writer.fixed(xml_escaped(text), ">") for text in texts)
            return f"{begin} ({' | '.join(written)}) {end}"
        kind = schema.get("type", "string")
        if kind == "string":
            return f"{begin} {self._text(schema, f'</{tag}>')}"
        if kind in ("integer", "number"):
            bounds = {name: schema[name] for name in _BOUNDS if name in schema}
            piece = json_piece({"type": kind, **bounds}, {}) if bounds else None
            return f"{begin} {piece or regex(INT if kind == 'integer' else FLOAT)} {end}"
        if kind == "boolean":
            values = (self.writer.fixed(value, ">") for value in ("True", "False"))
            return f"{begin} ({' | '.join(values)}) {end}"
        inner = self._items(schema) if kind == "array" else self._properties(schema)
        if inner is None:
            return None
        piece = f"{begin} {inner} {end}"
        if kind == "array" and not schema.get("minItems"):
            return f"({self._empty(tag, opening)} | {piece})"
        return piece

    def _tags(self, tag: str, opening: str | None) -> tuple[str, str]:
        begin = self.writer.fixed(f"<{tag}>") if opening is None else f"{opening} {literal('>')}"
        return begin, self.writer.fixed(f"</{tag}>")

    def _empty(self, tag: str, opening: str | None) -> str:
        """An element with nothing in it, as DSPy writes it for ``None`` and empty lists, or not."""
        closed = (
            self.writer.fixed(f"<{tag} />") if opening is None else f"{opening} {literal(' />')}"
        )
        return f"{closed} | {' '.join(self._tags(tag, opening))}"

    def _union(
        self,
        tag: str,
        choices: Sequence[Mapping[str, Any]],
        opening: str | None,
        *,
        top: bool,
        known: bool,
    ) -> str | None:
        """One of several; ``None`` where DSPy would not read one of them back.

        Args:
            known: DSPy tells choices from other schemas (it does not know ``oneOf``).
        """
        kinds = [choice for choice in choices if choice.get("type") != "null"]
        # A field's own choices DSPy tries one after the other. Within a value it reads elements as
        # the first choice that is no text, and does not look up what that refers to.
        first = next((k for k in kinds if k.get("type") != "string"), {}) if known else {}
        if not kinds or not ((top and known) or all(self._is_read(k, first, kinds) for k in kinds)):
            return None
        pieces = [self.element(tag, kind, opening) for kind in kinds]
        if len(kinds) < len(choices):
            pieces.insert(0, self._empty(tag, opening))
        return None if None in pieces else f"({' | '.join(str(piece) for piece in pieces)})"

    def _is_read(
        self, kind: Mapping[str, Any], first: Mapping[str, Any], kinds: Sequence[Mapping[str, Any]]
    ) -> bool:
        """Whether DSPy, which reads a choice as the first of them, reads it all the same."""
        own = self._resolved(kind)
        if own.get("type") not in ("array", "object"):
            return kinds[0].get("type") != "array"
        if kind is first and "$ref" not in kind:
            return True
        inner = own.get("properties", {}).values()
        return (
            first.get("type") not in ("array", "object")
            and bool(inner)
            and not any(
                part.keys() & {"$ref", "anyOf", "oneOf"} or part.get("type") in ("array", "object")
                for part in inner
            )
        )

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        reference = schema.get("$ref")
        return self.named[reference.rsplit("/", 1)[-1]] if reference else schema

    def _rule(self, tag: str, name: str, opening: str | None) -> str | None:
        """A rule of its own, to which the value itself may refer again.

        It is the whole element; or what is behind the opening, where that is another.
        """
        before = None if opening is None else ""
        key = (tag, name, before)
        if key not in self._rules:
            own = self._rules[key] = f"n{len(self.writer.definitions)}"
            place = len(self.writer.definitions)
            self.writer.definitions.append("")
            piece = self.element(tag, self.named[name], before)
            if piece is None:
                return None
            self.writer.definitions[place] = f"{own}: {piece}"
        return f"{opening or ''} {self._rules[key]}".strip()

    def _text(self, schema: Mapping[str, Any], close: str) -> str:
        name = f"N{len(self.writer.definitions)}"
        end = escaped(self.writer.spelled(close))
        parts = [regex(TEXT + end), r"~/(?s:.*)\]\]>(?s:.*)/"]
        if schema.get("minLength"):  # as it is written, "&amp;" is longer than what is read
            parts.append(f"~/(?s:.*)&(?s:.*){end.replace('/', chr(92) + '/')}/")
        # A field's own stands in a line between its tags, and DSPy takes off the white space.
        parts += [regex(rf"\n?(?:{body})\n?{end}") for body in bodies_of(schema)]
        self.writer.definitions.append(f"{name}: {' & '.join(parts)}")
        return name

    def _items(self, schema: Mapping[str, Any]) -> str | None:
        if "prefixItems" in schema:
            parts = schema["prefixItems"]
            if not all(part.get("type") in _READ_FROM_TEXT for part in parts):
                return None  # DSPy does not look up what they are
            pieces = [self.element("item", part) for part in parts]
            return None if None in pieces else " ".join(map(str, pieces))
        item = self.element("item", schema.get("items", {}))
        least, most = schema.get("minItems", 0), schema.get("maxItems", "")
        return None if item is None else f"({item}){{{least},{most}}}"

    def _properties(self, schema: Mapping[str, Any]) -> str | None:
        pieces = []
        for name, own in schema.get("properties", {}).items():
            piece = (
                self.element(name, own)
                if name.isidentifier()
                else self.element("entry", own, self._entry(regex(escaped(_in_attribute(name)))))
            )
            if piece is None:
                return None
            pieces.append(piece if name in schema.get("required", ()) else f"({piece})?")
        if "properties" in schema:
            return " ".join(pieces) or '""'
        patterns = schema.get("patternProperties")
        keys, values = next(iter(patterns.items())) if patterns else (f"^(?:{KEY})$", None)
        if values is None:
            more = schema.get("additionalProperties", True)
            values = more if isinstance(more, dict) else {}
        key = f"K{len(self.writer.definitions)}"
        self.writer.definitions.append(
            f"{key}: {regex(keys[1:-1])} & {regex(KEY)}" if patterns else f"{key}: {regex(KEY)}"
        )
        entry = self.element("entry", values, self._entry(key))
        least, most = schema.get("minProperties", 0), schema.get("maxProperties", "")
        return None if entry is None else f"({entry}){{{least},{most}}}"

    def _entry(self, key: str) -> str:
        """The opening tag, but for its end, of a value whose key is no name, or one of many."""
        begin = self.writer.fixed("<entry key=")
        return " ".join((begin, literal('"'), key, literal('"')))
