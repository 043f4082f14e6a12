"""The versions in pyproject.toml and in both files of constraints agree."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent
while not (ROOT / "pyproject.toml").is_file():
    ROOT = ROOT.parent

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {
    name: [Requirement(text) for text in texts]
    for name, texts in PROJECT["optional-dependencies"].items()
}
VLLM_ASKS = {"llguidance": ">=1.7.0,<1.8.0"}
"""What all versions of vLLM that TRL 1.16 takes, 0.22 to 0.31, ask for besides what TRL does."""
NOT_INSTALLED = {"vllm", "wandb", "mlflow"}
"""Extras that ``make test-lowest`` leaves out."""


def bound(requirement: Requirement, operator: str) -> Version:
    """The one bound of a requirement of this kind."""
    (found,) = [one.version for one in requirement.specifier if one.operator == operator]
    return Version(found)


def pins(file: str) -> dict[str, Version]:
    """The versions of a file of constraints by name."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line[:1] not in ("", "#")]
    return {canonicalize_name(n): Version(v) for n, v in (line.split("==") for line in lines)}


@pytest.mark.parametrize("requirement", DEPENDENCIES, ids=str)
def test_a_dependency_has_both_bounds_and_its_lower_one_is_pinned(requirement: Requirement) -> None:
    assert bound(requirement, ">=") < bound(requirement, "<")
    pinned = pins("constraints-lowest.txt")[canonicalize_name(requirement.name)]
    assert pinned == bound(requirement, ">=")


def test_vllm_can_be_installed_beside_what_is_asked_for() -> None:
    for name, versions in VLLM_ASKS.items():
        assert pins("constraints-lowest.txt")[name] in SpecifierSet(versions), name


def test_the_lower_bounds_of_extras_are_pinned_and_nothing_else_is() -> None:
    lowest = {canonicalize_name(one.name): bound(one, ">=") for one in DEPENDENCIES}
    for name, requirements in EXTRAS.items():
        if name not in NOT_INSTALLED | {"dev"}:
            lowest |= {canonicalize_name(one.name): bound(one, ">=") for one in requirements}
    assert pins("constraints-lowest.txt") == lowest


def test_what_the_readmes_commands_install_is_allowed() -> None:
    pinned = pins("constraints.txt")
    for requirement in [*DEPENDENCIES, *EXTRAS["dev"]]:
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_dev_has_the_extras_that_are_tested() -> None:
    dev = {str(requirement) for requirement in EXTRAS["dev"]}
    for name in EXTRAS.keys() - NOT_INSTALLED - {"dev"}:
        assert {str(requirement) for requirement in EXTRAS[name]} <= dev, name
