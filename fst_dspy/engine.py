"""Where programs that were saved before ``lm/`` was a folder name the engines; nothing else is."""

from fst_dspy.lm.engine import AsyncLocalEngine as AsyncLocalEngine
from fst_dspy.lm.engine import LocalEngine as LocalEngine
