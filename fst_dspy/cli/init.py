"""The command ``fst init``: a program's file to fill in."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from fst_dspy.cli.options import console, errors_told
from fst_dspy.display import as_text
from fst_dspy.errors import ConfigError


def init(
    name: Annotated[str, typer.Argument(help="Its name; the file is NAME.py.")] = "my_program",
) -> None:
    """Write a program's file to fill in; it runs as it stands."""
    with errors_told():
        file = write_program(name)
    lines = (
        f"written: {file}",
        "It holds a program, a metric that teaches and examples. Put in yours, and run",
        f"  fst compile {file} --set max_cycles=1     a quick try",
        f"  fst compile {file} --out runs/{file.stem}",
        f"  fst report runs/{file.stem}",
    )
    console.print(as_text("\n".join(lines)), soft_wrap=True)


def write_program(name: str) -> Path:
    """Write ``name.py`` into the current folder.

    Raises:
        ConfigError: The name is none for a Python file, or there is such a file.
    """
    stem = name.removesuffix(".py")
    if not re.fullmatch(r"[A-Za-z_]\w*", stem):
        raise ConfigError(f"{name!r} is no name for a program: letters, digits and _ make one")
    file = Path(f"{stem}.py")
    # ``__main__`` is there, but cannot be found.
    if not file.exists() and (stem in sys.modules or find_spec(stem) is not None):
        raise ConfigError(
            f"{file} would hide Python's own or an installed {stem} from all that runs beside it; "
            "choose another name: fst init NAME"
        )
    text = files("fst_dspy.cli").joinpath("program.py.txt").read_text()
    try:
        with open(file, "x") as opened:
            opened.write(text.format(name=stem, file=file))
    except FileExistsError:
        raise ConfigError(f"{file} is there already; choose another name: fst init NAME") from None
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    return file
