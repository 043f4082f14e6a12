"""The report tells what failed, by kind, with its share and the first message, as text."""

from __future__ import annotations

import json
from html import escape

import dspy
from helpers import Echo, RawAdapter, questions, vowels
from run_folders import HOSTILE, write_run

from fst_dspy import FST, LocalLM
from fst_dspy.files import read_jsonl
from fst_dspy.report import write_report


def section(folder, tmp_path):
    """The section of the page of one run."""
    write_report([folder], tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    start = html.index('<section id="failures-0">')
    return html[start : html.index("</section>", start)].replace("\N{NO-BREAK SPACE}", "")


def test_kinds_have_their_shares_and_first_messages(tmp_path):
    write_run(tmp_path / "run", cycles=2)
    rows = list(read_jsonl(tmp_path / "run" / "cycles.jsonl"))
    rows[-2] |= {
        "failure_shares": {"parse": 0.9, "program": 0.02},
        "failure_messages": {"program": f"KeyError: {HOSTILE}", "parse": "no field 'queue'"},
    }
    rows[-1] |= {"failure_shares": {"parse": 0.25}, "failure_messages": {"parse": "another"}}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run" / "cycles.jsonl").write_text(text)
    found = section(tmp_path / "run", tmp_path)
    assert found.index("parse") < found.index("program")
    assert "<td>25%</td><td>90% in 1</td><td>no field &#x27;queue&#x27;</td>" in found
    message = escape(" ".join(f"KeyError: {HOSTILE}".split()))
    assert f"<td>0%</td><td>2.0% in 1</td><td>{message}</td>" in found
    assert HOSTILE not in found and "another" not in found


def test_records_of_before_have_no_messages(tmp_path):
    write_run(tmp_path / "run")
    rows = list(read_jsonl(tmp_path / "run" / "cycles.jsonl"))
    for row in rows:
        row.pop("failure_messages")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run" / "cycles.jsonl").write_text(text)
    assert "<td>—</td>" in section(tmp_path / "run", tmp_path)


def test_a_run_of_prompts_alone_whose_program_fails_tells_it(tiny_qwen3, tmp_path):
    class Fails(Echo):
        def forward(self, question):
            found = super().forward(question)
            if question.endswith(("1", "3", "6")):
                raise LookupError(f"no entry <{question}>")
            return found

    settings = {"arm": "gepa_only", "max_cycles": 1, "val_size": 4, "max_tokens": 4}
    with dspy.context(lm=LocalLM(str(tiny_qwen3)), adapter=RawAdapter()):
        FST(vowels, log_dir=tmp_path / "run", first_cycle_iterations=1, **settings).compile(
            Fails(), trainset=questions(6), valset=questions(4, 6)
        )
    found = section(tmp_path / "run", tmp_path)
    assert "program" in found and "LookupError: no entry &lt;number 6&gt;" in found
