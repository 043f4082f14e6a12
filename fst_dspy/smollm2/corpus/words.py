"""Words, names and wordings of the exercises, each pool in two parts: for training, held out.

The topics, queues and wordings of the tasks that the model is measured on are in none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from fst_dspy.embedded.corpus import words as embedded

_OF_TASKS = embedded.word_list(
    """
    amber baggage bronze catering cobalt coral crimson delay indigo insurance ivory jade loyalty
    maroon ochre onyx parking passport pearl refund shuttle silver teal topaz upgrade violet visa
    wifi desk card account password office laptop printer salary network payment receipt
    """
)
WORDS = tuple(word for word in embedded.ENGLISH if word not in _OF_TASKS)
HELD_OUT_WORDS = tuple(sorted(embedded.HELD_OUT)) + embedded.word_list(
    "acorn badger caramel cinnamon clover drizzle ferret gutter hamster iceberg jigsaw lobster "
    "meerkat nutmeg oatmeal paprika quiver ribbon saffron tadpole"
)
INPUT_NAMES = embedded.word_list(
    """
    message text note request ticket email question item report letter entry comment case post
    input memo inquiry
    """
)
OUTPUT_NAMES = embedded.word_list(
    """
    label answer category team group queue result code verdict place owner choice route tag class
    destination bin
    """
)
NAMES = embedded.NAMES
TOWNS = embedded.TOWNS
DAYS = embedded.word_list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

MESSAGES = (
    "The {k} arrived this morning and half of it is missing.",
    "Could somebody tell me why the {k} changed again?",
    "I sold my {w}, but the {k} is still listed under my name.",
    "Our {k} makes a strange noise next to the {w}.",
    "Since Tuesday nobody can find the {k}.",
    "I'd like to order another {k}, in green if possible.",
    "My neighbour borrowed the {k} and now it looks different.",
    "Just to let you know: the {k} is ready.",
    "We talked about the {k} yesterday, and I still have doubts.",
    "Two of us saw a {k} behind the {w}.",
    "Who decides about the {k}? I never got a clear reply.",
    "The picture shows a {k} and little else.",
    "It rained all week and the {k} got wet.",
    "I am writing because of the {k}.",
    "The price of the {k} went up, so I cancelled the {w}.",
    "For the meeting we only need the {k}.",
    "Anna put the {k} on the shelf beside the {w}.",
    "Does the {k} come with a {w}?",
    "Thanks for the {w}! But what happened to the {k}?",
    "the {k} pls, as soon as you can",
    "Still waiting for news about the {k}...",
    "{k}, second reminder",
    "My grandmother says the {k} was better years ago.",
    "It's the {k} that worries me, not the weather.",
    "After lunch the {k} was gone.",
    "We have too many of them: {k}.",
)
HELD_OUT_MESSAGES = (
    "Hi, I believe the {k} was mixed up with somebody else's.",
    "Nobody told us that the {k} would be moved next to the {w}.",
    "Is it true that the {k} will be replaced in spring?",
    "I tried everything, yet the {k} refuses to cooperate.",
    "Regarding the {k}: please look into it.",
    "Our children love the {k}, more than any {w}.",
    "Everything is fine except for the {k}.",
    "where did you put the {k}??",
)


def words(held_out: bool) -> Sequence[str]:
    """The pool of words."""
    return HELD_OUT_WORDS if held_out else WORDS


def message(rng: Random, key: str, others: Sequence[str], held_out: bool) -> str:
    """A message that mentions ``key`` and no other word that a rule names."""
    pool = HELD_OUT_MESSAGES if held_out else MESSAGES
    if not held_out and rng.random() < 0.12:
        chosen = [*rng.choices(others, k=rng.randint(1, 5)), key]
        rng.shuffle(chosen)
        return " ".join(chosen)
    text = rng.choice(pool).format(k=key, w=rng.choice(others))
    if not held_out and rng.random() < 0.25:
        more = rng.choice(
            ("Hello.", "Hi team,", "Thanks!", "Kind regards", "Please advise.", "FYI.")
        )
        text = f"{more} {text}" if rng.random() < 0.5 else f"{text} {more}"
    return text[0].upper() + text[1:] if rng.random() < 0.9 else text


def labels(rng: Random, count: int, held_out: bool, taken: Sequence[str] = ()) -> list[str]:
    """Different labels of one style: words, capitals, two words, teams, codes."""
    pool = [word for word in words(held_out) if word not in taken]
    style = rng.choice((*("plain",) * 5, "title", "pair", "team", "code", "upper"))
    if style == "code":
        letter = rng.choice("ABCDEFGHKLMNPQRSTXZ")
        return [f"{letter}{n}" for n in rng.sample(range(1, 40), count)]
    chosen = rng.sample(pool, count)
    if style == "title":
        return [word.title() for word in chosen]
    if style == "upper":
        return [word.upper() for word in chosen]
    if style == "pair":
        return [f"{word} {rng.choice(pool)}" for word in chosen]
    if style == "team":
        kind = rng.choice(("team {}", "Team {}", "{} unit", "room {}", "{} crew", "level {}"))
        return [kind.format(word) for word in chosen]
    return chosen
