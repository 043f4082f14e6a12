"""The skill of fulfilling missions in a room: find the thing, turn, walk, pick it up, open with it.

Which colour of key opens which colour of door is stated in the prompt, or else taken to be its own.
The ``reasoning`` says what is to be fetched, where it lies and what is straight ahead; the action
follows from that. Rooms, things, words and rules are drawn anew for every chat.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from fst_dspy.embedded.corpus.base import Message, Question, Stage
from fst_dspy.embedded.corpus.render import (
    HEAVY,
    LIGHT,
    PLAIN,
    Piece,
    Turn,
    draw_adapter,
    draw_types,
    make_signature,
    render_chat,
)
from fst_dspy.embedded.corpus.words import COLOURS, ENGLISH, HELD_OUT

Place = tuple[int, int]
FACING: tuple[Place, ...] = ((1, 0), (0, 1), (-1, 0), (0, -1))
"""Ways to face, clockwise, in columns and rows."""
ACTIONS = ("left", "right", "forward", "pickup", "toggle")
VERBS = (ACTIONS, ACTIONS, ACTIONS, ("left", "right", "go", "take", "use"))
KINDS = (("door", "key", "ball"), ("door", "key", "ball"), ("gate", "coin", "box"),
         ("chest", "key", "toy"), ("cabinet", "card", "book"))  # fmt: skip
TASKS = (
    "Do what the mission says.",
    "Choose what to do next.",
    "Choose the next action.",
    "You are in a room. Fulfil the mission, one action at a time.",
    "Say the next action that brings you nearer to the mission's end.",
)
MEANINGS = (
    "{0} and {1} turn you, {2} is a step, {3} takes what is ahead, {4} opens a {d} ahead.",
    "{2} walks on, {0} and {1} turn on the spot, {3} picks up what is in front, {4} opens.",
    "Take with {3}, open with {4}, walk with {2}, turn with {0} or {1}.",
)
ADVICE = (
    "Fetch the {k}, take it to the {d} and open.",
    "First get the right {k}, then go to the {d}.",
    "Turn towards it and walk until it is ahead.",
    "Bring the right {k} to the {d} and {4} it.",
)
FITS = (
    "{a} {d}s need the {b} {k}.",
    "{a} {d}s need the {b} {k}.",
    "{a} {d}s need the {b} {k} in this house.",
    "The {a} {d} takes the {b} {k} here.",
    "Open {a} {d}s with the {b} {k}.",
    "For {a} {d}s fetch the {b} {k}.",
    "{a} {d}s: {b} {k}",
    "{a} -> {b}",
)
OPEN, GO, PICK = "open the {c} {d}", "go to the {c} {o}", "pick up the {c} {o}"
OWN_COLOUR = 0.85
"""How often a key is taken to be of the door's own colour where nothing says which it is."""
NONE = "none"


@dataclass(frozen=True)
class Thing:
    """Something in a room."""

    colour: str
    kind: str
    at: Place

    @property
    def name(self) -> str:
        """As it is called."""
        return f"{self.colour} {self.kind}"


@dataclass
class Room:
    """A room of ``size`` columns and rows within walls, its things, and who is in it."""

    size: int
    things: list[Thing]
    at: Place
    facing: int
    carried: str = ""

    @property
    def ahead(self) -> Place:
        """The place straight ahead."""
        return _step(self.at, self.facing)

    def inside(self, place: Place) -> bool:
        """Whether it is no wall."""
        return all(0 <= coordinate < self.size for coordinate in place)

    def on(self, place: Place) -> Thing | None:
        """What lies there."""
        return next((thing for thing in self.things if thing.at == place), None)

    def named(self, place: Place) -> str:
        """What is there, in words."""
        thing = self.on(place)
        return thing.name if thing else "free" if self.inside(place) else "wall"

    def where(self, place: Place) -> str:
        """A place as seen from here."""
        away = (place[0] - self.at[0], place[1] - self.at[1])
        forward, right = FACING[self.facing], FACING[(self.facing + 1) % 4]
        ahead = away[0] * forward[0] + away[1] * forward[1]
        aside = away[0] * right[0] + away[1] * right[1]
        parts = [f"{abs(ahead)} {'ahead' if ahead > 0 else 'behind'}"] if ahead else []
        parts += [f"{abs(aside)} {'right' if aside > 0 else 'left'}"] if aside else []
        return " ".join(parts)

    def look(self, glue: str) -> str:
        """All that is seen."""
        seen = [f"{thing.name}: {self.where(thing.at)}" for thing in self.things]
        seen.append(f"straight ahead: {self.named(self.ahead)}")
        seen.append(f"you carry: {self.carried or 'nothing'}")
        return glue.join(seen)

    def moves(self, goal: Place) -> set[int]:
        """First moves (0 left, 1 right, 2 forward) of all shortest ways to have ``goal`` ahead."""
        start = (self.at, self.facing)
        firsts: dict[tuple[Place, int], set[int]] = {start: set()}
        depth, queue = {start: 0}, deque([start])
        found, best = set(), None
        while queue:
            state = queue.popleft()
            if best is not None and depth[state] > best:
                break
            at, facing = state
            if _step(at, facing) == goal:
                found |= firsts[state]
                best = depth[state]
                continue
            following = [(at, (facing - 1) % 4), (at, (facing + 1) % 4)]
            ahead = _step(at, facing)
            if self.inside(ahead) and self.on(ahead) is None:
                following.append((ahead, facing))
            for move, there in enumerate(following):
                first = firsts[state] or {move}
                if there not in depth:
                    depth[there] = depth[state] + 1
                    firsts[there] = set(first)
                    queue.append(there)
                elif depth[there] == depth[state] + 1:
                    firsts[there] |= first
        return found


