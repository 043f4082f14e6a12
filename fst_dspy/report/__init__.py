"""A run, or several, as one HTML page that needs nothing else, and as a live terminal view."""

from fst_dspy.report.page import follow, render, write_report

__all__ = ["follow", "render", "write_report"]
