"""Candidates: each that was tried with its verdict, its texts and a way to it."""

import re

import pytest
from run_folders import HOSTILE, write_run

from fst_dspy.report import data
from fst_dspy.report.answer import candidates as listed
from fst_dspy.student.candidate import make_candidate


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run", steps=6, per_step=16, cycles=3)
    return data.read_run(tmp_path / "run")


def test_rejected_candidates_are_kept_whole_and_told_why(run):
    found = listed.entries(run, 0)
    outcomes = [entry.outcome for entry in found]
    assert [outcomes.count(kind) for kind in ("given", "accepted", "rejected")] == [1, 6, 3]
    for entry in found:
        if entry.outcome == "rejected":
            # The folder holds what changed; with the parent's texts that is the candidate.
            own = entry.candidate
            assert make_candidate(own.components, own.parent_ids).id == own.id
            assert entry.parent.id == own.parent_ids[0] and not entry.node.scores
    html = listed.candidates(run, 0)
    assert "tried: 9, of which 6 were accepted and 3 rejected" in html and HOSTILE not in html
    assert html.count("scores 0, its parent 1 &lt;script&gt;") == 3
    assert "Better on 0, worse on 1, the same on 1." in html


def test_every_row_of_the_tree_leads_to_a_candidate_that_leads_on(run):
    html = listed.candidates(run, 7)
    places = re.findall(r'<li id="(cand-7-\d+)"', html)
    tree = html[html.index("<svg class=twigs") : html.index("</svg>")]
    assert re.findall(r'<a href="#(.*?)">', tree) == places and len(places) == 10
    assert set(re.findall(r'href="#(.*?)"', html)) == set(places)
    assert tree.count(" chosen</tspan>") == 1 and tree.count(">× <") == 3
    for number, text in (("all", "All (10)"), ("rejected", "Rejected (3)")):
        assert re.search(rf'name="show-7" value="{number}"[^<]*> {re.escape(text)}', html)


def test_of_very_many_rejected_ones_the_latest_are_shown(run, monkeypatch):
    monkeypatch.setattr(listed, "MOST_REJECTED", 1)
    (kept,) = [entry for entry in listed.entries(run, 0) if entry.outcome == "rejected"]
    assert kept.candidate.cycle == max(row["cycle"] for row in run.proposals)
