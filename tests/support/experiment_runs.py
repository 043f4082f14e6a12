"""Jobs of experiments on a tiny model, and records of runs that were never made."""

from dataclasses import replace

from places import PROGRAM
from records import make_cycle

from fst_dspy.experiments import Job
from fst_dspy.experiments.jobs import Outcome, write_job
from fst_dspy.experiments.runs import Run
from fst_dspy.experiments.worker import run_job
from fst_dspy.types import RolloutCounts

TINY = {
    "steps_per_cycle": 1,
    "problems_per_step": 2,
    "group_size": 4,
    "population_size": 2,
    "first_cycle_iterations": 1,
    "cycle_iterations": 1,
    "minibatch_size": 2,
    "max_tokens": 6,
    "val_size": 2,
    "learning_rate": 1e-2,
}


def job_of(model, arm="fst", **change):
    fields = {"label": arm, "seed": 0, "program": PROGRAM, "rollouts": 60, "settings": TINY}
    return Job(arm=arm, model=str(model), **{**fields, **change})


def run(folder, job):
    write_job(folder / job.name, job)
    return run_job(folder / job.name)


def record(cycle, total, score, kl=0.0, step=0, last=40):
    return make_cycle(
        cycle,
        score,
        RolloutCounts(slow=last),
        total_rollouts=RolloutCounts(slow=total),
        kl_to_base=kl,
        step=step,
    )


def made_run(label, arm, seed, records, test, rollouts=100):
    job = replace(job_of("embedded", arm), label=label, seed=seed, rollouts=rollouts)
    scores = {f"e{n}": (score,) * 4 for n, score in enumerate(test)}
    outcome = Outcome(
        test=dict.fromkeys(
            ("trained_evolved", "base_original", "base_evolved", "trained_original"), scores
        ),
        forgetting=(),
        val_score=max(r.val_score for r in records),
        kl_to_base=records[-1].kl_to_base,
        entropy=0.5,
        rollouts=records[-1].total_rollouts,
        steps=records[-1].step,
        seconds={"slow": 5.0, "test": 2.0},
        stages=("0-fst",),
        base_version="m@0",
        trained_version="m@1",
    )
    return Run(job.name, job, outcome, tuple(records))


def column(table, name):
    return {row[0]: row[table.columns.index(name)] for row in table.rows}