def _step(at: Place, facing: int) -> Place:
    return (at[0] + FACING[facing][0], at[1] + FACING[facing][1])


def plain_move(room: Room, goal: Place) -> int | None:
    """The move of a simple walker: on while the goal is ahead and the way free, else towards it."""
    forward, right = FACING[room.facing], FACING[(room.facing + 1) % 4]
    away = (goal[0] - room.at[0], goal[1] - room.at[1])
    ahead = away[0] * forward[0] + away[1] * forward[1]
    aside = away[0] * right[0] + away[1] * right[1]
    if ahead > 0 and room.named(room.ahead) == "free":
        return 2
    return None if aside == 0 else int(aside > 0)


def draw_room(rng: Random, colours: Sequence[str], kinds: Sequence[str], size: int) -> Room:
    """A room with things of these kinds and colours, in order; a door is in a wall."""
    squares = [(x, y) for x in range(size) for y in range(size)]
    free = rng.sample(squares, len(kinds) + 1)
    things = []
    for colour, kind, at in zip(colours, kinds, free, strict=False):
        if kind in DOORS:
            along = rng.randrange(size)
            at = rng.choice([(size, along), (-1, along), (along, size), (along, -1)])
        things.append(Thing(colour, kind, at))
    rng.shuffle(things)
    return Room(size, things, free[-1], rng.randrange(4))


DOORS = frozenset(kinds[0] for kinds in KINDS)


@dataclass(frozen=True)
class Mission:
    """What is to be done in a room, and what the reasoning says of it.

    Attributes:
        text: The mission.
        goal: Name of the thing to have ahead, or what to fetch first.
        act: Index of the action to take once it is straight ahead.
        said: Pieces of the reasoning before the goal's place.
        decided: Whether the prompt says what to fetch.
    """

    text: str
    goal: str
    act: int
    said: tuple[Piece, ...] = ()
    decided: bool = True


def turn(rng: Random, room: Room, mission: Mission, verbs: Sequence[str], glue: str) -> Turn:
    """What the room looks like, and what to do in it."""
    goal = next((thing for thing in room.things if thing.name == mission.goal), None)
    where = room.where(goal.at) if goal else NONE
    ahead = room.named(room.ahead)
    reasoning = [
        *mission.said,
        Piece(mission.goal, HEAVY if mission.decided else LIGHT),
        Piece(": "),
        Piece(where, HEAVY),
        Piece(". straight ahead: "),
        Piece(ahead, HEAVY),
        Piece("."),
    ]
    weight = HEAVY
    if goal is None:
        action, weight = rng.randrange(4), LIGHT
    elif ahead == mission.goal:
        action = mission.act
    else:
        moves, plain = room.moves(goal.at), plain_move(room, goal.at)
        weight = HEAVY if len(moves) == 1 or plain in moves else PLAIN
        if plain is not None and plain in moves:
            action = plain
        else:
            action = rng.choice(sorted(moves) or [0, 1])
    return Turn(
        {"mission": mission.text, "observation": room.look(glue)},
        {"reasoning": reasoning, "action": [Piece(verbs[action], weight)]},
    )


def unlocking(
    rng: Random,
    rule: Mapping[str, str],
    known: set[str],
    kinds: Sequence[str],
    colours: Sequence[str],
    size: int,
) -> tuple[Room, Mission]:
    """A room with a locked door, two or three keys, and what is carried."""
    door, key, _ = kinds
    colour = rng.choice(list(rule))
    decided = colour in known
    fits = rule[colour] if decided else colour
    there = [rule[colour]] if rng.random() < 0.95 else []
    if not decided:
        fits = colour if rng.random() < OWN_COLOUR else rng.choice(colours)
        there = [fits] if rng.random() < 0.5 else []
    others = rng.sample([c for c in colours if c != fits], rng.choice([1, 1, 2]))
    keys = [*there, *others]
    room = draw_room(rng, [colour, *keys], [door, *[key] * len(keys)], size)
    if rng.random() < 0.5:
        room.carried = f"{fits if rng.random() < 0.9 else others[0]} {key}"
        room.things = [thing for thing in room.things if thing.name != room.carried]
    weight = HEAVY if decided else LIGHT
    said = (
        Piece(f"{colour} {door}", HEAVY), Piece("s need the "), Piece(fits, weight),
        Piece(f" {key}. you carry: "), Piece(room.carried or "nothing", HEAVY), Piece(". "),
    )  # fmt: skip
    has = room.carried == f"{fits} {key}"
    goal = f"{colour} {door}" if has else f"{fits} {key}"
    text = OPEN.format(c=colour, d=door)
    return room, Mission(text, goal, 4 if has else 3, said)


