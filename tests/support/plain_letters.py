"""The letters of ``study_program`` under whichever adapter is set, better under other prompts."""

from helpers import Telling, changed, questions

from fst_dspy import Task


def load(seed=0):
    return Task("letters", Telling(), changed, questions(6), questions(4, 6), questions(4, 10))
