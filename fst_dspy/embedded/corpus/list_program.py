"""The skill of running short programs on lists, whose operation words the prompt explains.

The operations are always the same eight; the words that stand for them differ from prompt to
prompt and are explained in the instruction, shown in demos, or left to be guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

from fst_dspy.embedded.corpus.base import Message, Question, Stage
from fst_dspy.embedded.corpus.render import (
    HEAVY,
    LIGHT,
    Piece,
    Turn,
    draw_adapter,
    draw_types,
    make_signature,
    render_chat,
)
from fst_dspy.embedded.corpus.words import ENGLISH, HELD_OUT

Items = tuple[str, ...]
OPERATIONS: Mapping[str, Callable[[Items], Items]] = {
    "reverse": lambda items: items[::-1],
    "first": lambda items: items[:1],
    "last": lambda items: items[-1:],
    "rest": lambda items: items[1:],
    "trim": lambda items: items[:-1],
    "rotate": lambda items: (*items[1:], *items[:1]),
    "ends": lambda items: items if len(items) < 2 else (items[0], items[-1]),
    "swap": lambda items: (*items[1::-1], *items[2:]),
}
TASKS = (
    "Run the {p} on the {i}.",
    "Run the {p} on the {i} and give the {o}.",
    "Apply the {p} to the {i}.",
    "What does the {p} make of the {i}?",
    "Predict the {o} of the {p}.",
)
WORDINGS = (
    "{k} means {v}.", "{k} means {v}.", "{k} means {v}.", "{k} stands for {v}.", "{k} is {v}.",
    "{k}: {v}", "{k} = {v}", "{k} -> {v}", "The word {k} means {v}.",
)  # fmt: skip
FIELDS = (("words", "program", "output"), ("words", "program", "output"),
          ("list", "code", "result"), ("items", "steps", "answer"))  # fmt: skip


def explain(rng: Random, meanings: Mapping[str, str]) -> str:
    """The meaning of every word, one a line, in one wording."""
    wording = rng.choice(WORDINGS)
    words = rng.sample(list(meanings), len(meanings))
    return "\n".join(wording.format(k=word, v=meanings[word]) for word in words)


def run(names: Sequence[str], items: Items) -> list[Items]:
    """The list after each of the operations."""
    states = []
    for name in names:
        items = OPERATIONS[name](items)
        states.append(items)
    return states


def draw_program(rng: Random, meanings: Mapping[str, str], length: int) -> list[str]:
    """Different words of ``meanings`` that leave something of every list of three or more."""
    while True:
        program = rng.sample(list(meanings), min(length, len(meanings)))
        if all(run([meanings[word] for word in program], ("a", "b", "c"))):
            return program


def draw_items(rng: Random, words: Sequence[str], size: int) -> Items:
    """``size`` different words."""
    return tuple(rng.sample(words, size))


def _turn(
    fields: tuple[str, str, str],
    items: Items,
    program: Sequence[str],
    meanings: Mapping[str, str],
    known: set[str],
) -> Turn:
    reasoning: list[Piece] = []
    states = run([meanings[word] for word in program], items)
    for word, state in zip(program, states, strict=True):
        weight = HEAVY if word in known else LIGHT
        reasoning += [Piece(word, HEAVY), Piece(" means "), Piece(meanings[word], weight)]
        reasoning += [Piece(": "), *(p for item in state for p in (Piece(item, HEAVY), Piece(" ")))]
        reasoning[-1:] = [Piece(". ")]
    reasoning[-1] = Piece(".")
    answer = [piece for item in states[-1] for piece in (Piece(item, HEAVY), Piece(" "))][:-1]
    source, program_name, target = fields
    return Turn(
        {source: " ".join(items), program_name: " then ".join(program)},
        {"reasoning": reasoning, target: answer},
    )


def chat(rng: Random, sizes: tuple[int, int] = (3, 5)) -> list[Message]:
    """A chat in DSPy's format, with the words explained in the instruction, by demos, or not."""
    fields = rng.choice(FIELDS)
    names = dict(zip("ipo", fields, strict=True))
    mode = rng.choices(["stated", "partly", "demos", "bare"], [0.6, 0.14, 0.14, 0.12])[0]
    words = rng.sample(ENGLISH, len(OPERATIONS) + 40)
    keys, others = words[: len(OPERATIONS)], words[len(OPERATIONS) :]
    meanings = dict(zip(keys, rng.sample(list(OPERATIONS), len(keys)), strict=True))
    stated = {"stated": keys, "partly": keys[: len(keys) // 2]}.get(mode, [])
    instructions = rng.choice(TASKS).format(**names)
    if stated:
        instructions += "\n" + explain(rng, {key: meanings[key] for key in stated})
    source, program_name, target = fields
    signature = make_signature(
        dict.fromkeys((source, program_name)),
        {"reasoning": None, target: None},
        instructions,
        draw_types(rng),
    )
    if mode == "bare":  # nobody can know: each word means anything
        meanings = {key: rng.choice(list(OPERATIONS)) for key in keys}
    asked = rng.sample(keys, 4) if mode == "demos" else keys
    known, turns = set(stated), []
    for _ in range(rng.randint(3, 5) if mode == "demos" else rng.choice([1, 1, 2, 3])):
        program = draw_program(rng, {key: meanings[key] for key in asked}, rng.choice([1, 2, 2]))
        items = draw_items(rng, others, rng.randint(*sizes))
        turns.append(_turn(fields, items, program, meanings, known))
        known |= set(program)
    return render_chat(draw_adapter(rng), signature, turns)


def drill(rng: Random) -> list[Message]:
    """Operations by their own names on one list, one after the other."""
    items = draw_items(rng, ENGLISH, rng.randint(2, 5))
    content, spans = "", []
    for name in rng.sample(list(OPERATIONS), len(OPERATIONS)):
        content += f"{name}: "
        for item in OPERATIONS[name](items):
            content += item
            spans.append((len(content) - len(item), len(content), HEAVY))
            content += " "
        content = content[:-1] + ".\n"
    return [Message("user", " ".join(items)), Message("assistant", content, 1.0, tuple(spans))]


class ListProgram:
    """See the module docstring; satisfies ``Family``."""

    name = "list_program"
    warmup: tuple[Stage, ...] = ()
    share = 1.5

    def sample(self, rng: Random, stage: str) -> list[Message]:
        """Mostly programs in DSPy's format, and in the joint stage some drills."""
        if stage == "joint" and rng.random() < 0.15:
            return drill(rng)
        return chat(rng)

    def questions(self, rng: Random, count: int, unseen: bool = False) -> list[Question]:
        """Programs of two words, out of eight, on four items."""
        words = sorted(HELD_OUT if unseen else ENGLISH)
        questions = []
        for _ in range(count):
            rng.shuffle(words)
            keys, others = words[: len(OPERATIONS)], words[len(OPERATIONS) :]
            meanings = dict(zip(keys, rng.sample(list(OPERATIONS), len(keys)), strict=True))
            program, items = draw_program(rng, meanings, 2), draw_items(rng, others, 4)
            task = "Run the program on the words."
            signature = make_signature(
                {"words": None, "program": None}, {"reasoning": None, "output": None}, task
            )
            listed = "\n".join(f"{key} means {name}." for key, name in meanings.items())
            answer = " ".join(run([meanings[word] for word in program], items)[-1])
            inputs = {"words": " ".join(items), "program": " then ".join(program)}
            questions.append(Question(signature, f"{task}\n{listed}", inputs, "output", answer))
        return questions