def reaching(
    rng: Random, kinds: Sequence[str], colours: Sequence[str], size: int, verbs: Sequence[str]
) -> tuple[Room, Mission]:
    """A room with things to go to or to pick up."""
    thing = kinds[rng.choice([1, 2])]
    drawn = rng.sample(list(colours), rng.choice([2, 3]))
    room = draw_room(rng, drawn, [thing] * len(drawn), size)
    form, act = rng.choice([(GO, 3), (PICK, 3)])
    return room, Mission(form.format(c=drawn[0], o=thing), f"{drawn[0]} {thing}", act)


def chat(rng: Random) -> list[Message]:
    """A chat in DSPy's format: moments in some rooms of one house."""
    kinds, verbs = rng.choice(KINDS), rng.choice(VERBS)
    palette = COLOURS if rng.random() < 0.6 else ENGLISH
    colours = rng.sample([c for c in palette if c not in kinds], rng.randint(4, 7))
    keys = rng.sample(colours, len(colours))
    rule = dict(zip(colours, keys, strict=True))
    mode = rng.choices(["stated", "partly", "bare"], [0.7, 0.1, 0.2])[0]
    known = {"stated": colours, "partly": colours[: len(colours) // 2]}.get(mode, [])
    door, key, _ = kinds
    words = {"d": door, "k": key}
    lines = [rng.choice(TASKS)]
    if rng.random() < 0.4:
        lines.append(rng.choice(MEANINGS).format(*verbs, **words))
    unlocks = rng.random() < 0.7
    if rng.random() < 0.3 and unlocks:
        lines = [rng.choice(ADVICE).format(*verbs, **words)]
    if unlocks:
        form = rng.choice(FITS)
        fits = [form.format(a=a, b=rule[a], **words) for a in rng.sample(known, len(known))]
        lines.append(rng.choice([" ", "\n"]).join(fits))
    instructions = rng.choice(["\n", " "]).join(line for line in lines if line)
    listed = f"{', '.join(verbs[:-1])} {rng.choice(['or', 'and'])} {verbs[-1]}"
    described: str | None = rng.choice([f"one of {listed}", f"What to do: {listed}."])
    if verbs is ACTIONS and rng.random() < 0.3:
        described = None
    outputs = ("reasoning", "action") if unlocks or rng.random() < 0.7 else ("action",)
    signature = make_signature(
        {"mission": None, "observation": None},
        {name: described if name == "action" else None for name in outputs},
        instructions,
        draw_types(rng, {"action": verbs}),
    )
    glue = rng.choice(["; ", "; ", "\n", ", "])
    turns = []
    for _ in range(rng.choice([1, 2, 2, 3])):
        size = rng.choice([3, 4, 4, 5])
        if unlocks:
            room, mission = unlocking(rng, rule, set(known), kinds, colours, size)
        else:
            room, mission = reaching(rng, kinds, colours, size, verbs)
        made = turn(rng, room, mission, verbs, glue)
        turns.append(Turn(made.inputs, {name: made.outputs[name] for name in outputs}))
    return render_chat(draw_adapter(rng), signature, turns)


class Rooms:
    """See the module docstring; satisfies ``Family``."""

    name = "rooms"
    warmup: tuple[Stage, ...] = ()
    share = 0.9

    def sample(self, rng: Random, stage: str) -> list[Message]:
        """Moments in rooms, in DSPy's format."""
        return chat(rng)

    def questions(self, rng: Random, count: int, unseen: bool = False) -> list[Question]:
        """The one right action in a room with a locked door, under a rule for each of 5 colours."""
        pool = sorted(HELD_OUT) if unseen else COLOURS
        questions: list[Question] = []
        kinds = KINDS[0]
        while len(questions) < count:
            colours = rng.sample(pool, 5)
            rule = dict(zip(colours, [*colours[1:], colours[0]], strict=True))
            room, mission = unlocking(rng, rule, set(colours), kinds, colours, 4)
            goal = next((thing for thing in room.things if thing.name == mission.goal), None)
            if goal is None:
                continue
            moves = room.moves(goal.at)
            ahead = room.named(room.ahead) == mission.goal
            if not ahead and len(moves) != 1:
                continue
            answer = ACTIONS[mission.act if ahead else next(iter(moves))]
            task = "Choose the next action."
            said = " ".join(f"{a} doors need the {b} key." for a, b in rule.items())
            listed = f"one of {', '.join(ACTIONS)}"
            signature = make_signature(
                {"mission": None, "observation": None}, {"reasoning": None, "action": listed}, task
            )
            inputs = {"mission": mission.text, "observation": room.look("; ")}
            questions.append(Question(signature, f"{task}\n{said}", inputs, "action", answer))
        return questions
