"""What has to be said before a version is published, and is it said the same everywhere?

    python tests/support/release.py v0.1.0    # exits with 1 and says what is missing

Nothing but Python is needed: the workflow that publishes has no more.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
"""The headings of https://keepachangelog.com/en/1.1.0/, in which a change of a version stands."""


def version_of_package() -> str:
    """The version in ``fst_dspy/__init__.py``, which is the wheel's."""
    (found,) = re.findall(
        r'^__version__ = "(.+)"$', (ROOT / "fst_dspy" / "__init__.py").read_text(), re.MULTILINE
    )
    return found


def version_cited() -> str:
    """The version in ``CITATION.cff``."""
    (found,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    return found


def faults_of_changelog(text: str) -> list[str]:
    """What in a changelog is not in the form of Keep a Changelog.

    Args:
        text: The changelog. Its versions are headings ``## [1.2.3] - 2026-01-31``, newest first,
            after ``## [Unreleased]``.
    """
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    faults = [] if titles[:1] == ["[Unreleased]"] else ["it does not begin with [Unreleased]"]
    dates = []
    for title in titles[1:]:
        found = re.fullmatch(r"\[\d+\.\d+\.\d+\S*\] - (\d{4}-\d\d-\d\d)", title)
        faults += [] if found else [f"{title!r} is no version with a date"]
        dates += [found[1]] if found else []
    if dates != sorted(dates, reverse=True):
        faults.append("its versions are not newest first")
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, kinds = section.splitlines()[0], re.findall(r"^### (.*)$", section, re.MULTILINE)
        faults += [f"{title} has {kind!r} in it" for kind in kinds if kind not in KINDS]
        if len(set(kinds)) < len(kinds):
            faults.append(f"{title} has a heading twice")
    return faults


def faults_of_tag(tag: str, changelog: str) -> list[str]:
    """Why a tag may not be published yet.

    Args:
        tag: Such as ``"v0.1.0"``.
        changelog: The text of the changelog.
    """
    version = version_of_package()
    faults = [] if tag == f"v{version}" else [f"the tag is {tag}, the package has {version}"]
    if version_cited() != version:
        faults.append(f"CITATION.cff has version {version_cited()}, the package has {version}")
    if not re.search(rf"^## \[{re.escape(version)}\] - ", changelog, re.MULTILINE):
        faults.append(f"CHANGELOG.md has no section [{version}] with a date")
    return faults + faults_of_changelog(changelog)


if __name__ == "__main__":
    found = faults_of_tag(sys.argv[1], (ROOT / "CHANGELOG.md").read_text())
    print("\n".join(found) or f"{sys.argv[1]} may be published")
    sys.exit(bool(found))
