"""Where programs that were saved before ``lm/`` was a folder name the class; nothing else is."""

from fst_dspy.lm.local_lm import LocalLM as LocalLM
