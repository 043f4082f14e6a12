"""What ``FST`` and its result say of themselves, and what a result can do."""

import contextlib
import copy
import json
import pickle
from pathlib import Path

import pytest
from helpers import questions, vowels
from run_folders import write_run
from tiny_compile import compile_tiny, raw_adapter  # noqa: F401

from fst_dspy import FST, LocalLM
from fst_dspy.errors import ConfigError
from fst_dspy.results.result import result_from_json


def fits(text):
    lines = text.splitlines()
    return len(lines) <= 10 and max(map(len, lines)) <= 100


def test_an_optimizer_shows_what_was_set():
    shown = repr(FST(vowels, max_rollouts=3000, lora=True, seed=4, log_dir="runs/one"))
    assert fits(shown)
    for part in ("metric=vowels", "seed=4", "runs/one", "max_rollouts=3000", "'rank': 16"):
        assert part in shown
    assert "temperature" not in shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"log_dir": 3}, r"log_dir must be the path of a folder, got 3 \(int\)"),
        ({"track_stats": "no"}, r"track_stats must be True or False, got 'no' \(str\)"),
        ({"progress": print}, "has no begin, phase, cycle_done, end"),
    ],
)
def test_what_is_no_setting_is_checked_as_well(given, message):
    with pytest.raises(ConfigError, match=message):
        FST(vowels, **given)


def test_a_folder_may_be_named_by_the_home_folder():
    assert FST(vowels, log_dir="~/runs/x").log_dir == Path.home() / "runs" / "x"


def test_what_is_shown_of_a_run_fits_a_screen(tmp_path):
    result = write_run(tmp_path / "run", steps=12, cycles=3)
    shown = [result, result.best, result.population, result.best.candidate, *result.records]
    assert all(fits(repr(one)) for one in shown)
    assert f"validation score: {result.records[0].val_score:.3f} → " in repr(result)
    assert result.best.candidate.id in repr(result.population)


def test_a_local_lm_says_what_it_is(tiny_qwen3):
    shown = repr(LocalLM(str(tiny_qwen3), max_tokens=7))
    assert "tiny-qwen3@" in shown and "float32 on cpu" in shown and "max_tokens=7" in shown
    assert fits(shown)


@pytest.mark.slow
@pytest.mark.usefixtures("repeatable_sampling")
def test_a_result_tests_its_program_and_writes_its_report(tiny_qwen3, tmp_path):
    compiled, lm, result = compile_tiny(tiny_qwen3, log_dir=tmp_path / "run")
    testset = questions(4, 20)
    tested = compiled.detailed_results.quadrants(testset)
    assert tested.examples == 4
    kept = json.loads((tmp_path / "run" / "quadrants.json").read_text())
    assert (
        kept["trained_evolved"]
        == tested.trained_evolved
        == pytest.approx(sum(kept["scores"]["trained_evolved"]) / 4)
    )
    # As the validation of the student, before anything was learned: the same texts and weights.
    again = result.quadrants(questions(4, 6))
    assert again.base_original == pytest.approx(result.records[0].val_score, abs=0.2)
    assert lm.policy.version() == result.best.version
    assert copy.deepcopy(compiled).detailed_results.quadrants(testset) == tested

    with contextlib.chdir(tmp_path):  # a folder is shown as one names it there
        assert dict(result.headline())["run folder"] == "run"

    page = result.report()
    assert page == tmp_path / "run" / "report.html" and "</html>" in page.read_text()
    assert result.report(tmp_path / "other.html").is_file()

    read = result_from_json(json.loads((tmp_path / "run" / "result.json").read_text()))
    for one in (read, pickle.loads(pickle.dumps(result))):
        assert one == result
        with pytest.raises(ConfigError, match="no program to test"):
            one.quadrants(testset)


@pytest.mark.slow
def test_a_result_without_a_folder_says_that_a_report_needs_one(tiny_qwen3):
    result = compile_tiny(tiny_qwen3, max_cycles=1)[2]
    with pytest.raises(ConfigError, match="log_dir"):
        result.report()
