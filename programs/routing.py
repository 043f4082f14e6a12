"""Letters to a town hall, and the desk that each goes to under a hidden policy: for real models.

Twelve kinds of matters, written as people write, and eight desks. For each kind there are desks
that would make sense; the seed draws which one it is. So a model that knows the world guesses
better than by chance, and still has to learn this town's ways from feedback; they fit in twelve
lines of instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import dspy

from fst_dspy.errors import DataError
from fst_dspy.types import Task

Desk = Literal["roads", "parks", "waste", "permits", "housing", "finance", "safety", "culture"]


@dataclass(frozen=True)
class Kind:
    """A kind of matter: how a rule names it, desks that make sense, and letters about it."""

    rule: str
    desks: tuple[Desk, ...]
    letters: tuple[str, ...]


KINDS: Mapping[str, Kind] = {
    "tree": Kind(
        "fallen trees and branches",
        ("parks", "roads", "safety"),
        (
            "a big branch came down in last night's storm and lies across the pavement on {street}",
            "the old oak at the corner of {street} is leaning badly since the wind on {day}",
            "there is a tree down near number {n}, {street}, and my car is stuck behind it",
            "branches are hanging into the wires above {street}, it looks like they may drop",
            "half of the chestnut on {street} broke off and is lying in our front garden",
            "the lime tree outside the bakery lost a limb, children climb on it all day",
            "something cracked in the poplar by the bus stop, now a heavy bough hangs over it",
        ),
    ),
    "hole": Kind(
        "holes and cracks in the street",
        ("roads", "safety", "finance"),
        (
            "I hit a pothole on {street} and bent my wheel",
            "the asphalt on {street} sank after the pipe works, every lorry shakes the house",
            "my mother tripped over a loose paving slab in front of number {n}, {street}",
            "there's a crack in {street} you could lose a shoe in",
            "cyclists keep swerving around the hole by the crossing on {street}",
            "the patch they put on {street} in spring is gone again",
            "a kerb stone is missing at {n} {street} and the wheelchair gets stuck",
        ),
    ),
    "light": Kind(
        "street lamps that do not work",
        ("safety", "roads", "finance"),
        (
            "the lamp outside {n} {street} has been out since {day}",
            "it is pitch dark on {street} when I walk home from the late shift",
            "a street light flickers all night right into our bedroom on {street}",
            "three lamps in a row are dead between the church and {street}",
            "the lights along the footpath behind {street} burn in daylight and are off at night",
            "somebody smashed the lantern at the end of {street}",
            "could you please fix the lamp post with the sticker {n}, it only glows orange",
        ),
    ),
    "bin": Kind(
        "bins that were not emptied",
        ("waste", "housing", "finance"),
        (
            "our rubbish was not collected on {day}, the whole of {street} is waiting",
            "the truck drove past number {n} again without stopping",
            "my recycling has been standing on {street} for two weeks now",
            "they emptied the neighbours' bins but left ours, no note, nothing",
            "the paper container on {street} is overflowing and it blows everywhere",
            "we put the green bin out on {day} as the calendar says, still full today",
            "who do I ring when the bin lorry breaks the lid and leaves the bag inside?",
        ),
    ),
    "dump": Kind(
        "rubbish left in the open",
        ("waste", "parks", "safety"),
        (
            "someone has dumped a mattress and two chairs behind the garages on {street}",
            "there is a pile of old tyres in the ditch along {street}",
            "builders left bags of rubble at the edge of the wood near {street}",
            "a fridge has been lying by the river path since {day}",
            "people throw their takeaway boxes over the fence at {n} {street}",
            "I counted eleven black sacks in the lay-by on {street} this morning",
            "paint tins, open ones, are lying next to the playground on {street}",
        ),
    ),
    "noise": Kind(
        "noise at night",
        ("safety", "housing", "culture"),
        (
            "the bar on {street} has its doors open until two and we can't sleep",
            "my upstairs neighbour at {n} {street} plays drums after midnight",
            "there was shouting and loud music in the square again on {day}",
            "a generator behind {street} hums all night long",
            "every {day} a group races motorbikes up and down {street} until one in the morning",
            "there is a party at {n} {street} every weekend, the bass comes through the wall",
            "can anything be done about the dog on {street} that barks from eleven till dawn?",
        ),
    ),
    "build": Kind(
        "plans to build something",
        ("permits", "housing", "finance"),
        (
            "we would like to put a carport next to our house at {n} {street}",
            "do I need permission for a garden shed of three by four metres?",
            "I want to turn the attic on {street} into a room for my son",
            "what are the rules for a fence of two metres towards {street}?",
            "we're thinking of a glass roof over the terrace, whom do we ask first?",
            "my architect says the drawings for {n} {street} have been with you since {day}",
            "is it allowed to replace the windows in an old house on {street} with larger ones?",
        ),
    ),
    "market": Kind(
        "stalls and street parties",
        ("permits", "culture", "safety"),
        (
            "our street would love to hold a summer party on {street}, how do we close it to cars?",
            "I make candles and would like a stall at the {day} market",
            "can our school sell cakes in front of the library on {day}?",
            "we are planning a flea market on {street} with about {n} tables",
            "a friend and I want to park our coffee van on {street} at weekends",
            "the choir would like to sing carols in the square, may we put up a small stage?",
            "how much room may a fruit stand take up on the pavement of {street}?",
        ),
    ),
    "rent": Kind(
        "damp flats and broken heating",
        ("housing", "safety", "finance"),
        (
            "there is black mould in my bedroom at {n} {street} and the landlord shrugs",
            "we have had no hot water since {day} in the council flats on {street}",
            "the heating in our building on {street} works one day out of three",
            "water drips through the ceiling of my flat whenever it rains",
            "my landlord wants me out by {day} because I complained about the damp",
            "the lift at {n} {street} is out of order and I am 82 and live on the fifth floor",
            "the window in the children's room doesn't close any more, the owner never answers",
        ),
    ),
    "bill": Kind(
        "bills and fees",
        ("finance", "waste", "housing"),
        (
            "I got a reminder for a fee that I paid on {day}",
            "why did the water charge for {n} {street} go up by a third?",
            "we moved away from {street} in March but you still bill us",
            "is it possible to pay the yearly charge in instalments?",
            "you have taken {n} euros from my account twice",
            "the amount in your letter does not match the one on your website",
            "my late father still receives invoices at {n} {street}",
        ),
    ),
    "play": Kind(
        "playgrounds and sports fields",
        ("parks", "culture", "safety"),
        (
            "the swing on the playground at {street} has lost a chain",
            "the sandpit by {street} is full of cat mess",
            "somebody carved up the rubber floor under the slide on {street}",
            "the goal on the football pitch behind {street} fell over on {day}",
            "could the climbing frame on {street} get some shade, it gets too hot to touch",
            "the net of the table tennis table near {street} is gone",
            "grass on the sports field is knee high, the kids cannot find the ball",
        ),
    ),
    "hall": Kind(
        "rooms for clubs and the library",
        ("culture", "finance", "permits"),
        (
            "our chess club needs a room on {day} evenings, what is free?",
            "I'd like to hire the hall on {street} for my parents' golden wedding",
            "the library was closed on {day} although the door says open",
            "may the dance group leave its mirrors in the community centre?",
            "I returned {n} books and the machine counted one less",
            "is there a piano in the small hall, and may we tune it?",
            "we're {n} pensioners who want to learn to paint and look for a place to meet",
        ),
    ),
}
STREETS = (
    "Mill Lane", "Station Road", "Church Street", "Elm Avenue", "Harbour Way", "Kingsley Road",
    "Bridge Street", "Orchard Close", "North Parade", "Castle Hill",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
OPENINGS = (
    "", "", "", "Hello,", "Good morning,", "Dear Sir or Madam,", "Hi there,", "To the town hall:",
    "Sorry to bother you, but", "I have never written to you before, but", "Third time I write:",
)  # fmt: skip
CLOSINGS = (
    "", "", "", "Thank you.", "Please do something.", "Kind regards, a resident", "Thanks!",
    "I look forward to your reply.", "You can reach me in the evenings.", "Sent from my phone",
)  # fmt: skip
MAX_LETTERS = 4000
"""Different letters that can be had in any order of drawing; there are some more."""
INSTRUCTIONS = "Decide which desk of the town hall gets the letter."


class RouteLetter(dspy.Signature):
    """Decide which desk of the town hall gets the letter."""

    letter: str = dspy.InputField()
    desk: Desk = dspy.OutputField()


def draw_policy(seed: int) -> dict[str, Desk]:
    """The hidden desk of each kind: one of those that make sense."""
    rng = Random(f"routing {seed}")
    return {name: rng.choice(kind.desks) for name, kind in KINDS.items()}


def _letters(rng: Random) -> Iterator[tuple[str, str]]:
    """Letters without end, the kinds in turn, each of a kind's letters before any comes again."""
    while True:
        bodies = {name: rng.sample(kind.letters, len(kind.letters)) for name, kind in KINDS.items()}
        while all(bodies.values()):
            for name in rng.sample(sorted(KINDS), len(KINDS)):
                yield _letter(rng, bodies[name].pop()), name


