"""Who gets the rollouts: the rule on made-up evidence, on simulated tasks, and in the loop."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import kill_before_steps
from tiny_compile import compile_tiny, raw_adapter  # noqa: F401

from benchmarks.quality.shares import WORLDS, simulate
from fst_dspy.loop import ending
from fst_dspy.loop.share import LOOKS, RESTED, TRIED, Decision, Evidence, Share, next_share
from fst_dspy.report import write_report

PROMPTS, WEIGHTS, BOTH = Share(True, False), Share(False, True), Share(True, True)
V = 48
BY_NAME = {"prompts": PROMPTS, "weights": WEIGHTS, "both": BOTH}


def history(*cycles, examples=V):
    """Evidence of cycles, ``(channels, examples solved, accepted)`` each; 100 rollouts a cycle."""
    rows = []
    for number, (channels, solved, *accepted) in enumerate(cycles, start=1):
        score_V = (1.0,) * solved + (0.0,) * (examples - solved)
        rows.append(Evidence(channels, score_V, *(accepted or [0]), 100 * number))
    return rows


def judged(*cycles, turns=True, examples=V, interrupted=False):
    rows = history(*cycles, examples=examples)
    now = BY_NAME.get(rows[-1].channels, PROMPTS)
    return next_share(rows, now, turns=turns, perfect_score=1.0, interrupted=interrupted)


def test_prompts_go_on_alone_while_they_pay_and_then_it_is_the_weights_turn():
    assert judged(("", 5)) == Decision(PROMPTS)
    opened = judged(("", 5), ("prompts", 20))
    assert opened.share == PROMPTS and "theirs alone" in opened.words
    settled = judged(("", 5), ("prompts", 20), ("prompts", 20))
    assert settled.share == BOTH
    assert settled.words == "prompts settled after 200 rollouts; weights since"
    useless = judged(("", 5), ("prompts", 5))
    assert useless.share == BOTH and useless.words.startswith("100 rollouts for prompts alone did")


def test_a_phase_that_was_interrupted_goes_on_whatever_its_validation_shows():
    for solved in (5, 20):
        assert judged(("", 5), ("prompts", solved), interrupted=True).share == PROMPTS
    perfect = judged(("", 5), ("prompts", V), interrupted=True)  # nothing is left to gain
    assert perfect.share == BOTH


def test_trials_rest_where_none_is_proven_and_are_taken_up_again():
    start = [("", 5), ("prompts", 5)]
    for count in range(1, TRIED):
        assert judged(*start, *[("both", 9)] * count) == Decision(BOTH)
    rests = judged(*start, *[("both", 9)] * TRIED)
    assert rests.share == WEIGHTS and "prompts rest" in rests.words
    assert judged(*start, *[("both", 9)] * (TRIED - 1), ("both", 9, 1)).share == BOTH
    rising = [*start, *[("both", 9)] * TRIED, *[("weights", 12 + n) for n in range(RESTED)]]
    assert judged(*rising[:-1]).share == WEIGHTS
    again = judged(*rising)
    assert again.share == BOTH and again.words == "prompts are tried again"
    assert judged(*rising, ("both", 20)).share == WEIGHTS  # one cycle is enough now
    assert judged(*rising, ("both", 20, 1)).share == BOTH
    # The trial that was under way as they began to rest may still show something.
    assert judged(*rising[: 2 + TRIED], ("weights", 9, 1)).share == BOTH


def test_weights_that_stopped_give_way_to_prompts_and_the_run_ends_where_neither_pays():
    start = [("", 5), ("prompts", 5)]
    flat = [("both", 9 + n % 2, 1) for n in range(2 * LOOKS)]
    assert judged(*start, *flat[: 2 * LOOKS - 2]).share == BOTH  # too few to tell
    stopped = judged(*start, ("both", 9, 1), *[("both", 8, 1)] * (2 * LOOKS - 1))
    assert stopped.share == PROMPTS and "weights settled" in stopped.words
    base = [*start, ("both", 9, 1), *[("both", 8, 1)] * (2 * LOOKS - 1)]
    assert judged(*base, ("prompts", 30)).share == PROMPTS
    assert judged(*base, ("prompts", 30), ("prompts", 30)).share == BOTH  # and weights since
    end = judged(*base, ("prompts", 8))
    assert end.over and end.words.startswith("neither prompts nor weights pay after")
    rising = [("both", 9 + n, 1) for n in range(3 * LOOKS)]
    assert judged(*start, *rising).share == BOTH


def test_a_run_does_not_end_on_ignorance():
    start = [("", 2), ("prompts", 2)]
    assert judged(*start, *[("weights", 2)] * 20, examples=4).share.weights
    assert judged(*start, *[("weights", 2)] * 80, examples=4).share == PROMPTS


def test_a_perfect_score_ends_the_run_once_enough_examples_have_it():
    once = judged(("", 5), ("prompts", V))
    assert once.share == BOTH  # prompts cannot show a gain, and one look may be luck
    assert once.words.startswith("prompts have nothing left to gain")
    few = [("", 5), ("prompts", V), ("both", V)]
    end = judged(*few)
    assert end.over and "all 1: nothing is left to gain" in end.words
    assert not judged(("", V)).over  # at least a look at what learning does
    # The same rollouts again are not more of them.
    rows = history(*few)
    rows[-1] = replace(rows[-1], fresh=False)
    assert not next_share(rows, BOTH, turns=True, perfect_score=1.0).over
    assert not next_share(history(*few), BOTH, turns=True, perfect_score=5).over


@pytest.mark.parametrize("channels", ["prompts", "weights", "both"])
def test_without_turns_there_is_the_end_alone(channels):
    rows = [("", 5), *[(channels, 9)] * 40]
    assert judged(*rows[:5], turns=False) == Decision(BY_NAME[channels])
    end = judged(*rows, turns=False)
    assert end.over and "settled after" in end.words and end.words.endswith("the run ends")


def test_the_budget_goes_where_it_pays_on_simulated_tasks():
    worlds = {world.name: world for world in WORLDS}
    found = {
        name: [simulate(world, seed, rule=True) for seed in range(12)]
        for name, world in worlds.items()
    }

    def share(name, weights):
        """Of the cycles, those with optimizer steps or without, in the first 2,000 rollouts."""
        cycles = [
            s for r in found[name] for s, x in zip(r.shares[1:], r.x[1:], strict=True) if x < 2000
        ]
        return np.mean([(s != "prompts") == weights for s in cycles])

    assert share("prompts alone", False) > share("weights alone", False) + 0.1
    for name in ("weights alone", "both at once", "in turns"):
        assert sum(ran.ended is None for ran in found[name]) >= 11
    assert sum(ran.ended is not None for ran in found["neither"]) >= 6
    spent = np.mean([min(6000, ran.x[-1]) for ran in found["neither"]])
    assert spent < 5700
    # Prompts that can go further once weights have moved are found then.
    assert np.median([max(ran.y) for ran in found["in turns"]]) > 0.8


@pytest.mark.slow
@pytest.mark.usefixtures("repeatable_sampling")
def test_the_loop_gives_the_rollouts_as_decided_and_goes_on_after_a_kill(
    tiny_qwen3, tmp_path, monkeypatch
):
    script = [PROMPTS, PROMPTS, BOTH, WEIGHTS, PROMPTS, Share(False, False)]
    kept = {}

    def scripted(history, now, *, turns, perfect_score, interrupted):
        assert turns and len(history[-1].score_V) == 4
        share = script[len(history) - 1]
        kept[len(history)] = history
        return Decision(share, f"decision {len(history)}" if share != now else None)

    monkeypatch.setattr(ending, "next_share", scripted)
    settings = {"max_cycles": 9, "cycle_iterations": 1}
    whole = compile_tiny(tiny_qwen3, log_dir=tmp_path / "whole", **settings)[2]
    evidence = dict(kept)
    names = ["", "prompts", "prompts", "both", "weights", "prompts"]
    assert [record.share for record in whole.records] == names
    for before, record in zip(whole.records, whole.records[1:], strict=False):
        tried = record.proposals["iterations"] - before.proposals["iterations"]
        if record.share == "prompts":
            assert (
                record.rollouts.slow == 0
                and record.rollouts.fast > 0
                and tried == (2 if before.cycle == 0 else 1)
            )
            assert record.weights_version == before.weights_version
        else:
            assert record.rollouts.slow == 16 and record.rollouts.fast == 0
            assert (tried > 0) == (record.share == "both")
    assert whole.records[-1].ended and whole.stopped == "decision 6"
    write_report([tmp_path / "whole"], tmp_path / "page.html")
    assert "decision 3" in (tmp_path / "page.html").read_text()

    # Killed in a cycle of both and in one of the weights, it comes to the same end.
    kill_before_steps(monkeypatch, 2, 4)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"):
            compile_tiny(tiny_qwen3, log_dir=tmp_path / "cut", **settings)
    cut = compile_tiny(tiny_qwen3, log_dir=tmp_path / "cut", **settings)[2]
    assert kept == evidence
    assert cut.weights_version == whole.weights_version and cut.population == whole.population
    # A run that has ended stays so, and says why.
    again = compile_tiny(tiny_qwen3, log_dir=tmp_path / "cut", **settings)[2]
    assert again.records == cut.records


@pytest.mark.slow
def test_prompts_that_may_not_go_on_give_way_after_the_opening(tiny_qwen3):
    result = compile_tiny(tiny_qwen3, cycle_iterations=0, max_cycles=1, merge_iterations=0)[2]
    assert [record.share for record in result.records] == ["", "prompts", "both"]
    assert result.stopped is None
