"""The skill of following rules stated in the prompt: find which rule applies, say it, answer.

A rule maps a key word to a value word. It stands in the instruction, in one of many wordings, or
has to be read off the demos; the input is a sentence with the key somewhere in it. The
``reasoning`` states the rule before the answer, which turns one hard step into two easy ones.

A small model learns this only by a curriculum of distance: first the value follows the key at
once, then one, two and three tokens later, and only then DSPy's format around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from fst_dspy.embedded.corpus.base import Message, Question, Stage
from fst_dspy.embedded.corpus.render import (
    HEAVY,
    INPUT_NAMES,
    LIGHT,
    OUTPUT_NAMES,
    Piece,
    Turn,
    draw_adapter,
    draw_types,
    field_name,
    make_signature,
    render_chat,
)
from fst_dspy.embedded.corpus.words import ENGLISH, HELD_OUT, VOCABULARY, distinct, word_list


@dataclass(frozen=True)
class Drill:
    """Wordings of one distance, the most pairs in a list, and the shares of English to choose."""

    wordings: tuple[str, ...]
    pairs: int = 12
    english: tuple[float, ...] = (0.7, 1.0, 1.0)


DRILLS: Mapping[str, Drill] = {
    "adjacent, few": Drill(("{k} {v}",), pairs=4, english=(1.0,)),
    "adjacent": Drill(("{k} {v}",), english=(1.0,)),
    "one apart": Drill(("{k}: {v}", "{k} -> {v}", "{k} = {v}", "{k} {v}")),
    "two apart": Drill(
        ("{k} goes to {v}", "{k} belongs to {v}", "{k} means: {v}", "send {k} to the {v}")
    ),
    "three apart": Drill(("{k} {n} go to {v}", "{k} is sent to {v}", "if it is {k}, answer {v}")),
}
NOUNS = word_list("tickets cases requests questions messages items things mails topics orders")
WORDINGS = (
    "{k} {n} go to {v}.",
    "{k} {n} go to {v}.",
    "{k} goes to {v}.",
    "{k} {n} belong to {v}.",
    "Send {k} {n} to {v}.",
    "Send {k} to {v}.",
    "{k} -> {v}",
    "{k}: {v}",
    "{k} = {v}",
    "{k} means {v}.",
    "If it is about {k}, answer {v}.",
    "If the {i} is about {k}, the {o} is {v}.",
    "For {k} {n} answer {v}.",
    "When the {i} mentions {k}, say {v}.",
    "The {o} for {k} is {v}.",
    "{k} {n} are for {v}.",
    "Route {k} {n} to {v}.",
)
TASKS = (
    "Route the {i} to the right {o}.",
    "Choose the {o} for the {i}.",
    "Find the right {o}.",
    "Answer with the {o} of the {i}.",
    "Read the {i} and give the {o}.",
    "Decide which {o} fits the {i}.",
    "You get a {i}. Say which {o} it belongs to.",
    "Pick one {o} for each {i}.",
    "Classify the {i}.",
    "What is the {o}?",
)
LEADS = (
    "Rules:", "Follow these rules:", "Lessons:", "Lessons learned:", "Remember:", "Policy:",
    "Keep in mind:", "Here is what we know:", "Notes:", "Use this table:",
)  # fmt: skip
OPTION_LISTS = ("one of: {}", "One of {}", "Choose from: {}", "must be one of {}", "options: {}")
OPENERS = (
    "", "", "", "Hello,", "Hi there,", "Please help:", "Good day.", "Dear all,", "Quick one:",
    "Sorry to ask,", "Once more:", "To whom it may concern,", "Urgent!", "For your information:",
)  # fmt: skip
BODIES = (
    "my {k} was not accepted at the {w}",
    "I have a problem with the {k}",
    "the {k} did not work on {w}",
    "I would like to know more about {k} for my {w}",
    "we lost our {k} near the {w} yesterday",
    "can you tell me who looks after {k} here",
    "nobody at the {w} could explain the {k} to me",
    "the {w} says my {k} is wrong",
    "I asked about {k} last week and got no reply",
    "there is something strange about this {k}",
    "how do I change the {k} before we leave",
    "is the {k} included in the price of the {w}",
    "I paid twice for {k} and want my money back",
    "a question on {k} and nothing else",
    "our {k} has been broken since the {w} came",
    "they told me that {k} is closed today",
    "where can I find the {k} in the {w}",
    "I need help with {k}",
    "it is all about {k} again",
    "what happens to the {k} if the {w} is late",
    "the new {k} looks good but the {w} does not",
    "someone took the {k} from the {w}",
    "please look at the {k} on my desk",
    "{k} is what I am writing about",
    "{k} again, and it is the third time",
    "my family of four waits for the {k}",
    "when does the {k} start",
)
CLOSERS = (
    "", "", "", "Please help.", "Thank you.", "Thanks in advance!", "What should I do?",
    "Can you check?", "I am waiting.", "It is late.", "Best wishes.", "Please answer soon.",
)  # fmt: skip
ENDS = (".", ".", "?", "!", ", please.", ", thanks.")


def sentence(rng: Random, key: str, others: Sequence[str]) -> str:
    """An input that mentions ``key`` and, beside it, only words that are no rule's key."""
    if rng.random() < 0.2:
        words = [*rng.choices(others, k=rng.randint(1, 7))]
        words.insert(rng.randint(0, len(words)), key)
        return " ".join(words) + rng.choice(ENDS)
    body = rng.choice(BODIES).format(k=key, w=rng.choice(others)) + rng.choice(ENDS)
    opener, closer = rng.choice(OPENERS), rng.choice(CLOSERS)
    if not opener.endswith((",", ":")) and not body.startswith(key):
        body = body[0].upper() + body[1:]
    return " ".join(part for part in (opener, body, closer) if part)


