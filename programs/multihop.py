"""Checking claims in two hops of retrieval: stands for the paper's HoVer.

The claim names a person and an office in words of its own; the facts, found with BM25, say where
people live and who holds which office in which town, in other words. One predictor writes the
query of the second hop, another judges the claim by the facts of both. Which word of the claims
stands for which of the facts is a convention drawn from the seed, to be learned from feedback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import bm25s
import dspy

from fst_dspy.embedded.corpus.multihop import CLAIMS, HOME, OFFICE
from fst_dspy.embedded.corpus.words import NAMES, TOWNS
from fst_dspy.types import Task

CLAIM_WORDS = ("anchor", "falcon", "lantern", "cedar", "prism", "comet", "tulip", "marble")
OFFICES = ("baker", "captain", "doctor", "editor", "farmer", "judge", "pilot", "tailor")
RESIDENTS, HOLDERS = NAMES[::2], NAMES[1::2]
CRITERION = "Say supported if the fact names the same person as the claim, else refuted."

Search = Callable[[str, int], list[str]]


class WriteQuery(dspy.Signature):
    """Write a query that finds the fact which settles the claim."""

    claim: str = dspy.InputField()
    facts: str = dspy.InputField()
    query: str = dspy.OutputField(desc=f"one of {', '.join(OFFICES)}, and a town")


class JudgeClaim(dspy.Signature):
    """Decide whether the facts support the claim."""

    claim: str = dspy.InputField()
    facts: str = dspy.InputField()
    verdict: str = dspy.OutputField(desc="supported or refuted")


class CheckClaim(dspy.Module):
    """Search for the claim, write a query from what was found, search again, judge.

    Args:
        search: ``search(query, k)`` returns the k best facts, best first.
    """

    def __init__(self, search: Search) -> None:
        super().__init__()
        self.search = search
        self.write_query = dspy.ChainOfThought(WriteQuery)
        self.judge = dspy.ChainOfThought(JudgeClaim)

    def forward(self, claim: str) -> dspy.Prediction:
        found = self.search(claim, 2)
        query = self.write_query(claim=claim, facts="\n".join(found)).query
        found += [fact for fact in self.search(query, 1) if fact not in found]
        verdict = self.judge(claim=claim, facts="\n".join(found)).verdict
        return dspy.Prediction(verdict=verdict, query=query, facts=found)


def make_search(facts: Sequence[str]) -> Search:
    """BM25 over the facts. A plain function: copies of the program share the index."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(facts), show_progress=False), show_progress=False)

    def search(query: str, k: int) -> list[str]:
        tokens = bm25s.tokenize(query, show_progress=False, return_ids=False)
        if not tokens[0]:
            return []
        ids, scores = index.retrieve(tokens, k=k, show_progress=False)
        return [facts[i] for i, score in zip(ids[0], scores[0], strict=True) if score > 0]

    return search


def make_metric(meanings: Mapping[str, str]) -> Callable[..., dspy.Prediction]:
    """The metric, in GEPA's form, with a word of its own for each predictor.

    1 for the right verdict with the fact that settles it among those retrieved, as HoVer asks for
    its documents; else 0.
    """

    def metric(
        gold: dspy.Example,
        pred: dspy.Prediction,
        trace: Any = None,
        pred_name: str | None = None,
        pred_trace: Any = None,
    ) -> dspy.Prediction:
        found = gold.fact in getattr(pred, "facts", ())
        right = str(getattr(pred, "verdict", "")).strip() == gold.verdict
        query = (
            f"The query {'found' if found else 'missed'} the fact that settles the claim.\n"
            f"Lesson: {gold.word} means {meanings[gold.word]}."
        )
        judge = f"The verdict was {'right' if right else 'wrong'}.\nLesson: {CRITERION}"
        if not found:
            judge = "The fact that settles the claim was not found; the verdict was a guess."
        said = {"write_query.predict": query, "judge.predict": judge}
        feedback = said.get(pred_name or "", f"{query}\n{judge}")
        return dspy.Prediction(score=float(found and right), feedback=feedback)

    return metric


def load(seed: int = 0, train: int = 200, val: int = 64, test: int = 200) -> Task:
    """The task: ``seed`` draws the convention, the facts and the claims, all different."""
    rng = Random(f"multihop {seed}")
    meanings = dict(zip(CLAIM_WORDS, rng.sample(OFFICES, len(OFFICES)), strict=True))
    homes = {person: rng.choice(TOWNS) for person in RESIDENTS}
    holders = {(office, town): rng.choice(HOLDERS) for office in OFFICES for town in TOWNS}
    facts = [HOME.format(p=person, t=town) for person, town in homes.items()]
    facts += [OFFICE.format(v=office, t=town, q=q) for (office, town), q in holders.items()]
    cases = [
        (p, word, wording) for p in RESIDENTS for word in CLAIM_WORDS for wording in set(CLAIMS)
    ]
    cases.sort()
    examples = []
    for person, word, wording in rng.sample(cases, train + val + test):
        town, office = homes[person], meanings[word]
        holder = holders[office, town]
        is_true = rng.random() < 0.5
        named = holder if is_true else rng.choice([name for name in HOLDERS if name != holder])
        example = dspy.Example(
            claim=wording.format(k=word, p=person, q=named),
            verdict="supported" if is_true else "refuted",
            fact=OFFICE.format(v=office, t=town, q=holder),
            word=word,
        )
        examples.append(example.with_inputs("claim"))
    rules = "\n".join(f"{word} means {office}." for word, office in meanings.items())
    return Task(
        name="multihop",
        program=CheckClaim(make_search(facts)),
        metric=make_metric(meanings),
        trainset=examples[:train],
        valset=examples[train : train + val],
        testset=examples[train + val :],
        ideal_instructions={
            "write_query.predict": f"{WriteQuery.instructions}\n{rules}",
            "judge.predict": f"{JudgeClaim.instructions}\n{CRITERION}",
        },
    )
