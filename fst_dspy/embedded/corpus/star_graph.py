"""The skill of finding a path in a star: many arms leave the start, one of them ends at the goal.

Walking forward, the first step is a guess; walking back from the goal, every step is determined.
The model follows whichever way the prompt asks for, in the instruction or in its demos, and where
neither says, it nearly always walks forward, as language models do (Bachmann and Nagarajan, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

BACK_BY_CHANCE = 0.05
"""Share of walks that go back where the prompt does not say which way."""
TASKS = (
    "Find the path from the {s} to the {g}.",
    "Find the way from the {s} to the {g} in the {e}.",
    "Give the path from {s} to {g}.",
    "Which path leads from the {s} to the {g}?",
    "Read the {e} and give the path.",
)
BACK = (
    "Begin at the {g} and walk back to the {s}.",
    "Work backwards from the {g}.",
    "Go back from the {g}, one edge at a time.",
    "Start at the {g} and follow the edges back.",
    "Only one edge leads into the {g}: follow it back.",
    "Walk back from the {g} to the {s}.",
    "Trace the path in reverse, from the {g}.",
    "Do not begin at the {s}: begin at the {g} and walk back.",
)
FORTH = (
    "Begin at the {s} and walk on to the {g}.",
    "Work forwards from the {s}.",
    "Go on from the {s}, one edge at a time.",
    "Start at the {s} and follow the edges.",
    "Walk from the {s} to the {g}.",
)
GLUES = (", ", ", ", "; ", "\n")
FIELDS = (("graph", "start", "goal"), ("graph", "start", "goal"), ("edges", "source", "target"),
          ("map", "origin", "destination"))  # fmt: skip


@dataclass(frozen=True)
class Star:
    """A star graph: arms of equal length around a centre, the first of which ends at the goal."""

    center: str
    arms: tuple[tuple[str, ...], ...]

    @property
    def path(self) -> tuple[str, ...]:
        """From the centre to the goal."""
        return (self.center, *self.arms[0])

    @property
    def edges(self) -> list[tuple[str, str]]:
        """All edges, away from the centre, arm by arm."""
        return [edge for arm in self.arms for edge in zip((self.center, *arm), arm, strict=False)]


def draw_star(rng: Random, degree: int, length: int, words: Sequence[str]) -> Star:
    """A star of ``degree`` arms of ``length`` nodes each, the nodes different words."""
    center, *nodes = rng.sample(words, 1 + degree * length)
    arms = tuple(tuple(nodes[i * length : (i + 1) * length]) for i in range(degree))
    return Star(center, arms)


def _turn(
    rng: Random,
    star: Star,
    fields: tuple[str, str, str],
    glue: str,
    way: str,
    untold_weight: float = LIGHT,
) -> Turn:
    """``way``: ``"back"`` or ``"forth"``, as the prompt says, or ``"any"``."""
    edges = star.edges
    rng.shuffle(edges)
    back = way == "back" or (way == "any" and rng.random() < BACK_BY_CHANCE)
    told = untold_weight if way == "any" else HEAVY
    walk: list[Piece]
    if back:
        path = star.path
        walk = [Piece("Backwards", told), Piece(": ")]
        for node in reversed(path):
            walk += [Piece(node, HEAVY), Piece(" ")]
    else:
        path = (star.center, *rng.choice(star.arms))
        walk = [Piece("Forwards", told), Piece(": ")]
        for index, node in enumerate(path):
            walk += [Piece(node, LIGHT if index == 1 else HEAVY), Piece(" ")]
    answer = [piece for node in path for piece in (Piece(node, HEAVY), Piece(" "))][:-1]
    graph, start, goal = fields
    return Turn(
        {
            graph: glue.join(f"{a} {b}" for a, b in edges),
            start: star.center,
            goal: star.path[-1],
        },
        {"reasoning": [*walk[:-1], Piece(".")], "path": answer},
    )


def chat(
    rng: Random, degrees: tuple[int, int] = (2, 9), untold_weight: float = LIGHT
) -> list[Message]:
    """A chat in DSPy's format: the way to walk is in the instruction, in the demos, or nowhere.

    Where it is nowhere, the word that names the way weighs ``untold_weight``; a heavy one makes
    such chats half of all and teaches how seldom the model is to walk back unasked.
    """
    fields = rng.choice(FIELDS)
    names = dict(zip("esg", fields, strict=True))
    glue = rng.choice(GLUES)
    untold = 0.75 if untold_weight == HEAVY else 0.25
    mode = rng.choices(["back", "forth", "demos", "any"], [0.5, 0.12, 0.13, untold])[0]
    way = "back" if mode == "demos" else mode
    instructions = rng.choice(TASKS).format(**names)
    if mode in ("back", "forth"):
        hint = rng.choice(BACK if mode == "back" else FORTH).format(**names)
        lines = [instructions, hint] if rng.random() < 0.9 else [hint, instructions]
        instructions = rng.choice(["\n", "\n", " "]).join(lines)
    signature = make_signature(
        dict.fromkeys(fields), {"reasoning": None, "path": None}, instructions, draw_types(rng)
    )
    turns = []
    for _ in range(2 if mode == "demos" else rng.choice([1, 1, 1, 2])):
        star = draw_star(rng, rng.randint(*degrees), rng.choice([2, 3, 3, 4]), ENGLISH)
        turns.append(_turn(rng, star, fields, glue, way, untold_weight))
    return render_chat(draw_adapter(rng), signature, turns)


def drill(rng: Random) -> list[Message]:
    """Edges, then many of them again, target first: a source has to be read off its target."""
    star = draw_star(rng, rng.randint(2, 7), rng.randint(2, 4), ENGLISH)
    edges = star.edges
    rng.shuffle(edges)
    content, spans = "", []
    for a, b in rng.choices(edges, k=16):
        content += f"{b} {a}"
        spans.append((len(content) - len(a), len(content), HEAVY))
        content += ", "
    listed = rng.choice(GLUES).join(f"{a} {b}" for a, b in edges)
    return [Message("user", listed), Message("assistant", content, 0.05, tuple(spans))]


class StarGraph:
    """See the module docstring; satisfies ``Family``."""

    name = "star_graph"
    warmup: tuple[Stage, ...] = (Stage("edges back", 200, 0.9), Stage("chats", 300, 0.93))
    share = 1.0

    def sample(self, rng: Random, stage: str) -> list[Message]:
        """Edges read backwards, in the first stage alone and then among stars in DSPy's format."""
        if stage == "edges back" or (stage in ("chats", "joint") and rng.random() < 0.15):
            return drill(rng)
        if stage == "calibrate":
            return chat(rng, (5, 9), HEAVY)
        return chat(rng, (5, 9) if stage == "polish" else (2, 9))

    def questions(self, rng: Random, count: int, unseen: bool = False) -> list[Question]:
        """Stars of 8 arms of 3 nodes (of 4 arms of 3, with ``unseen`` words)."""
        words = sorted(HELD_OUT if unseen else ENGLISH)
        questions = []
        for _ in range(count):
            star = draw_star(rng, 4 if unseen else 8, 3, words)
            turn = _turn(rng, star, ("graph", "start", "goal"), ", ", "back")
            task = "Find the path from the start to the goal."
            signature = make_signature(
                dict.fromkeys(turn.inputs), {"reasoning": None, "path": None}, task
            )
            ideal = f"{task}\nBegin at the goal and walk back to the start."
            questions.append(
                Question(signature, ideal, dict(turn.inputs), "path", " ".join(star.path))
            )
        return questions
