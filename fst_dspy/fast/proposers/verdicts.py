"""What feedback says of one answer and no other: a verdict, a quotation, the answer's own words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fst_dspy.fast.proposers.protocol import Record
from fst_dspy.fast.proposers.sentences import QUOTED
from fst_dspy.fast.proposers.words import blanked, holds, key_of

_ANSWER = r"(?:answer|output|response|reply|prediction|guess|completion)"
_LABEL = rf"(?:{_ANSWER}|label|result|value|solution|one)s?"
_ASKED = (
    r"(?! (?:(?:must|should|may|can|has to|have to|needs? to|depends?)(?! have| be:? [\"'`\d])"
    r"|(?:is |are )?(?:always|never))(?!\w))"
)
"""Not before what says how all answers must be; a number or a quotation is that of one."""
_OF_MANY = rf"(?! (?!{_LABEL} )\w{{3,}}s )"
"""Not before several things ("Right turns on red are fine")."""
_DID = r"(?:\w+ly )?(?:\w+ed|wrote|chose|said|gave|did|got|is|was|has|had)"
_METRIC = r"(?:score|accuracy|precision|recall|f1|bleu|rouge)"
VERDICT = re.compile(
    rf"^(?:(?:correct|incorrect|wrong|right|expected|got|predicted){_OF_MANY}"
    rf"|gold(?= {_LABEL}| is| was|[:=,.])|score(?=\W*[:=(\d]| of| is| was)"
    r"|this (?:is|was)"
    r"|(?:it|that)(?:'s| is| was) (?:not )?(?:wrong|right|correct|incorrect)"
    r"|(?:not |almost |nearly |partly |partially |mostly )+(?:\w+ )?(?:right|correct)"
    r"|(?:no|yes|close|almost|nearly|good job|nice work|well done|great job)[,.!:;]"
    rf"|the (?:correct|expected|right|gold)(?: {_LABEL}(?!\w){_ASKED}|[:=]"
    r"|(?: \w+){1,3} (?:is|are|was|were))"
    rf"|the model {_DID}|the model's \w+|the episode (?:ended|was cut off)"
    rf"|(?:the|this|that|your|model|model's|predicted) {_ANSWER}{_ASKED}"
    r"|you (?:answered|said|wrote|predicted|chose)"
    r"|\d[\d.]*(?: ?%| ?/| of| out of))(?!\w)"
    # A number that a score has; not a bound that decides something, nor a year.
    rf"|\b{_METRIC}\b(?! (?:below|above|under|over|since|before|after)\b)[^.\d]*\d[\d.]*+(?! or )",
    re.IGNORECASE,
)
"""What is said of one answer, or how it was scored, at the beginning of a sentence or in it."""


def quotes_example(sentence: str, record: Record) -> bool:
    """Whether a sentence repeats its own example: a value of it, or words that stand in one."""
    if QUOTED.search(sentence):
        return True
    values = [*record["Inputs"].values(), *_answers(record)]
    inside = key_of(sentence)
    keys = [key for key in (key_of(str(value)) for value in values) if key]
    return any(holds(inside, key) or holds(key, inside) for key in keys)


def template_of(sentence: str, record: Record) -> tuple[str, str] | None:
    """A sentence's key with the answers of its example left out, and these.

    Answers are labels and outputs, and what is in them, that the example's inputs do not hold.
    ``None`` where the sentence names none.
    """
    outputs = record["Generated Outputs"]
    inputs = key_of(" ".join(map(str, record["Inputs"].values())))
    keys = {key_of(str(value)) for value in _answers(record, isinstance(outputs, Mapping))}
    inside = key_of(sentence)
    named = [k for k in sorted(keys, key=lambda k: (-len(k), k)) if holds(inside, k)]
    named = [key for key in named if not holds(inputs, key)]
    return (blanked(inside, named), "|".join(named)) if named else None


def parts_of(value: Any) -> Iterator[Any]:
    """A value and all that is in it, of lists, mappings, and texts that are JSON of these."""
    yield value
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            if item is not None:
                yield from parts_of(item)


def _answers(record: Record, outputs: bool = True) -> Iterator[Any]:
    """The labels of a record and, where asked for, its outputs, with what is in them."""
    said = record["Generated Outputs"]
    given = said.values() if isinstance(said, Mapping) else [said]
    for value in [*record["labels"].values(), *(given if outputs else ())]:
        yield from parts_of(value)