def _letter(rng: Random, body: str) -> str:
    opening, closing = rng.choice(OPENINGS), rng.choice(CLOSINGS)
    text = body.format(street=rng.choice(STREETS), day=rng.choice(DAYS), n=rng.randint(2, 60))
    if not opening.endswith(("but", ":", ",")):
        text = text[0].upper() + text[1:]
    if not text.endswith("?"):
        text += "."
    letter = " ".join(part for part in (opening, text, closing) if part)
    return letter.lower() if rng.random() < 0.1 else letter


def make_metric(policy: Mapping[str, Desk]) -> Callable[..., dspy.Prediction]:
    """The metric, in GEPA's form: 1 for the right desk, and what a clerk would say."""

    def metric(
        gold: dspy.Example,
        pred: dspy.Prediction,
        trace: Any = None,
        pred_name: str | None = None,
        pred_trace: Any = None,
    ) -> dspy.Prediction:
        answer = str(getattr(pred, "desk", None) or "").strip()
        right = answer == gold.desk
        verdict = "Right" if right else "Wrong"
        lesson = f"Lesson: {KINDS[gold.kind].rule} go to {policy[gold.kind]}."
        return dspy.Prediction(
            score=float(right),
            feedback=f"{verdict}: the letter went to {answer or 'no desk'}. {lesson}",
        )

    return metric


