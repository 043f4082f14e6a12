"""The letters of ``study_program`` under whichever adapter is set."""

from helpers import Echo, questions, vowels

from fst_dspy import Task


def load(seed=0):
    return Task("letters", Echo(), vowels, questions(6), questions(4, 6), questions(4, 10))
