"""Classification by description: labels that say what they are for, and messages in other words."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from fst_dspy.smollm2.corpus.base import Exercise, Turn
from fst_dspy.smollm2.corpus.signatures import field_names, make_signature
from fst_dspy.smollm2.corpus.words import labels


@dataclass(frozen=True)
class Topic:
    """What a label can be for, and messages of that kind. Both may be asked about apart."""

    described: tuple[str, ...]
    messages: tuple[str, ...]


TOPICS = (
    Topic(
        ("animals and pets", "anything about animals"),
        ("Our dog has not eaten since Sunday.", "How often should I brush a cat?",
         "A horse needs a lot of space.", "The parrot keeps repeating my name."),
    ),
    Topic(
        ("cooking and food", "recipes, meals and ingredients"),
        ("How long do I boil the potatoes?", "The soup needs more salt.",
         "I made pancakes for six people.", "Which cheese melts best?"),
    ),
    Topic(
        ("the weather", "rain, wind and temperature"),
        ("It will snow tonight.", "Is it going to be sunny at noon?",
         "The storm took down two trees.", "We had fog all morning."),
    ),
    Topic(
        ("music", "songs, bands and instruments"),
        ("She plays the violin every evening.", "Who sang that song in the eighties?",
         "The choir practises on Mondays.", "My guitar is out of tune."),
    ),
    Topic(
        ("sport", "games, matches and training"),
        ("They scored twice in the last minute.", "I run five miles before breakfast.",
         "Our team lost the final.", "Where can I learn to swim?"),
    ),
    Topic(
        ("health", "illness, doctors and medicine"),
        ("My throat hurts when I swallow.", "The fever came back last night.",
         "How many of these pills may I take?", "She broke her arm on the stairs."),
    ),
    Topic(
        ("gardens and plants", "growing flowers, trees and vegetables"),
        ("The roses have black spots.", "When do I plant the tomatoes?",
         "Our hedge grew too high.", "These seeds never came up."),
    ),
    Topic(
        ("stars and space", "astronomy"),
        ("Saturn can be seen this week.", "How far away is the moon?",
         "The telescope shows four satellites.", "A comet passed close to the sun."),
    ),
    Topic(
        ("books and reading", "novels, authors and poems"),
        ("The last chapter made me cry.", "Who wrote this novel?",
         "I finished both volumes in a week.", "The poem has only four lines."),
    ),
    Topic(
        ("cars and driving", "vehicles on the road"),
        ("The brakes squeak when I stop.", "I need new tyres before winter.",
         "The engine would not start this morning.", "There was a traffic jam on the bridge."),
    ),
    Topic(
        ("clothes", "what people wear"),
        ("These trousers are too long.", "The coat comes in three sizes.",
         "I spilled wine on my blouse.", "Do these boots match the scarf?"),
    ),
    Topic(
        ("history", "events of the past"),
        ("The castle was built in 1320.", "Who was king after him?",
         "The two empires fought for decades.", "That treaty ended the war."),
    ),
    Topic(
        ("the sea and ships", "sailing and harbours"),
        ("The ferry leaves at high tide.", "We anchored in a small bay.",
         "The captain lowered the sails.", "Waves broke over the deck."),
    ),
    Topic(
        ("films and television", "movies and series"),
        ("The second season is better.", "That actor won an Oscar.",
         "We watched a comedy last night.", "The director cut the last scene."),
    ),
    Topic(
        ("houses and repairs", "building and fixing things at home"),
        ("The tap in the kitchen drips.", "We want to paint the ceiling.",
         "A tile fell off the roof.", "The wall is damp behind the shelf."),
    ),
    Topic(
        ("mathematics", "numbers and calculation"),
        ("What is the square root of 81?", "The sum of the angles is 180 degrees.",
         "Multiply both sides by three.", "Is 97 a prime?"),
    ),
)  # fmt: skip
HELD_OUT_TOPICS = (
    Topic(
        ("children and toys", "games for the little ones"),
        ("My son lost his teddy bear.", "Is this puzzle right for a four-year-old?",
         "She built a tower of wooden blocks."),
    ),
    Topic(
        ("law", "courts, judges and contracts"),
        ("The jury found him guilty.", "My lawyer says we should appeal.",
         "Two witnesses were heard today."),
    ),
    Topic(
        ("languages", "words, grammar and translation"),
        ("How do you say that in French?", "This verb is irregular.",
         "She speaks four languages."),
    ),
    Topic(
        ("farming", "fields, crops and cattle"),
        ("The harvest starts next week.", "Our cows give less milk this year.",
         "The tractor is stuck in the mud."),
    ),
    Topic(
        ("art", "painting and sculpture"),
        ("The portrait hangs in the museum.", "He paints with oil on canvas.",
         "The statue is made of marble."),
    ),
    Topic(
        ("trains", "railways and stations"),
        ("The express leaves from platform four.", "The conductor checked everyone.",
         "The tracks were blocked by snow."),
    ),
)  # fmt: skip
LINES = (
    "{v}: {d}",
    "{v} is for {d}.",
    "Answer {v} if it is about {d}.",
    "{v} - {d}",
    "Choose {v} for {d}.",
    "{v} deals with {d}.",
)
HELD_OUT_LINES = ("{v} looks after {d}.", "Pick {v} when the subject is {d}.")
TASKS = ("What is the {i} about?", "Classify the {i}.", "Choose the {o} by its description.")


def topics(rng: Random, held_out: bool, reasoning: bool) -> Exercise:
    """Descriptions and labels that mean nothing by themselves; satisfies ``Skill``."""
    names = field_names(rng)
    pool = HELD_OUT_TOPICS if held_out else TOPICS
    chosen = rng.sample(pool, rng.randint(3, 5))
    values = labels(rng, len(chosen), held_out)
    described = [rng.choice(topic.described) for topic in chosen]
    wording = rng.choice(HELD_OUT_LINES if held_out else LINES)
    lines = [wording.format(v=v, d=d) for v, d in zip(values, described, strict=True)]
    lines = [line[0].upper() + line[1:] if line.endswith(".") else line for line in lines]
    # As rules are: a sentence is quoted as it stands, an entry of a table as a sentence.
    quotes = [
        line if line.endswith(".") else f"{d} goes to {v}."
        for line, v, d in zip(lines, values, described, strict=True)
    ]
    kind: Any = Literal[tuple(rng.sample(values, len(values)))] if rng.random() < 0.6 else str
    task = rng.choice(TASKS).format(i=names[0], o=names[1])
    signature = make_signature(
        {names[0]: str}, {names[1]: kind}, "\n".join([task, *lines]), reasoning
    )

    def turn() -> Turn:
        place = rng.randrange(len(chosen))
        thought = f"It is about {described[place]}. {quotes[place]}"
        answer = {"reasoning": thought} if reasoning else {}
        content = rng.choice(chosen[place].messages)
        return Turn({names[0]: content}, {**answer, names[1]: values[place]})

    demos = tuple(turn() for _ in range(0 if held_out else rng.choice((0, 0, 0, 1, 2))))
    return Exercise(signature, demos, tuple(turn() for _ in range(1 if held_out else 5)))
