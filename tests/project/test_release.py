"""What is published: what is in it, and that the files around it say the same.

``.ci/installed`` installs a wheel where there is no checkout and uses it; the publishing workflow
runs it on every Python that is allowed.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import release
import yaml
from places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = {
    "fst_dspy/cli/program.py.txt",
    "fst_dspy/embedded/model/config.json",
    "fst_dspy/embedded/model/model.safetensors",
    "fst_dspy/embedded/model/tokenizer.json",
    "fst_dspy/programs/routing.py",
    "fst_dspy/programs/triage.py",
    "fst_dspy/py.typed",
    "fst_dspy/report/answer/answer.js",
    "fst_dspy/report/charts/charts.js",
    "fst_dspy/report/charts/uPlot.iife.min.js",
    "fst_dspy/report/page.css",
    "fst_dspy/report/page.js",
    "fst_dspy/smollm2/adapter/NOTICE",
    "fst_dspy/smollm2/adapter/adapter_config.json",
    "fst_dspy/smollm2/adapter/adapter_model.safetensors",
}
"""What the package reads while it works and no import would miss."""
LARGEST = 30_000_000


def tracked(*folders: str) -> set[str]:
    """The files of these folders that are committed, or would be."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {name for name in found.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of this checkout, built here."""
    pytest.importorskip("hatchling", reason="builds the package; `make install` installs it")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_the_wheel_is_the_package_whole_and_the_programs(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size < LARGEST
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"fst_dspy-{release.version_of_package()}.dist-info/METADATA")
    programs = {f"fst_dspy/{name}" for name in tracked("programs")}
    assert names == tracked("fst_dspy") | programs
    assert names >= NEEDED
    assert b"License-File: LICENSE" in metadata


def test_the_sdist_is_the_repository(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= NEEDED - {"fst_dspy/programs/routing.py", "fst_dspy/programs/triage.py"}
    assert names >= {
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "constraints.txt",
        "programs/triage.py",
    }
    assert names - {"PKG-INFO"} <= tracked(".")
    assert sdist.stat().st_size < LARGEST


def test_the_files_of_a_release_say_the_same() -> None:
    version = release.version_of_package()
    assert "version" in PROJECT["dynamic"]
    assert release.version_cited() == version
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["license"] == PROJECT["license"] and cited["cff-version"] == "1.2.0"
    assert release.faults_of_changelog((ROOT / "CHANGELOG.md").read_text()) == []


def test_a_tag_that_may_not_be_published_yet_is_told_why() -> None:
    version = release.version_of_package()
    right = f"# Changelog\n\n## [Unreleased]\n\n## [{version}] - 2026-12-01\n\n### Added\n- It.\n"
    assert release.faults_of_tag(f"v{version}", right) == []
    assert release.faults_of_tag("v9.9.9", right) == [
        f"the tag is v9.9.9, the package has {version}"
    ]
    assert "no section" in release.faults_of_tag(f"v{version}", "## [Unreleased]\n")[0]
    undated = right.replace(" - 2026-12-01", "").replace("Added", "News")
    faults = release.faults_of_changelog(undated + "\n### News\n")
    assert len(faults) == 4, faults


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def workflow(path: Path) -> dict:
    """A workflow's YAML; YAML 1.1 reads the key ``on`` as true."""
    read = yaml.safe_load(path.read_text())
    return {("on" if key is True else key): value for key, value in read.items()}


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_a_workflow_can_be_read_and_runs_what_is_there(path: Path) -> None:
    read = workflow(path)
    assert read["on"] and read["name"] == path.stem
    assert read["permissions"] == {"contents": "read"}
    targets = (ROOT / "Makefile").read_text()
    for job in read["jobs"].values():
        assert set(job.get("needs", [])) <= set(read["jobs"]) or job["needs"] in read["jobs"]
        assert job["runs-on"] and job["timeout-minutes"] <= 60
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            command, *words = step.get("run", step.get("uses")).split()
            if command == "make" and "$" not in words[0]:
                assert f"\n{words[0]}:" in targets
            files = [word for word in (command, *words) if word.startswith((".ci/", "tests/"))]
            assert all((ROOT / file).is_file() for file in files)


def test_only_a_tag_is_published_and_without_a_token() -> None:
    read = workflow(ROOT / ".github" / "workflows" / "publish.yml")
    assert read["on"]["push"] == {"tags": ["v*"]}
    job = read["jobs"]["publish"]
    assert job["if"] == "github.ref_type == 'tag'"
    assert set(job["needs"]) == {"build", "installed"}
    assert job["permissions"] == {"id-token": "write"} and job["environment"] == "pypi"
    assert "secrets." not in (ROOT / ".github" / "workflows" / "publish.yml").read_text()
    pythons = read["jobs"]["installed"]["strategy"]["matrix"]["python"]
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "3." in line]
    assert pythons == named