def noisy_sentence(rng: Random, key: str, others: Sequence[str]) -> str:
    """A sentence with several other words strewn in, so that only the rules tell the key apart."""
    words = sentence(rng, key, others).split()
    for _ in range(rng.randint(1, 5)):
        other = rng.choice(others) if rng.random() < 0.6 else distinct(rng, 1, english=0.0)[0]
        words.insert(rng.randint(0, len(words)), other)
    return " ".join(words)


def rule_text(rng: Random, rules: Mapping[str, str], names: tuple[str, str]) -> str:
    """All rules, in the wording of one template (now and then of several), with a lead-in."""
    wordings = [rng.choice(WORDINGS)] if rng.random() < 0.75 else rng.choices(WORDINGS, k=4)
    noun = rng.choice([*NOUNS, names[0] + "s"])
    bullet = rng.choice(["", "", "", "- ", "* "])
    lines = [
        bullet + rng.choice(wordings).format(k=k, v=v, n=noun, i=names[0], o=names[1])
        for k, v in rules.items()
    ]
    glue = "\n" if bullet or rng.random() < 0.75 else " "
    if glue == " ":
        lines = [line if line.endswith(".") else line + rng.choice(".,;") for line in lines]
    lead = [rng.choice(LEADS)] if rng.random() < 0.5 else []
    return glue.join([*lead, *lines])


@dataclass(frozen=True)
class _Shape:
    """The signature of one chat: names of its fields and what they hold."""

    source: str
    extra: tuple[str, ...]
    outputs: tuple[str, ...]
    topic: str | None
    target: str


def _shape(rng: Random) -> _Shape:
    source = field_name(rng, INPUT_NAMES)
    taken = [source]
    extra = []
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        extra.append(field_name(rng, INPUT_NAMES, taken))
        taken.append(extra[-1])
    target = field_name(rng, OUTPUT_NAMES, taken)
    topic = field_name(rng, (*OUTPUT_NAMES, "topic", "key"), [*taken, target])
    draw = rng.random()
    outputs: tuple[str, ...]
    if draw < 0.75:
        outputs = ("reasoning", target)
    elif draw < 0.85:
        outputs = ("reasoning", topic, target)
    elif draw < 0.95:
        outputs = (topic, target)
    else:
        outputs = (target,)
    return _Shape(source, tuple(extra), outputs, topic if topic in outputs else None, target)


def _turn(
    rng: Random,
    shape: _Shape,
    key: str,
    value: str,
    known: bool,
    others: Sequence[str],
    speak: Callable[[Random, str, Sequence[str]], str],
) -> Turn:
    weight = HEAVY if known else LIGHT
    reasoning = (Piece(key, weight), Piece(" goes to"), Piece(" " + value, weight), Piece("."))
    values: dict[str, Sequence[Piece]] = {
        # With the rule stated just before, the answer can be read off whether known or not.
        shape.target: (Piece(value, HEAVY if "reasoning" in shape.outputs else weight),),
        "reasoning": reasoning,
    }
    if shape.topic:
        values[shape.topic] = (Piece(key, weight),)
    inputs = {shape.source: speak(rng, key, others)}
    inputs |= {name: " ".join(rng.choices(others, k=rng.randint(1, 3))) for name in shape.extra}
    return Turn(inputs, {name: values[name] for name in shape.outputs})


def repeat(rng: Random) -> list[Message]:
    """A list of words from the whole vocabulary, and the same list again."""
    listed = " ".join(rng.sample(VOCABULARY, rng.randint(6, 30)))
    return [Message("user", listed), Message("assistant", listed, 1.0)]


def drill(rng: Random, kind: Drill) -> list[Message]:
    """Pairs of words in one wording, then the same several times over, to be completed."""
    count = rng.randint(2, kind.pairs)
    words = distinct(rng, 2 * count, english=rng.choice(kind.english))
    wording = rng.choice(kind.wordings).replace("{n}", rng.choice(NOUNS))
    pairs = list(zip(words[:count], words[count:], strict=True))
    listed = "\n".join(wording.format(k=k, v=v) for k, v in pairs)
    content, spans = "", []
    for key, value in rng.choices(pairs, k=16):
        content += wording.format(k=key, v=value)
        spans.append((len(content) - len(value), len(content), HEAVY))
        content += "\n"
    return [Message("system", listed), Message("assistant", content, 0.05, tuple(spans))]


