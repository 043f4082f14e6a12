"""The generated text that the embedded model learns from: one file a skill family."""

from fst_dspy.embedded.corpus.base import Family
from fst_dspy.embedded.corpus.rule_lookup import RuleLookup

FAMILIES: tuple[Family, ...] = (RuleLookup(),)
