"""The skill of walking over a field of squares by rules that the prompt states.

Worlds differ in size, in the words for what lies where, for the directions, and in how they are
seen. What is to be kept off, and which way to go, is in the instruction; where nothing says so, any
step is as good as another. A ``reasoning`` looks in one direction after the other, the ones that
the rules prefer first, and says of each whether it can be walked; the first that can is the step.
Episodes are really walked, and so are their histories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from fst_dspy.embedded.corpus.base import Message, Question, Stage
from fst_dspy.embedded.corpus.render import (
    HEAVY,
    PLAIN,
    Piece,
    Turn,
    draw_adapter,
    draw_types,
    make_signature,
    render_chat,
)
from fst_dspy.embedded.corpus.words import EDGES, ENGLISH, HELD_OUT, PLACES

STEPS = ((0, -1), (1, 0), (0, 1), (-1, 0))
COMPASS = (("left", "down", "right", "up"), ("west", "south", "east", "north"))
TASKS = (
    "Choose the next step to the {g}.",
    "Choose the next step over the {f} to the {g}.",
    "Find a way to the {g}.",
    "Which way do you go next?",
    "You walk over {f} and look for the {g}. Say the next step.",
    "Get to the {g}, one step at a time.",
    "Pick a direction.",
)
KEEP_OFF = (
    "Never step where it says {h}.",
    "Do not step on a {h}.",
    "Do not step into a {h}.",
    "Keep off every {h}.",
    "Stay away from {h}.",
    "A {h} ends it all.",
    "Avoid the {h}.",
)
EITHER = (
    "Step {a} or {b} where it says {f}.",
    "Step {a} or {b} towards the {g}.",
    "Go {a} or {b}.",
    "Go {a} or {b} where there is {f}.",
    "Walk {a} or {b} whenever you can.",
    "The {g} is {a} and {b} of here: step {a} or {b}.",
)
IN_ORDER = (
    "Go {a} first, otherwise {b}.",
    "Step {a} where it says {f}; where it does not, step {b}.",
    "Walk {a} whenever you can, else {b}.",
    "First {a}, then {b}.",
)
TOWARDS = ("Go towards the {g}.", "Every step should bring you nearer to the {g}.")
OTHERWISE = (
    "Where both are {h}, go another way round.",
    "If neither can be walked, go back and round.",
    "If you are stuck, take any other way.",
)
BUMP = 0.3
"""How often a step against the edge will do, where no rule says which way to go."""
YES, NO = "yes", "no"


@dataclass(frozen=True)
class Rules:
    """What the instruction states.

    Attributes:
        keep_off: The word for deadly squares is told.
        wanted: Directions to go, by name; empty: none are told.
        ordered: The first of them before the second.
        towards: To go wherever the goal is nearer.
    """

    keep_off: bool = False
    wanted: tuple[str, ...] = ()
    ordered: bool = False
    towards: bool = False

    @property
    def leads(self) -> bool:
        """Whether they say where to go."""
        return self.towards or bool(self.wanted)


@dataclass
class World:
    """A field of squares and a walker.

    Attributes:
        names: Of the four directions, as in ``STEPS``.
        free, deadly, goal, edge: The words for what is seen.
        deadly_at, goal_at, at: Rows and columns.
        size: Rows, and columns.
    """

    names: tuple[str, ...]
    free: str
    deadly: str
    goal: str
    edge: str
    size: int
    deadly_at: frozenset[tuple[int, int]]
    goal_at: tuple[int, int]
    at: tuple[int, int]

    def seen(self) -> dict[str, str]:
        """The word for what lies in each direction."""
        found = {}
        for name, (down, right) in zip(self.names, STEPS, strict=True):
            there = (self.at[0] + down, self.at[1] + right)
            inside = all(0 <= place < self.size for place in there)
            if there == self.goal_at:
                found[name] = self.goal
            else:
                on = self.deadly if there in self.deadly_at else self.free
                found[name] = on if inside else self.edge
        return found

    def away(self) -> dict[str, int]:
        """Steps to the goal, down and right, or up and left, by name."""
        down, right = (goal - place for goal, place in zip(self.goal_at, self.at, strict=True))
        vertical = self.names[1] if down >= 0 else self.names[3]
        sideways = self.names[2] if right >= 0 else self.names[0]
        return {vertical: abs(down), sideways: abs(right)}

    def step(self, name: str) -> None:
        """Take a step; one against the edge changes nothing."""
        down, right = STEPS[self.names.index(name)]
        there = (self.at[0] + down, self.at[1] + right)
        if all(0 <= place < self.size for place in there):
            self.at = there


@dataclass(frozen=True)
class Look:
    """How a world is put into words: order of the directions, what stands between, the goal's."""

    order: tuple[str, ...]
    glue: str
    goal: str | None
    comma: str

    def of(self, world: World) -> str:
        """What the walker sees."""
        seen = world.seen()
        parts = [f"{name}: {seen[name]}" for name in self.order]
        if self.goal is not None:
            way = self.comma.join(f"{count} {name}" for name, count in world.away().items())
            parts.append(f"{self.goal}: {way}")
        return self.glue.join(parts)


