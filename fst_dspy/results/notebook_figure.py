"""A matplotlib figure that shows itself in a notebook, whether or not pyplot was imported."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure that is drawn where it is the last line of a notebook's cell.

    A plain ``Figure`` prints its size there until pyplot has been imported, and pyplot would keep
    every figure it makes.
    """

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
