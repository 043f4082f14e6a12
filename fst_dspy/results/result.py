"""The outcome of a compile: what ``detailed_results`` holds, and how it shows itself."""

from __future__ import annotations

import dataclasses
import json
import os
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rich.console import Group, RenderableType

from fst_dspy.config import FSTConfig, SamplingConfig, without_removed
from fst_dspy.display import (
    as_text,
    changed_components,
    diff_html,
    diff_text,
    named_lines,
    notebook_html,
    on_a_screen,
    panel,
    score_text,
)
from fst_dspy.errors import ConfigError
from fst_dspy.files import (
    as_plain,
    path_given,
    read_jsonl,
    shown_folder,
    write_atomically,
    writing_to,
)
from fst_dspy.results import plots
from fst_dspy.results.cycles import cycle_html, cycle_table, records_frame
from fst_dspy.run.records import cycle_record
from fst_dspy.student.candidate import candidate_from_json, population_from_json
from fst_dspy.types import Arm, Candidate, CycleRecord, Population, RolloutCounts

if TYPE_CHECKING:
    import dspy
    import pandas as pd
    from matplotlib.figure import Figure

SCHEMA_VERSION = 1

Tester = Callable[["Sequence[dspy.Example]", int], plots.FourScores]
"""Gives the four mean scores on examples, with so many rollouts each."""


@dataclass(frozen=True)
class Best:
    """The best (weights, candidate) pair on the validation examples.

    That is the latest whose scores are not likely worse (``fst_dspy.fast.decide``) than those of
    the highest mean.

    Attributes:
        version: Version id of the weights.
        candidate: The fast weights that go with them.
        score: Mean validation score of the pair.
        cycle: The cycle after which it was measured.
    """

    version: str
    candidate: Candidate
    score: float
    cycle: int


