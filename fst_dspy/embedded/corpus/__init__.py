"""The generated text that the embedded model learns from: one file a skill family."""

from fst_dspy.embedded.corpus.base import Family
from fst_dspy.embedded.corpus.list_program import ListProgram
from fst_dspy.embedded.corpus.multihop import MultiHop
from fst_dspy.embedded.corpus.rooms import Rooms
from fst_dspy.embedded.corpus.rule_lookup import RuleLookup
from fst_dspy.embedded.corpus.star_graph import StarGraph
from fst_dspy.embedded.corpus.tools import Tools
from fst_dspy.embedded.corpus.walking import Walking

FAMILIES: tuple[Family, ...] = (
    RuleLookup(),
    StarGraph(),
    ListProgram(),
    MultiHop(),
    Walking(),
    Rooms(),
    Tools(),
)
