"""The report: right figures on known runs, one page that loads nothing, hostile text harmless."""

import dataclasses
import io
import json
import math
import os
import random
import re
from html.parser import HTMLParser

import dspy
import pytest
from helpers import Echo, RawAdapter, questions, vowels
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from run_folders import HOSTILE, fake_prompt, write_run
from typer.testing import CliRunner

from fst_dspy import FST, LocalLM
from fst_dspy.cli import app
from fst_dspy.errors import ModelError, StoreError
from fst_dspy.files import read_json, read_jsonl
from fst_dspy.report import data, follow, page, render, sections, write_report
from fst_dspy.report.answer.examples import perfect_score
from fst_dspy.report.faults import find_faults, skipped_steps
from fst_dspy.report.rollouts import COLUMNS, Outcome, read_rollouts
from fst_dspy.report.watch import run_view, watch
from fst_dspy.run import rollout_log
from fst_dspy.run.records import cycle_record
from fst_dspy.run.store import RunStore
from fst_dspy.types import Candidate

pytestmark = pytest.mark.slow

VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what could load or run something."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.scripts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    write_run(folder, steps=12, per_step=64, cycles=3)
    return folder


@pytest.fixture(scope="module")
def html(run_folder):
    run = data.read_run(run_folder)
    return render([run], [read_rollouts(run_folder, fake_prompt)])


def unpack(packed):
    """The rollouts' texts, as the page's script puts them together."""
    texts = ["\n".join(packed["lines"][n] for n in lines) for lines in packed["texts"]]
    return [
        {
            "example_id": packed["examples"][columns["example"]],
            "candidate_id": packed["candidates"][columns["candidate"]],
            "kind": packed["kinds"][columns["kind"]] if columns["kind"] >= 0 else None,
            "feedback": texts[columns["feedback"]],
            "completions": [texts[call[2]] for call in columns["calls"]],
            "prompts": [texts[call[1]] if call[1] >= 0 else None for call in columns["calls"]],
            "reward": columns["reward"],
            "step": columns["step"],
        }
        for columns in (
            dict(zip(COLUMNS, row, strict=True))
            for row in zip(*(packed["columns"][name] for name in COLUMNS), strict=True)
        )
    ]


def test_the_page_is_whole_and_loads_nothing(html):
    parsed = Page(html)
    assert parsed.tags.count("script") == 2 and parsed.tags.count("main") == 1
    loading = {"src", "action", "data", "poster", "srcset", "style", "background"}
    assert not [a for a in parsed.attributes if a[1] in loading or a[1].startswith("on")]
    links = [value for _, name, value in parsed.attributes if name == "href"]
    assert all(link.startswith("#") or link == "data:," for link in links)
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    style_and_script = re.findall(r"<style>(.*?)</style>", html, re.S) + parsed.scripts[1:]
    assert not [t for t in style_and_script if re.search(r"https?:|@import|url\(|fetch\(", t)]
    assert "http://" not in html and "https://" not in html


