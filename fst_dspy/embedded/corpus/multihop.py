"""The skill of checking a claim in two hops: write the second query, then judge by what it found.

A claim speaks of a person's town in words of its own ("The anchor of the town of Mira is Leo.");
the facts say where the person lives and who is what in which town, in other words. Which word of
the claims stands for which word of the facts is explained in the prompt, or left to be guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from fst_dspy.embedded.corpus.base import Message, Question, Stage
from fst_dspy.embedded.corpus.list_program import explain
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
from fst_dspy.embedded.corpus.words import ENGLISH, HELD_OUT, NAMES, TOWNS

CLAIMS = (
    "The {k} of the town of {p} is {q}.",
    "The {k} of the town of {p} is {q}.",
    "The {k} where {p} lives is {q}.",
    "In the town of {p} the {k} is {q}.",
)
HOME, OFFICE = "{p} lives in {t}.", "The {v} of {t} is {q}."
QUERY_TASKS = (
    "Write a query that finds the fact which settles the claim.",
    "Write the next query.",
    "Which query finds the missing fact?",
    "Write a search query for the claim.",
)
VERDICT_TASKS = (
    "Decide whether the facts support the claim.",
    "Judge the claim by the facts.",
    "Is the claim supported or refuted by the facts?",
    "Check the claim against the facts.",
)
HINTS = (
    "Say supported if the fact names the same person as the claim, else refuted.",
    "The claim is refuted if the fact names another person.",
    "Compare the person of the fact with the person of the claim.",
    "Answer supported only if both name the same person.",
)
VERDICTS = "supported or refuted"


@dataclass(frozen=True)
class Case:
    """A claim, what is true, and the words in which the facts say it.

    Attributes:
        claim: The sentence to be checked.
        person, town: Who the claim is about, and where they live.
        key, word: The claim's word for an office and the facts' word for it.
        holder, claimed: Who holds the office, and who does by the claim.
    """

    claim: str
    person: str
    town: str
    key: str
    word: str
    holder: str
    claimed: str

    @property
    def home(self) -> str:
        """The fact of the first hop."""
        return HOME.format(p=self.person, t=self.town)

    @property
    def office(self) -> str:
        """The fact of the second hop."""
        return OFFICE.format(v=self.word, t=self.town, q=self.holder)

    @property
    def verdict(self) -> str:
        """``"supported"`` or ``"refuted"``."""
        return "supported" if self.holder == self.claimed else "refuted"


def draw_case(rng: Random, meanings: Mapping[str, str], wording: str = CLAIMS[0]) -> Case:
    """A case about one of the words explained by ``meanings``, as often true as not."""
    person, holder, other = rng.sample(NAMES, 3)
    town = rng.choice(TOWNS)
    key = rng.choice(list(meanings))
    claimed = rng.choice([holder, other])
    claim = wording.format(k=key, p=person, q=claimed)
    return Case(claim, person, town, key, meanings[key], holder, claimed)


def _distractors(rng: Random, case: Case, words: Sequence[str], count: int) -> list[str]:
    """Facts that a search for the claim also finds: others of the same people and towns."""
    facts = []
    for _ in range(count):
        people = [name for name in NAMES if name not in (case.person, case.holder, case.claimed)]
        person, town = rng.choice(people), rng.choice([t for t in TOWNS if t != case.town])
        if rng.random() < 0.3:
            facts.append(HOME.format(p=person, t=town))
        else:
            holder = rng.choice([person, case.claimed, case.holder])
            facts.append(OFFICE.format(v=rng.choice(words), t=town, q=holder))
    return facts


def query_turn(rng: Random, case: Case, words: Sequence[str], known: bool) -> Turn:
    """The claim and the facts of the first hop; the query that finds the second."""
    weight = HEAVY if known else LIGHT
    facts = [case.home, *_distractors(rng, case, words, rng.choice([1, 1, 2]))]
    if rng.random() < 0.3:
        rng.shuffle(facts)
    return Turn(
        {"claim": case.claim, "facts": "\n".join(facts)},
        {
            "reasoning": [
                Piece(case.key, HEAVY), Piece(" means "), Piece(case.word, weight), Piece(". "),
                Piece(case.person, HEAVY), Piece(" lives in "), Piece(case.town, HEAVY),
                Piece("."),
            ],
            "query": [Piece(case.word, HEAVY), Piece(" "), Piece(case.town, HEAVY)],
        },
    )  # fmt: skip


def verdict_turn(rng: Random, case: Case, words: Sequence[str]) -> Turn:
    """The claim and the facts of both hops; the verdict."""
    facts = [case.home, *_distractors(rng, case, words, 1)]
    if rng.random() < 0.3:
        rng.shuffle(facts)
    facts.append(case.office)
    facts += _distractors(rng, case, words, rng.choice([0, 1]))
    return Turn(
        {"claim": case.claim, "facts": "\n".join(facts)},
        {
            "reasoning": [
                Piece("The "), Piece(case.word, HEAVY), Piece(" of "), Piece(case.town, HEAVY),
                Piece(" is "), Piece(case.holder, HEAVY), Piece(". The claim says "),
                Piece(case.claimed, HEAVY), Piece("."),
            ],
            "verdict": [Piece(case.verdict, HEAVY)],
        },
    )  # fmt: skip


def query_chat(rng: Random) -> list[Message]:
    """A chat about the second query, with the words explained, shown by demos, or neither."""
    mode = rng.choices(["stated", "partly", "demos", "bare"], [0.6, 0.14, 0.14, 0.12])[0]
    count = rng.randint(2, 10)
    drawn = rng.sample(ENGLISH, 2 * count)
    keys, words = drawn[:count], drawn[count:]
    meanings = dict(zip(keys, words, strict=True))
    stated = {"stated": keys, "partly": keys[: max(1, count // 2)]}.get(mode, [])
    instructions = rng.choice(QUERY_TASKS)
    if stated:
        instructions += "\n" + explain(rng, {key: meanings[key] for key in stated})
    is_listed = rng.random() < 0.6
    described = f"one of {', '.join(rng.sample(words, count))}, and a town" if is_listed else None
    signature = make_signature(
        {"claim": None, "facts": None},
        {"reasoning": None, "query": described},
        instructions,
        draw_types(rng),
    )
    if not is_listed:  # without a list there is nothing to guess from but the claim's own word
        meanings = {k: v if k in stated or mode == "demos" else k for k, v in meanings.items()}
    elif mode == "bare":
        meanings = {key: rng.choice(words) for key in keys}
    asked = rng.sample(keys, min(count, 3)) if mode == "demos" else keys
    known, turns = set(stated), []
    wording = rng.choice(CLAIMS)
    for _ in range(rng.randint(3, 5) if mode == "demos" else rng.choice([1, 1, 2, 3])):
        case = draw_case(rng, {key: meanings[key] for key in asked}, wording)
        turns.append(query_turn(rng, case, words, case.key in known))
        known.add(case.key)
    return render_chat(draw_adapter(rng), signature, turns)


def verdict_chat(rng: Random) -> list[Message]:
    """A chat about verdicts; how to come to one goes without saying."""
    words = rng.sample(ENGLISH, 12)
    meanings = dict(zip(words[:6], words[6:], strict=True))
    instructions = rng.choice(VERDICT_TASKS)
    if rng.random() < 0.5:
        instructions += "\n" + rng.choice(HINTS)
    signature = make_signature(
        {"claim": None, "facts": None},
        {"reasoning": None, "verdict": VERDICTS if rng.random() < 0.7 else None},
        instructions,
        draw_types(rng, {"verdict": VERDICTS.split(" or ")}),
    )
    wording = rng.choice(CLAIMS)
    turns = [
        verdict_turn(rng, draw_case(rng, meanings, wording), words[6:])
        for _ in range(rng.choice([1, 1, 2, 3]))
    ]
    return render_chat(draw_adapter(rng), signature, turns)


class MultiHop:
    """See the module docstring; satisfies ``Family``."""

    name = "multihop"
    warmup: tuple[Stage, ...] = ()
    share = 1.5

    def sample(self, rng: Random, stage: str) -> list[Message]:
        """Queries and verdicts, half of each, in DSPy's format."""
        return query_chat(rng) if rng.random() < 0.5 else verdict_chat(rng)

    def questions(self, rng: Random, count: int, unseen: bool = False) -> list[Question]:
        """Queries and verdicts in turn, with 8 words explained."""
        words = sorted(HELD_OUT if unseen else ENGLISH)
        questions = []
        for index in range(count):
            rng.shuffle(words)
            keys, values = words[:8], words[8:16]
            meanings = dict(zip(keys, values, strict=True))
            case = draw_case(rng, meanings)
            if index % 2:
                turn = verdict_turn(rng, case, values)
                signature = make_signature(
                    dict.fromkeys(turn.inputs),
                    {"reasoning": None, "verdict": VERDICTS},
                    VERDICT_TASKS[0],
                )
                ideal, answer = f"{VERDICT_TASKS[0]}\n{HINTS[0]}", case.verdict
            else:
                turn = query_turn(rng, case, values, True)
                listed = f"one of {', '.join(sorted(values))}, and a town"
                signature = make_signature(
                    dict.fromkeys(turn.inputs), {"reasoning": None, "query": listed}, QUERY_TASKS[0]
                )
                rules = "\n".join(f"{key} means {value}." for key, value in meanings.items())
                ideal, answer = f"{QUERY_TASKS[0]}\n{rules}", f"{case.word} {case.town}"
            field = list(signature.output_fields)[-1]
            questions.append(Question(signature, ideal, dict(turn.inputs), field, answer))
        return questions