def draw_names(rng: Random) -> tuple[str, ...]:
    """Names of the four directions."""
    draw = rng.random()
    if draw < 0.9:
        return COMPASS[0] if draw < 0.65 else COMPASS[1]
    return tuple(rng.sample(ENGLISH, 4))


def draw_world(
    rng: Random, names: tuple[str, ...], words: Sequence[str], sizes: tuple[int, int] = (3, 6)
) -> World:
    """A world of some size, a fifth to a third of it deadly, and a walker anywhere."""
    size = rng.randint(*sizes)
    squares = [(row, column) for row in range(size) for column in range(size)]
    deadly = frozenset(place for place in squares if rng.random() < rng.uniform(0.2, 0.35))
    at, goal_at = rng.sample(squares, 2)
    if rng.random() < 0.4:  # the goal in a corner
        at, goal_at = rng.choice(squares[:-1]), squares[-1]
    free, bad, goal, edge = words
    return World(names, free, bad, goal, edge, size, deadly - {at, goal_at}, goal_at, at)


@dataclass(frozen=True)
class Looked:
    """A direction that was looked in: its name, what lies there, and whether it can be walked."""

    name: str
    word: str
    good: bool


def look_round(rng: Random, world: World, rules: Rules, last: str | None = None) -> list[Looked]:
    """Directions up to the first that can be walked; all four where none can.

    Those that the rules prefer come first, and the way back (from ``last``) comes at the end. Which
    of several as good as each other comes first is drawn.
    """
    seen = world.seen()
    wanted = [*rules.wanted] or [n for n, count in world.away().items() if rules.towards and count]
    if not rules.ordered:
        rng.shuffle(wanted)
    others = [name for name in world.names if name not in wanted]
    rng.shuffle(others)
    if wanted and last is not None:
        others.sort(key=lambda name: name == opposite(world.names, last))
    found: list[Looked] = []
    for name in (*wanted, *others):
        word = seen[name]
        if rules.leads:
            good = word in (world.free, world.goal)
        else:
            kept_off = rules.keep_off and word == world.deadly
            good = not kept_off and (word != world.edge or rng.random() < BUMP)
        found.append(Looked(name, word, good))
        if good:
            break
    return found


def opposite(names: Sequence[str], name: str) -> str:
    """The direction back."""
    return names[(list(names).index(name) + 2) % 4]


def draw_rules(rng: Random, names: Sequence[str]) -> Rules:
    """Rules of some kind, or none."""
    draw = rng.random()
    if draw < 0.12:
        return Rules()
    if draw < 0.3:
        return Rules(keep_off=True)
    keep_off = rng.random() < 0.8
    if draw < 0.42:
        return Rules(keep_off, towards=True)
    first = rng.randrange(4)
    second = (first + rng.choice([1, 3])) % 4
    return Rules(keep_off, (names[first], names[second]), ordered=rng.random() < 0.5)


def stated(rng: Random, rules: Rules, world: World) -> str:
    """The rules in words."""
    words = {"f": world.free, "h": world.deadly, "g": world.goal}
    lines = []
    if rules.keep_off:
        lines.append(rng.choice(KEEP_OFF).format(**words))
    if rules.towards:
        lines.append(rng.choice(TOWARDS).format(**words))
    elif rules.wanted:
        a, b = rules.wanted
        form = rng.choice(IN_ORDER if rules.ordered else EITHER)
        lines.append(form.format(a=a, b=b, **words))
    rng.shuffle(lines)
    if rules.leads and rng.random() < 0.4:
        lines.append(rng.choice(OTHERWISE).format(**words))
    glue = rng.choice(["\n", " ", " ", "; "])
    if glue == "; ":
        lines = [line[0].lower() + line[1:-1] for line in lines]
        return glue.join(lines).capitalize() + "." if lines else ""
    return glue.join(lines)


def walk(rng: Random, world: World, look: Look, rules: Rules, steps: int) -> list[tuple[str, str]]:
    """Steps really taken, each with what was seen then; fewer where one would have ended it."""
    taken: list[tuple[str, str]] = []
    for _ in range(steps):
        last = taken[-1][0] if taken else None
        name = look_round(rng, world, rules, last)[-1].name
        if world.seen()[name] in (world.deadly, world.goal):
            break
        world.step(name)
        taken.append((name, look.of(world)))
    return taken


