"""The commands. ``app`` is the ``fst`` command itself."""

from fst_dspy.cli.app import app

__all__ = ["app"]
