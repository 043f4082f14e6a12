"""``python -m fst_dspy`` is the ``fst`` command."""

from fst_dspy.cli import app

app()