def chat(
    rng: Random, speak: Callable[[Random, str, Sequence[str]], str] = sentence
) -> list[Message]:
    """A chat in DSPy's format, with the rules in the instruction, in the demos, or nowhere."""
    mode = rng.choices(["stated", "partly", "demos", "bare"], [0.62, 0.14, 0.14, 0.1])[0]
    count = rng.randint(2, 14)
    words = distinct(rng, 2 * count, english=rng.choice([0.5, 0.8, 1.0]))
    keys, values = words[:count], words[count:]
    if rng.random() < 0.3:  # several keys may share a value
        values = rng.choices(values, k=count)
    rules = dict(zip(keys, values, strict=True))
    options = sorted({*values, *distinct(rng, rng.randint(0, 3), 0.5)} - set(keys))
    others = [word for word in rng.sample(ENGLISH, 12) if word not in rules]

    shape = _shape(rng)
    names = (shape.source.replace("_", " "), shape.target.replace("_", " "))
    described: dict[str, str | None] = dict.fromkeys(shape.outputs)
    is_listed = rng.random() < 0.5
    if is_listed:
        rng.shuffle(options)
        described[shape.target] = rng.choice(OPTION_LISTS).format(", ".join(options))

    stated = {"stated": keys, "partly": keys[: max(1, count // 2)]}.get(mode, [])
    asked = rng.choices(keys, k=rng.randint(1, 5))
    if mode == "demos":
        few = rng.sample(keys, min(count, 4))
        asked = [*rng.sample(few, len(few)), *rng.choices(few, k=rng.randint(1, 4))]
    task = rng.choice(TASKS).format(i=names[0], o=names[1])
    instructions: str | None = task if rng.random() < 0.9 else None
    if stated:
        text = rule_text(rng, {k: rules[k] for k in rng.sample(stated, len(stated))}, names)
        instructions = f"{task}{rng.choice([' ', chr(10), chr(10)])}{text}"
        if rng.random() < 0.05:
            instructions = text
    signature = make_signature(
        dict.fromkeys((shape.source, *shape.extra)),
        described,
        instructions,
        draw_types(rng, {shape.target: options} if is_listed else None),
    )

    turns, known = [], set(stated)
    guess = {key: rng.choice(options) for key in keys}
    for key in asked:
        decided = mode == "stated" or key in known
        value = rules[key] if decided or mode == "demos" else guess[key]
        turns.append(_turn(rng, shape, key, value, decided, others, speak))
        if mode != "demos" and not decided:
            guess[key] = value
        known.add(key)  # a demo of it has now been shown
        rules[key] = value
    if len(turns) > 2 and "reasoning" in shape.outputs and rng.random() < 0.1:
        first = {k: v for k, v in turns[0].outputs.items() if k != "reasoning"}
        turns[0] = Turn(turns[0].inputs, first)
    return render_chat(draw_adapter(rng), signature, turns)


class RuleLookup:
    """See the module docstring; satisfies ``Family``."""

    name = "rule_lookup"
    warmup: tuple[Stage, ...] = (
        *(Stage(name, 150, 0.85) for name in DRILLS),
        Stage("chats", 220, 0.97),
    )
    share = 1.5

    def sample(self, rng: Random, stage: str) -> list[Message]:
        """A drill of the named distance; for ``"chats"`` and ``"joint"`` mostly chats in DSPy's
        format; after them such chats alone, most of them with inputs that are hard to read.
        """
        draw = rng.random()
        if draw < 0.12:
            return repeat(rng)
        if stage in ("polish", "calibrate"):
            return chat(rng, noisy_sentence if draw < 0.8 else sentence)
        if stage in DRILLS:
            return drill(rng, DRILLS[stage])
        return chat(rng) if draw < 0.95 else drill(rng, DRILLS[rng.choice(list(DRILLS))])

    def questions(self, rng: Random, count: int, unseen: bool = False) -> list[Question]:
        """Inputs about one of 12 keys, each mapped at random to one of 16 values."""
        words = sorted(HELD_OUT if unseen else ENGLISH)
        questions = []
        for _ in range(count):
            rng.shuffle(words)
            keys, values = words[:12], words[12:28]
            rules = dict(zip(keys, rng.choices(values, k=12), strict=True))
            task = "Route the ticket to the right queue."
            signature = make_signature(
                {"ticket": None},
                {"reasoning": None, "queue": f"one of: {', '.join(values)}"},
                task,
            )
            listed = "\n".join(f"{key} tickets go to {value}." for key, value in rules.items())
            key = rng.choice(keys)
            text = sentence(rng, key, [w for w in ENGLISH if w not in rules])
            questions.append(
                Question(signature, f"{task}\n{listed}", {"ticket": text}, "queue", rules[key])
            )
        return questions


__all__ = ["RuleLookup", "chat", "drill", "rule_text", "sentence"]