def test_the_policy_allows_this_script_and_style_alone(html):
    import base64
    import hashlib

    policy = re.search(r'Security-Policy" content="([^"]+)"', html)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    style = re.search(r"<style>(.*?)</style>", html, re.S)[1]
    for text in (style, Page(html).scripts[1]):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_hostile_text_is_data_wherever_it_stands(tmp_path):
    result = write_run(tmp_path / "<b>run", steps=4, per_step=64)
    rows = list(read_jsonl(tmp_path / "<b>run" / "population.jsonl"))
    rows[-1]["candidates"][0]["components"]["route.instructions"] = HOSTILE
    rows[-1]["candidates"][0]["source"] = '"><script>x'
    (tmp_path / "<b>run" / "population.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    config = read_json(tmp_path / "<b>run" / "config.json")
    config["settings"]["slow"]["loss_type"] = config["arm"] = HOSTILE
    config["student"]["route.instructions"] = "</pre></script>" + HOSTILE
    (tmp_path / "<b>run" / "config.json").write_text(json.dumps(config))
    write_report([tmp_path / "<b>run"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    parsed = Page(text)
    assert parsed.tags.count("script") == 2 and "img" not in parsed.tags and "b" in parsed.tags
    assert not [a for a in parsed.attributes if a[1].startswith("on")]
    packed = json.loads(parsed.scripts[0])[0]
    assert any(HOSTILE in text for row in unpack(packed) for text in row["completions"])
    assert packed["label"] == "<b>run" and "<b>run" not in text
    assert result.log_dir


def test_packed_rollouts_are_those_of_the_log(run_folder):
    rows = list(rollout_log.unpack(read_jsonl(run_folder / "rollouts.jsonl")))
    found = read_rollouts(run_folder, fake_prompt)
    unpacked = unpack(found.packed)
    assert len(unpacked) == len(rows) == len(found.outcomes) == 768
    for row, plain in zip(rows, unpacked, strict=True):
        assert plain["completions"] == [call["text"] for call in row["calls"]]
        assert plain["prompts"] == [fake_prompt(call["prompt_ids_T"]) for call in row["calls"]]
        for name in ("example_id", "candidate_id", "feedback", "reward", "step"):
            assert plain[name] == row[name]
        assert plain["kind"] == (row["failure"] and row["failure"]["kind"])
    assert unpack(read_rollouts(run_folder).packed)[0]["prompts"] == [None]


def test_ten_thousand_rollouts_take_a_few_megabytes(tmp_path):
    write_run(tmp_path / "big", steps=160, per_step=64, cycles=8)
    run = data.read_run(tmp_path / "big")
    rollouts = read_rollouts(run.folder, fake_prompt)
    text = render([run], [rollouts])
    assert len(rollouts.outcomes) == 10_240
    assert len(text) < 6e6 < (run.folder / "rollouts.jsonl").stat().st_size
    # Before the data, and so before the first paint, comes what does not grow with the rollouts.
    assert text.index('id="data"') < 125_000
    assert text.count("<li>") < 300


def outcome(answer="amber", reward=0.0, failure=None, example="a", cut=0, tokens=10):
    return Outcome(1, 1, example, reward, failure, answer, 1, cut, tokens)


def test_faults_tell_format_wrong_and_stock_answers_apart():
    stock = [outcome(example=name) for name in "abc"]
    outcomes = [
        *stock,
        outcome(reward=1.0, tokens=30),
        outcome("jade", example="b"),
        outcome("jade", example="b"),
        outcome(None, failure="parse"),
        outcome(None, failure="truncated", cut=1),
        outcome(None, failure="program"),
        outcome("onyx", reward=1.0, failure="no_calls"),
    ]
    faults = find_faults(outcomes, failure_score=0.0)
    assert faults.rewarded_share == 0.1 and faults.wrong_share == 0.5
    assert faults.format_share == 0.2 and faults.other_share == 0.2
    assert faults.stock_share == 0.3 and faults.stock == (True,) * 3 + (False,) * 7
    assert faults.by_kind["parse"] == 0.1 and faults.cut_share == 0.1
    assert (faults.answers[0].text, faults.answers[0].examples) == ("amber", 3)
    assert faults.answers[0].share == pytest.approx(4 / 6)
    assert faults.tokens["rewarded"] == 30
    assert find_faults([], 0.0).rollouts == 0


def test_a_failure_scores_the_lowest_and_the_perfect_the_highest_that_was_seen(run_folder):
    run = data.read_run(run_folder)
    assert data.failure_score(run) == 0.0 and perfect_score(run) == 1.0
    cycles = [{**cycle, "reward_range": [-2.0, -1.0]} for cycle in run.cycles]
    answers = [{**row, "reward": 9.0} for row in run.answers]
    of_another_range = dataclasses.replace(run, cycles=cycles, answers=answers)
    assert data.failure_score(of_another_range) == -2.0
    assert perfect_score(of_another_range) == 9.0


def test_the_run_says_what_its_result_says(run_folder):
    run = data.read_run(run_folder)
    result = read_json(run_folder / "result.json")
    best = data.best_cycle(run)
    assert (best["cycle"], best["val_score"]) == (result["best"]["cycle"], result["best"]["score"])
    scores = data.best_scores(run)
    assert sum(scores) / len(scores) == pytest.approx(best["val_score"])
    assert skipped_steps(run.steps) == {"constant": 1}
    assert data.spent(run) == run.cycles[-1]["seconds"]


def test_a_drift_that_is_not_finite_is_shown_as_such(tmp_path):
    result = write_run(tmp_path / "run", finished=False)
    store = RunStore(tmp_path / "run")
    store.clear_logs()
    store.append(
        "cycles", [dataclasses.replace(record, kl_to_base=math.inf) for record in result.records]
    )
    store.close()
    write_report([tmp_path / "run"], tmp_path / "page.html")
    assert "<td>nan</td>" in (tmp_path / "page.html").read_text()
    (first, *_) = map(cycle_record, store.read("cycles"))
    assert math.isnan(first.kl_to_base)


def test_lineage_holds_every_candidate_once_under_its_parent(run_folder):
    run = data.read_run(run_folder)
    seen = []

    def walk(node):
        seen.append(node.candidate.id)
        for child in node.children:
            assert child.parent == node.candidate
            assert node.candidate.id in child.candidate.parent_ids
            walk(child)

    roots = data.lineage(run)
    for root in roots:
        walk(root)
    assert sorted(seen) == sorted(data.candidates(run)) and len(seen) > 5
    assert [root.candidate.source for root in roots] == ["seed"]


def test_lineage_survives_a_lost_parent_and_a_circle(run_folder):
    def row(name, parents):
        return dataclasses.asdict(Candidate(name, {"p.instructions": name}, parents, 1, "merge"))

    run = dataclasses.replace(
        data.read_run(run_folder),
        cycles=(),
        populations=[{"candidates": [row("a", ["b"]), row("b", ["a"]), row("c", ["lost"])]}],
    )
    roots = data.lineage(run)
    assert [root.candidate.id for root in roots[1:]] == ["b", "c"]
    assert [child.candidate.id for child in roots[1].children] == ["a"]


def test_pareto_table_is_the_newest_population(run_folder):
    run = data.read_run(run_folder)
    found = data.pareto(run)
    row = run.populations[-1]
    ids = [candidate["id"] for candidate in row["candidates"]]
    for k, name in enumerate(found.candidate_ids):
        expected = dict(zip(row["val_ids"], row["score_K_V"][ids.index(name)], strict=True))
        assert dict(zip(found.val_ids, found.score_K_V[k], strict=True)) == expected
    assert list(found.mean_K) == sorted(found.mean_K, reverse=True)
    solved = [sum(column) for column in zip(*found.score_K_V, strict=True)]
    assert solved == sorted(solved)
    assert found.front <= set(ids) and found.candidate_ids[0] in found.front


def test_one_candidate_is_not_compared_with_itself(run_folder):
    run = data.read_run(run_folder)
    row = run.populations[-1]
    alone = {**row, "candidates": row["candidates"][:1], "score_K_V": row["score_K_V"][:1]}
    shown = sections.pareto(dataclasses.replace(run, populations=[alone]))
    assert "the one candidate of the population" in shown and "all score the same" not in shown


def test_scores_on_training_problems_are_not_called_validation(run_folder):
    run = data.read_run(run_folder)
    assert data.pareto(run).validated and data.best_scores(run)
    train = run.config["train_ids"][: len(run.populations[-1]["val_ids"])]
    reused = [{**row, "val_ids": train} for row in run.populations]
    run = dataclasses.replace(run, populations=reused, answers=())
    assert not data.pareto(run).validated and data.best_scores(run) == ()
    shown = render([run], [read_rollouts(run_folder)])
    assert "on 24 recent training problems" in shown and "; 95 %: " not in shown
    assert "differ from the validation scores" in shown
    assert "differ from the validation scores" not in render(
        [data.read_run(run_folder)], [read_rollouts(run_folder)]
    )


def test_where_the_population_is_scored_on_training_problems_the_answers_give_the_interval(
    run_folder,
):
    run = data.read_run(run_folder)
    reused = dataclasses.replace(run, populations=())
    scores = data.best_scores(reused)
    assert scores and scores == data.best_scores(run)
    facts = {name: note for name, _, note in sections.headline_facts(reused)}
    assert "; 95 %: " in facts["best validation score"]


def test_runs_are_laid_over_one_another(run_folder, tmp_path):
    write_run(tmp_path / "two", seed=7, arm="rl_only")
    write_report([run_folder, tmp_path / "two"], tmp_path / "page.html")
    parsed = Page((tmp_path / "page.html").read_text())
    packed = json.loads(parsed.scripts[0])
    assert [one["label"] for one in packed] == ["one", "two"]
    assert ("section", "id", "lineage-1") in parsed.attributes
    text = (tmp_path / "page.html").read_text()
    differing = text[text.index("Settings that differ") : text.index("Settings that are the same")]
    assert "rl_only" in differing and "max_cycles" in differing and "epsilon" not in differing


def test_runs_of_one_name_get_labels_that_differ(tmp_path):
    for parent in ("a", "b"):
        write_run(tmp_path / parent / "run", steps=2, cycles=1)
    runs = data.read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert [run.label for run in runs] == ["a/run", "b/run"]
    again = data.read_runs([tmp_path / "a" / "run"] * 2)
    assert len({run.label for run in again}) == 2


def test_a_run_can_be_read_at_every_moment(tmp_path):
    source = tmp_path / "whole"
    write_run(source, steps=4, cycles=2)
    logs = sorted(source.glob("*.jsonl"))
    for share in (0.0, 0.1, 0.4, 0.7, 0.95):
        part = tmp_path / f"part-{share}"
        part.mkdir()
        (part / "config.json").write_text((source / "config.json").read_text())
        for log in logs:
            text = log.read_text()
            (part / log.name).write_text(text[: int(share * len(text))])
        run = data.read_run(part)
        assert not run.finished
        parsed = Page(render([run], [read_rollouts(part)], refresh=30))
        assert ("meta", "http-equiv", "refresh") in parsed.attributes
        Console(file=open("/dev/null", "w")).print(run_view(run))  # noqa: SIM115


def test_follow_ends_with_the_run(tmp_path):
    write_run(tmp_path / "run", steps=2, cycles=1, finished=False)
    naps = []

    def sleep(seconds):
        assert "refresh" in (tmp_path / "page.html").read_text()
        naps.append(seconds)
        if len(naps) == 2:
            (tmp_path / "run" / "result.json").write_text("{}")

    follow([tmp_path / "run"], tmp_path / "page.html", 7.0, sleep=sleep)
    assert naps == [7.0, 7.0]
    assert 'http-equiv="refresh"' not in (tmp_path / "page.html").read_text()


def test_watch_shows_the_run_until_it_ends(tmp_path):
    write_run(tmp_path / "run", finished=False)
    with open(tmp_path / "screen", "w") as screen:
        console = Console(file=screen, force_terminal=True, width=100, height=60)
        watch(
            tmp_path / "run",
            console,
            sleep=lambda _: (tmp_path / "run" / "result.json").write_text("{}"),
        )
    text = (tmp_path / "screen").read_text()
    assert "last written" in text and "finished" in text
    assert "population after cycle 2" in text and "nats a token" in text


def test_a_real_compile_can_be_reported(tiny_qwen3, tmp_path):
    run = tmp_path / "run"
    with dspy.context(lm=LocalLM(str(tiny_qwen3)), adapter=RawAdapter()):
        FST(
            vowels,
            log_dir=run,
            max_cycles=2,
            steps_per_cycle=2,
            group_size=4,
            population_size=2,
            problems_per_step=2,
            max_tokens=8,
            val_size=4,
            first_cycle_iterations=2,
        ).compile(Echo(), trainset=questions(6), valset=questions(4, 6))
    done = CliRunner().invoke(
        app, ["report", str(run), "--out", str(tmp_path / "r.html"), "--model", str(tiny_qwen3)]
    )
    assert done.exit_code == 0, done.output
    packed = json.loads(Page((tmp_path / "r.html").read_text()).scripts[0])[0]
    rows = unpack(packed)
    assert len(rows) == 32 and set(packed["columns"]["step"]) == {1, 2, 3, 4}
    assert all("question: number" in row["prompts"][0] for row in rows)
    # The seconds of the records are those since the start: the report relies on it.
    run = data.read_run(run)
    assert run.cycles[-1]["seconds"]["eval"] > run.cycles[0]["seconds"]["eval"]
    shown = CliRunner().invoke(app, ["watch", str(run.folder)])
    assert shown.exit_code == 0 and "finished" in shown.output


def test_what_is_not_a_run_folder_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"no config\.json"):
        write_report([tmp_path], tmp_path / "page.html")
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 1 and "StoreError" in done.output
    assert CliRunner().invoke(app, ["watch", str(tmp_path)]).exit_code == 1
    write_run(tmp_path / "run", steps=2, cycles=1)
    with pytest.raises(ModelError, match="no tokenizer"):
        write_report([tmp_path / "run"], tmp_path / "page.html", model=str(tmp_path / "nowhere"))


@given(st.text(), st.text())
@settings(max_examples=200)
def test_json_in_a_script_comes_back_and_ends_no_element(key, text):
    written = page.script_json({key: [text, "</script><!--"]})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {key: [text, "</script><!--"]}


def test_a_lone_surrogate_does_not_stop_the_report(tmp_path):
    write_run(tmp_path / "run", steps=2, cycles=1)
    with open(tmp_path / "run" / "rollouts.jsonl") as file:
        row = json.loads(file.readline())
    row["calls"][0]["text"] = "half \ud800 pair"
    (tmp_path / "run" / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
    write_report([tmp_path / "run"], tmp_path / "page.html")
    assert "half ? pair" in (tmp_path / "page.html").read_text()


# --- damaged and hostile folders ------------------------------------------------------------------

ESCAPES = "\x1b]52;c;aGk=\x07\x1b[2J\x9b2J\u202e[/bold][red]"
UNFIT = [
    None, [], {}, "", HOSTILE, ESCAPES, "0</b><meta http-equiv=refresh content=0>", -1, 0, True,
    3.5, float("nan"), float("inf"), 1e308, -1e308, 10**400, [[]], [None], {"a": None},
]  # fmt: skip


def places(value, path=()):
    """Paths to everything inside a JSON value."""
    found = list(value.items()) if isinstance(value, dict) else []
    found += list(enumerate(value)) if isinstance(value, list) else []
    for key, inner in found:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damage(text, rng):
    """A line of JSON with one thing wrong."""
    kind = rng.choice(["value"] * 6 + ["gone"] * 3 + ["cut", "bytes", "deep"])
    if kind == "cut":
        return text[: rng.randrange(len(text))] + "\n"
    if kind == "bytes":
        at = rng.randrange(len(text))
        return text[:at] + rng.choice(["\udcff", "}", "\x00", ","]) + text[at + 1 :]
    if kind == "deep":
        return "[" * 5000 + "]" * 5000 + "\n"
    whole = json.loads(text)
    *way, last = rng.choice(list(places(whole)))
    inner = whole
    for key in way:
        inner = inner[key]
    if kind == "gone":
        del inner[last]
    else:
        inner[last] = rng.choice(UNFIT)
    return json.dumps(whole) + "\n"


def test_a_damaged_folder_is_shown_harmlessly_or_refused(tmp_path):
    write_run(tmp_path / "run", steps=2, per_step=8, cycles=1)
    (tmp_path / "run" / "quadrants.json").write_text(
        json.dumps(
            {
                **dict.fromkeys(("base_original", "base_evolved", "trained_original"), 0.5),
                "trained_evolved": 1.0,
                "examples": 4,
            }
        )
    )
    files = [path for path in (tmp_path / "run").glob("*.json*") if path.stat().st_size]
    whole = {path: path.read_text() for path in files}
    rng, refused = random.Random(0), 0
    for number in range(500):
        path = files[number % len(files)]
        lines = [whole[path]]
        if path.suffix == ".jsonl":
            lines = whole[path].splitlines(keepends=True)
        at = rng.randrange(len(lines))
        lines[at] = damage(lines[at], rng)
        path.write_text("".join(lines), errors="surrogateescape")
        shown = io.StringIO()
        console = Console(file=shown, width=100)
        try:
            write_report([tmp_path / "run"], tmp_path / "page.html")
            watch(tmp_path / "run", console)
        except StoreError as error:
            refused += 1
            assert "leave it out" in str(error)
        else:
            parsed = Page((tmp_path / "page.html").read_text())
            assert parsed.tags.count("script") == 2 and "img" not in parsed.tags
            assert ("meta", "http-equiv", "refresh") not in parsed.attributes
            json.loads(parsed.scripts[0], parse_constant=pytest.fail)
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown.getvalue())
        path.write_text(whole[path])
    assert 150 < refused < 450


def test_long_lines_of_candidates_are_shown(tmp_path):
    write_run(tmp_path / "run", steps=2, cycles=1)
    log = tmp_path / "run" / "population.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for n in range(1500):
        line = {"id": f"n{n}", "components": {}, "parent_ids": [f"n{n + 1}"], "cycle": 1}
        rows[-1]["candidates"].append({**line, "source": "merge"})
    rows[-1]["score_K_V"] = []
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report([tmp_path / "run"], tmp_path / "page.html")
    assert "<code>n1499</code>" in (tmp_path / "page.html").read_text()


def test_neither_a_pipe_nor_a_folder_is_read(tmp_path):
    write_run(tmp_path / "run", steps=2, cycles=1)
    (tmp_path / "run" / "steps.jsonl").unlink()
    os.mkfifo(tmp_path / "run" / "steps.jsonl")
    with pytest.raises(StoreError, match="is no file"):
        data.read_run(tmp_path / "run")
    with pytest.raises(StoreError, match="cannot write"):
        write_run(tmp_path / "two", steps=2, cycles=1)
        write_report([tmp_path / "two"], tmp_path)


def test_the_terminal_gets_no_escapes_from_a_run(tmp_path):
    write_run(tmp_path / "run", steps=2, cycles=1)
    config = read_json(tmp_path / "run" / "config.json")
    config["arm"] = config["student"]["route.instructions"] = ESCAPES
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(app, ["watch", str(tmp_path / "run")])
    assert done.exit_code == 0 and "\u241b]52" in done.output and "[/bold][red]" in done.output
    assert not re.search("[\x1b\x07\x9b\u202e]", done.output)
