"""``python -m fst_dspy`` is the ``fst`` command."""

from fst_dspy.cli.app import app

app()
