"""A task that worker processes can load by its path: a random model's letters, scored."""

import dspy
from helpers import Echo, RawAdapter, questions, vowels

from fst_dspy import Task


class RawEcho(Echo):
    """``Echo`` that brings its adapter along, into whichever process it is loaded."""

    def forward(self, question):
        with dspy.context(adapter=RawAdapter()):
            return self.say(question=question)


def load(seed=0):
    return Task("letters", RawEcho(), vowels, questions(6), questions(4, 6), questions(4, 10))