def load(
    seed: int = 0, train: int = 120, val: int = 48, test: int = 120, reasoning: bool = False
) -> Task:
    """The task: ``seed`` draws letters and policy. No letter is in two splits.

    Args:
        seed: Seed of all of it.
        train, val, test: Letters in each split.
        reasoning: Whether the program thinks aloud first (``dspy.ChainOfThought``).

    Raises:
        DataError: A negative number, or more than 4,000 letters.
    """
    if min(train, val, test) < 0 or train + val + test > MAX_LETTERS:
        raise DataError(
            f"a split cannot have fewer than 0 letters, and all of them {MAX_LETTERS} at most: "
            f"{train}, {val}, {test}"
        )
    policy = draw_policy(seed)
    found: dict[str, str] = {}
    source = _letters(Random(f"routing letters {seed}"))
    while len(found) < train + val + test:
        text, kind = next(source)
        found.setdefault(text, kind)
    examples = [
        dspy.Example(letter=text, desk=policy[kind], kind=kind).with_inputs("letter")
        for text, kind in found.items()
    ]
    rules = "\n".join(
        f"{kind.rule[0].upper()}{kind.rule[1:]} go to {policy[name]}."
        for name, kind in KINDS.items()
    )
    program = dspy.ChainOfThought(RouteLetter) if reasoning else dspy.Predict(RouteLetter)
    return Task(
        name="routing",
        program=program,
        metric=make_metric(policy),
        trainset=examples[:train],
        valset=examples[train : train + val],
        testset=examples[train + val :],
        ideal_instructions={"predict" if reasoning else "self": f"{INSTRUCTIONS}\n{rules}"},
    )