@dataclass(frozen=True)
class Lineage:
    """Candidates, oldest first, each with what it changed in the texts it came from.

    Attributes:
        nodes: Their parents and last scores.
        candidates: The same ones, with their texts, by id.
        seed: The student's own texts; those of a candidate whose parents are not known are
            compared with them.
    """

    nodes: tuple[plots.LineageNode, ...]
    candidates: dict[str, Candidate]
    seed: Candidate

    def changes(self) -> Iterator[tuple[plots.LineageNode, Candidate, list[tuple[str, str, str]]]]:
        """Each node with the candidate it is compared with, and what it changed there.

        The student's own candidate is compared with an empty one.
        """
        for node in self.nodes:
            after = self.candidates[node.id]
            before = self.candidates[node.parent_ids[0]] if node.parent_ids else self.seed
            if before.id == after.id:
                before = Candidate("nothing", {})
            yield node, before, changed_components(before.components, after.components)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td class=n>{score_text(node.score)}</td><td><details{' open' * node.best}>"
            f"<summary>{escape(self.candidates[node.id].origin)}{' <b>best</b>' * node.best}"
            f"</summary><p>Against {escape(before.id)}:</p>{_diffs_html(changes)}</details></td>"
            "</tr>"
            for node, before, changes in self.changes()
        )
        return notebook_html(
            "<table><thead><tr><th>last score</th><th>candidate</th></tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )

    def __rich__(self) -> RenderableType:
        panels = []
        for node, before, changes in self.changes():
            title = f"{score_text(node.score)} · {self.candidates[node.id].origin}"
            texts = [as_text(f"Against {before.id}:", "dim")]
            texts += [diff_text(old, new) for _, old, new in changes]
            panels.append(panel(title + " · best" * node.best, Group(*texts)))
        return Group(*panels)


@dataclass(frozen=True)
class FSTResult:
    """What a compile did and found.

    Attributes:
        arm: ``"fst"``, ``"rl_only"``, ``"gepa_only"`` or, of ``FSTDistill``, ``"fst_distill"``.
        seed: The seed it ran with.
        config: Every setting.
        records: One ``CycleRecord`` a cycle; the first is the student as it came.
        population: The fast weights at the end of the run.
        best: What was bound into the compiled program.
        seed_candidate: The student's own instructions and demos.
        base_version: Version id of the weights as the model was loaded.
        weights_version: Version id of the weights at the end, which need not be the best.
        log_dir: The run folder, or ``None``.
        structured: Whether the compiled program's answers are held to their format.
    """

    # A compiled program holds its result, and that the program which it tests.
    __fst_not_of_the_program__: ClassVar[bool] = True

    arm: Arm
    seed: int
    config: FSTConfig
    records: tuple[CycleRecord, ...]
    population: Population
    best: Best
    seed_candidate: Candidate
    base_version: str
    weights_version: str
    log_dir: str | None
    structured: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def sampling(self) -> SamplingConfig:
        """How the compiled program is sampled: as ``config`` has it, held to its format or not."""
        return dataclasses.replace(self.config.sampling, structured=self.structured)

    @property
    def stopped(self) -> str | None:
        """What ended the run: a stop callback, or that nothing is left to gain, in words.

        ``None`` where a budget did.
        """
        last = self.records[-1]
        return last.decided if last.ended else last.proposals.get("stopped")

    @property
    def rollouts(self) -> RolloutCounts:
        """Every rollout of the run, by channel."""
        return self.records[-1].total_rollouts

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    def candidates(self) -> list[Candidate]:
        """The candidates that are known: the student's, the run folder's, the last population's.

        Each once; those that did not outlive their cycle are in the folder's ``proposals.jsonl``
        alone. Without a run folder the populations of earlier cycles are missing.
        """
        found = {self.seed_candidate.id: self.seed_candidate}
        if self.log_dir is not None:
            for row in read_jsonl(Path(self.log_dir) / "population.jsonl"):
                for data in row["candidates"]:
                    found.setdefault(data["id"], candidate_from_json(data))
        for candidate in (*self.population.candidates, self.best.candidate):
            found.setdefault(candidate.id, candidate)
        return list(found.values())

    def to_pandas(self) -> pd.DataFrame:
        """The cycles as a table, a row each; see ``results.cycles.records_frame``."""
        return records_frame(self.records)

    def plot_score(self) -> Figure:
        """Validation score and train reward against rollouts of all channels."""
        (score,) = plots.score_curves({"validation score": self.records})
        curves = [score, plots.reward_curve(self.records)]
        return plots.draw_curves(curves, "rollouts, all channels", "mean score")

    def plot_drift(self) -> Figure:
        """Validation score against KL to the base model."""
        curves = plots.drift_curves({self.arm: self.records})
        return plots.draw_curves(curves, "KL to the base model, nats a token", "validation score")

    def plot_lineage(self) -> Figure:
        """The candidates' last scores against the cycle of birth, joined to their parents."""
        return plots.draw_lineage(plots.lineage(self.candidates(), self.records))

    def plot_rollouts(self) -> Figure:
        """Rollouts by channel, a bar a cycle."""
        cycles = [record.cycle for record in self.records]
        return plots.draw_channels(cycles, plots.channel_counts(self.records))

    def lineage(self) -> Lineage:
        """The known candidates, each with what it changed in its parent's texts."""
        known = self.candidates()
        nodes = plots.lineage(known, self.records)
        return Lineage(tuple(nodes), {one.id: one for one in known}, self.seed_candidate)

    def headline(self) -> list[tuple[str, str]]:
        """The figures one asks for first, as names and formatted values."""
        first, last = self.records[0], self.records[-1]
        best, counts = self.records[self.best.cycle], self.rollouts
        return [
            ("arm, seed", f"{self.arm}, {self.seed}"),
            (
                "validation score",
                f"{first.val_score:.3f} → {self.best.score:.3f} (best, cycle {self.best.cycle} "
                f"of {last.cycle})",
            ),
            ("KL to the base model", f"{best.kl_to_base:.4f} nats a token, at the best"),
            (
                "rollouts",
                f"{counts.total:,} (fast {counts.fast:,}, slow {counts.slow:,}, validation "
                f"{counts.eval:,}); {counts.reused:,} reused",
            ),
            ("optimizer steps", str(last.step)),
            ("best weights", self.best.version),
            ("best candidate", self.best.candidate.origin),
            ("run folder", shown_folder(self.log_dir) if self.log_dir else "none"),
        ]

    def changes(self) -> list[tuple[str, str, str]]:
        """What the best candidate changed in the student's texts: name, text before, text after."""
        return changed_components(self.seed_candidate.components, self.best.candidate.components)

    def quadrants(self, testset: Sequence[dspy.Example], *, samples: int = 1) -> plots.FourScores:
        """Test base and trained weights under the original and the evolved texts.

        Args:
            testset: Examples that nothing was learned or chosen on.
            samples: Rollouts an example; the scores are their means. 4 x len(testset) x samples
                rollouts are run, with the program, metric and model of the compile.

        Returns:
            The scores, which are also written to ``quadrants.json`` in the run folder, where there
            is one: the report opens with them.

        Raises:
            ConfigError: This is not the result that the compile returned, but one read from a
                folder or a pickle, which has no program: ``fst_dspy.quadrants`` takes one.
            DataError: There are no examples, or things that are none, or without inputs set.
            StoreError: The run folder cannot be written to.
        """
        tester = self.tester
        if tester is None:
            raise ConfigError(
                "a result that was read from a folder or a pickle has no program to test; use "
                "fst_dspy.quadrants with a RolloutRunner, or compile again with the same log_dir, "
                "which returns at once"
            )
        found = tester(testset, samples)
        if self.log_dir is not None and (folder := Path(self.log_dir)).is_dir():
            pair = {"version": self.best.version, "candidate_id": self.best.candidate.id}
            text = json.dumps({**as_plain(found), "pair": pair}, indent=1).encode()
            with writing_to(folder):
                write_atomically(folder / "quadrants.json", lambda file: file.write(text))
        return found

    @property
    def tester(self) -> Tester | None:
        """What tests its program; ``None`` but of the result that the compile returned."""
        return vars(self).get("_tester")

    def with_tester(self, tester: Tester) -> Self:
        """This result, which now can test its program; for who made it."""
        object.__setattr__(self, "_tester", tester)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For a pickle: without the program."""
        return {name: value for name, value in vars(self).items() if name != "_tester"}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing in it changes

    def report(self, path: str | os.PathLike[str] | None = None, *, show: bool = False) -> Path:
        """Write the run as one self-contained HTML page.

        Args:
            path: The file; ``report.html`` in the run folder if not given.
            show: Open it in a browser.

        Returns:
            The file.

        Raises:
            ConfigError: The compile had no ``log_dir``, from which the page is made.
            StoreError: The run folder cannot be read, or the file not be written.
        """
        if self.log_dir is None:
            raise ConfigError("the report is made from a run folder: compile with log_dir=...")
        import fst_dspy  # by its public name: the page is made of results and lies below them

        file = path_given(path) if path is not None else Path(self.log_dir) / "report.html"
        fst_dspy.report.write_report([Path(self.log_dir)], file)
        if show:
            webbrowser.open(file.resolve().as_uri())
        return file

    def __repr__(self) -> str:
        lines = (f"  {name}: {value}" for name, value in self.headline())
        return on_a_screen([type(self).__name__, *lines])

    def _repr_html_(self) -> str:
        figures = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in self.headline()
        )
        return notebook_html(
            f"<p><b>Fast-Slow Training</b></p><table><tbody>{figures}</tbody></table>"
            f"<details><summary>{len(self.records)} cycles</summary>"
            f"{cycle_html(self.records)}</details>"
            "<p><b>What the best candidate changed</b></p>"
            f"{_diffs_html(self.changes()) or '<p>Nothing.</p>'}"
        )

    def __rich__(self) -> RenderableType:
        changes: list[RenderableType] = [
            panel(name, diff_text(before, after)) for name, before, after in self.changes()
        ]
        return Group(
            panel("Fast-Slow Training", named_lines(self.headline())),
            cycle_table(self.records),
            *(changes or [as_text("The best candidate is the student's own.")]),
        )


def flat_settings(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of ``FSTConfig.to_dict`` as ``FST`` takes them."""
    return {
        name: value for part in without_removed(config).values() for name, value in part.items()
    }


def result_from_json(plain: Mapping[str, Any]) -> FSTResult:
    """The inverse of ``FSTResult.to_dict``, after JSON; further keys are passed over.

    Raises:
        ConfigError: A candidate does not match its id, or a setting is unknown.
    """
    best = plain["best"]
    return FSTResult(
        arm=plain["arm"],
        seed=plain["seed"],
        config=FSTConfig.make(**flat_settings(plain["config"])),
        records=tuple(cycle_record(row) for row in plain["records"]),
        population=population_from_json(plain["population"]),
        best=Best(**{**best, "candidate": candidate_from_json(best["candidate"])}),
        seed_candidate=candidate_from_json(plain["seed_candidate"]),
        base_version=plain["base_version"],
        weights_version=plain["weights_version"],
        log_dir=plain["log_dir"],
        structured=plain.get("structured", False),
    )


def _diffs_html(changes: list[tuple[str, str, str]]) -> str:
    return "".join(
        f"<div><code>{escape(name)}</code><pre>{diff_html(old, new)}</pre></div>"
        for name, old, new in changes
    )