def told(taken: Sequence[tuple[str, str]]) -> str:
    """A history as ``fst_dspy.env`` writes it."""
    lines = [f"{n}. {name} -> {' '.join(seen.split())}" for n, (name, seen) in enumerate(taken, 1)]
    return "\n".join(lines) or "(nothing yet)"


def turn(
    rng: Random, world: World, look: Look, rules: Rules, taken: Sequence[tuple[str, str]]
) -> Turn:
    """The next step, after those taken."""
    last = taken[-1][0] if taken else None
    looked = look_round(rng, world, rules, last)
    reasoning: list[Piece] = []
    for number, each in enumerate(looked):
        named = HEAVY if rules.ordered and number < len(rules.wanted) else PLAIN
        reasoning += [Piece(each.name, named), Piece(": "), Piece(each.word, HEAVY), Piece(", ")]
        reasoning += [Piece(YES if each.good else NO, HEAVY), Piece(". ")]
    reasoning[-1] = Piece(".")
    return Turn(
        {"observation": look.of(world), "history": told(taken)},
        {"reasoning": reasoning, "action": [Piece(looked[-1].name, HEAVY)]},
    )


def chat(rng: Random, sizes: tuple[int, int] = (3, 6)) -> list[Message]:
    """A chat in DSPy's format: some steps in worlds of one kind, under one set of rules."""
    names = draw_names(rng)
    pool = PLACES if rng.random() < 0.7 else ENGLISH
    edge = rng.choice(EDGES)
    words = [*rng.sample([w for w in pool if w not in (*names, *EDGES)], 3), edge]
    rules = draw_rules(rng, names)
    world = draw_world(rng, names, words, sizes)
    order = names if rng.random() < 0.5 else tuple(rng.sample(names, 4))
    goal = world.goal if rules.towards or rng.random() < 0.7 else None
    look = Look(order, rng.choice(["; ", "; ", ", ", "\n"]), goal, rng.choice([", ", " "]))
    task = rng.choice(TASKS).format(f=world.free, g=world.goal)
    text = stated(rng, rules, world)
    parts = [task, text] if rng.random() < 0.75 else [text or task]
    instructions = rng.choice(["\n", " "]).join(part for part in parts if part)
    listed = f"{', '.join(names[:-1])} {rng.choice(['or', 'and'])} {names[-1]}"
    described = rng.choice([None, f"one of {listed}", f"The next step: {listed}."])
    remembers = rng.random() < 0.4
    inputs = ("observation", "history") if remembers else ("observation",)
    outputs = ("reasoning", "action") if rng.random() < 0.65 else ("action",)
    signature = make_signature(
        dict.fromkeys(inputs),
        {name: described if name == "action" else None for name in outputs},
        instructions,
        draw_types(rng, {"action": names}),
    )
    turns = []
    count = rng.choice([1, 2, 3, 4])
    for _ in range(count):
        world = draw_world(rng, names, words, sizes)
        steps = rng.choice([0, 0, 1, 2] if count > 1 else [0, 2, 4, 6, 8])
        taken = walk(rng, world, look, rules, steps) if remembers else []
        made = turn(rng, world, look, rules, taken)
        written = {n: made.outputs[n] for n in outputs}
        if "reasoning" not in outputs and not rules.ordered:  # which one is left open
            written["action"] = [Piece(each.text, PLAIN) for each in written["action"]]
        turns.append(Turn({n: made.inputs[n] for n in inputs}, written))
    return render_chat(draw_adapter(rng), signature, turns)


class Walking:
    """See the module docstring; satisfies ``Family``."""

    name = "walking"
    warmup: tuple[Stage, ...] = ()
    share = 1.2

    def sample(self, rng: Random, stage: str) -> list[Message]:
        """Walks in DSPy's format."""
        return chat(rng)

    def questions(self, rng: Random, count: int, unseen: bool = False) -> list[Question]:
        """Steps that the ideal prompt decides, with nothing walked before."""
        pool = sorted(HELD_OUT) if unseen else PLACES
        questions: list[Question] = []
        while len(questions) < count:
            names = COMPASS[0]
            world = draw_world(rng, names, [*rng.sample(pool, 3), rng.choice(EDGES)])
            rules = Rules(True, (names[2], names[1]), ordered=True)
            looked = look_round(rng, world, rules)
            if not looked[-1].good or len(looked) > len(rules.wanted):
                continue
            look = Look(names, "; ", world.goal, ", ")
            task = "Choose the next step."
            said = f"Never step where it says {world.deadly}. Go right first, otherwise down."
            signature = make_signature(
                {"observation": None, "history": None}, {"reasoning": None, "action": None}, task
            )
            inputs = {"observation": look.of(world), "history": told([])}
            answer = looked[-1].name
            questions.append(Question(signature, f"{task}\n{said}", inputs, "action", answer))
        return questions
