"""A job of an experiment, and its outcome: plain data in the job's folder.

Layout of a job's folder::

    job.json        what is to be done
    log.txt         what its process said, over all attempts
    0-fst/          the run folder of the first stage, as any compile writes it
    outcome.json    what came of it, once it has ended
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import dspy

from fst_dspy.config import FSTConfig, settings_of_arm
from fst_dspy.errors import ConfigError, StoreError
from fst_dspy.experiments.arms import find_arm
from fst_dspy.files import read_json, read_jsonl, write_atomically
from fst_dspy.measures import Forgetting, Interval, MeanAtK
from fst_dspy.run.records import cycle_record
from fst_dspy.types import CycleRecord, RolloutCounts

ADAPTERS = {"chat": "ChatAdapter", "xml": "XMLAdapter", "json": "JSONAdapter"}
"""DSPy's adapters that a job can name, and their classes in ``dspy``."""
JOB, OUTCOME, LOG = "job.json", "outcome.json", "log.txt"


@dataclass(frozen=True)
class Job:
    """One arm with one seed on one program.

    Attributes:
        label: What it is compared as; jobs that differ in their seed alone share it.
        arm: A name in ``arms.ARMS``.
        seed: Of the task and of everything random.
        program: A program's name or file.
        rollouts: Budget over all stages and channels. A run ends where another cycle like the last
            one would go beyond it.
        model: As for ``LocalLM``.
        settings: FST's settings, flat, for every stage; but limits of what agents do, such as
            ``max_env_steps``, are budgets over all of them, as ``rollouts`` is.
        samples: Rollouts a test example of the best pair: mean@k.
        test_size: Test examples; ``None`` takes them all.
        test_temperature: Of everything that is measured once the arm has ended: arms that sample
            at temperatures of their own are compared at one.
        forget_on: Programs that are tested under their ideal prompts before and after.
        reflection_lm: As for ``dspy.LM``; ``None`` for the proposer that needs no model.
        start: Run folder of a finished compile of the same model, whose best weights are started
            from; a relative path is seen from the job's own folder. Its prompts are not taken; KL
            is still to the model as it came.
        instructions: What every predictor is instructed with at first; ``None`` for its own words.
        adapter: A name in ``ADAPTERS``; ``None`` for DSPy's default.
        then: Programs that are learned after it, in one stream; see ``streams.py``.
        module: What is run, as ``python -m module folder``; it writes ``outcome.json``.

    Raises:
        ConfigError: An arm, setting or number that cannot work.
    """

    label: str
    arm: str
    seed: int
    program: str
    rollouts: int
    model: str = "embedded"
    settings: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 4
    test_size: int | None = None
    test_temperature: float = 1.0
    forget_on: tuple[str, ...] = ()
    reflection_lm: str | None = None
    start: str | None = None
    instructions: str | None = None
    adapter: str | None = None
    then: tuple[str, ...] = ()
    module: str = "fst_dspy.experiments.worker"

    def __post_init__(self) -> None:
        find_arm(self.arm)
        if not re.fullmatch(r"[\w.=+-]+", self.label):
            raise ConfigError(f"a label names a folder; {self.label!r} cannot")
        if type(self.seed) is not int or self.seed < 0:  # it is in the folder's name, too
            raise ConfigError(f"seed must be a whole number of at least 0, got {self.seed!r}")
        for name in ("rollouts", "samples", "test_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.adapter is not None and self.adapter not in ADAPTERS:
            raise ConfigError(f"there is no adapter {self.adapter!r}; known: {', '.join(ADAPTERS)}")
        if "max_rollouts" in self.settings:
            raise ConfigError("max_rollouts is the job's budget; give it as rollouts (--rollouts)")
        own = settings_of_arm(self.arm, self.settings)  # as FST has it
        FSTConfig.make(**{**own, "max_rollouts": self.rollouts})

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.label}-{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        test: For each quadrant the scores of each test example, by its id: ``samples`` of them for
            ``"trained_evolved"``, the best pair, and one for the others (``"base_original"``, ...).
            As ``measures.mean_at_k`` takes them.
        forgetting: One a program in ``forget_on``.
        val_score: Of the best pair, on the validation examples it was chosen on.
        kl_to_base: KL(best weights || base), nats a token, on test rollouts of the best pair.
        entropy: Of the best weights there, nats a token.
        rollouts: By channel, over all stages; testing is not counted.
        steps: Optimizer steps.
        seconds: Wall time by channel; ``"test"`` is that of the tests.
        stages: Run folders within the job's.
        base_version, trained_version: Version ids of the weights.
        revision: Of the package that tested it; empty in outcomes older than this field.
    """

    test: Mapping[str, Mapping[str, tuple[float, ...]]]
    forgetting: tuple[Forgetting, ...]
    val_score: float
    kl_to_base: float
    entropy: float
    rollouts: RolloutCounts
    steps: int
    seconds: Mapping[str, float]
    stages: tuple[str, ...]
    base_version: str
    trained_version: str
    revision: str = ""


def adapter_setting(name: str | None) -> dict[str, dspy.Adapter]:
    """DSPy's setting for the adapter that a job names; none for DSPy's default."""
    return {} if name is None else {"adapter": getattr(dspy, ADAPTERS[name])()}


def write_job(folder: Path, job: Job) -> None:
    """Claim a folder for a job, or recognise it as the job's own.

    Raises:
        StoreError: It holds another job.
    """
    path = folder / JOB
    if not path.exists():
        write_json(path, asdict(job))
        return
    wanted, found = (json.loads(json.dumps(asdict(one))) for one in (job, read_job(folder)))
    changed = [key for key in wanted if wanted[key] != found[key]]
    if changed:
        was = ", ".join(f"{key} {found[key]!r}, not {wanted[key]!r}" for key in changed)
        raise StoreError(f"{folder} holds another job: {was}; choose another --out, or delete it")


def read_job(folder: Path) -> Job:
    """The job of a folder."""
    return job_of(read_json(folder / JOB))


def job_of(plain: Mapping[str, Any]) -> Job:
    """A job from its plain values."""
    lists = {name: tuple(plain.get(name, ())) for name in ("forget_on", "then")}
    return Job(**{**plain, **lists})


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write the outcome, atomically."""
    write_json(folder / OUTCOME, asdict(outcome))


def read_outcome(folder: Path) -> Outcome:
    """The outcome of a job that has ended."""
    plain = read_json(folder / OUTCOME)
    return Outcome(
        **{
            **plain,
            "test": {
                quadrant: {example: tuple(scores) for example, scores in found.items()}
                for quadrant, found in plain["test"].items()
            },
            "forgetting": tuple(
                Forgetting(
                    row["task"],
                    MeanAtK(**row["before"]),
                    MeanAtK(**row["after"]),
                    Interval(**row["change"]),
                )
                for row in plain["forgetting"]
            ),
            "rollouts": RolloutCounts(**plain["rollouts"]),
            "stages": tuple(plain["stages"]),
        }
    )


def read_records(folder: Path, stages: Sequence[str]) -> list[CycleRecord]:
    """The cycles of a job's stages as those of one run: counts go on from stage to stage."""
    records: list[CycleRecord] = []
    for stage in stages:
        last = records[-1] if records else None
        for row in read_jsonl(folder / stage / "cycles.jsonl"):
            record = cycle_record(row)
            records.append(_after(last, record) if last is not None else record)
    return records


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, atomically."""
    text = json.dumps(value, indent=1).encode()
    write_atomically(path, lambda file: file.write(text))


def _after(last: CycleRecord, record: CycleRecord) -> CycleRecord:
    channels = sorted({*last.seconds, *record.seconds})
    before = last.total_rollouts.total
    return replace(
        record,
        cycle=last.cycle + 1 + record.cycle,
        step=last.step + record.step,
        total_rollouts=last.total_rollouts.plus(record.total_rollouts),
        early_scores=tuple((before + spent, score) for spent, score in record.early_scores),
        turns=last.turns + record.turns,
        tokens={k: last.tokens.get(k, 0) + n for k, n in record.tokens.items()},
        seconds={c: last.seconds.get(c, 0) + record.seconds.get(c, 0) for c in channels},
    )
