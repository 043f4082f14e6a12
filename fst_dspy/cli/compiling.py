"""The command ``fst compile``: a task compiled, tested and told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fst_dspy.cli.checks import check_arguments, check_same_run
from fst_dspy.cli.options import (
    ArmOption,
    Json,
    Model,
    NoRollouts,
    Out,
    Preset,
    Program,
    ReflectionLM,
    ReportTo,
    Seed,
    Settings,
    console,
    errors_told,
    parse_settings,
    print_json,
    results_as_json,
)
from fst_dspy.display import as_text, panel, table
from fst_dspy.errors import DataError
from fst_dspy.files import shown_folder

if TYPE_CHECKING:
    from fst_dspy.results.result import FSTResult
    from fst_dspy.rollouts.evaluate import Quadrants
    from fst_dspy.types import Task


def compile(
    program: Program,
    model: Model = "embedded",
    out: Out = None,
    seed: Seed = 0,
    arm: ArmOption = "fst",
    auto: Preset = None,
    settings: Settings = None,
    reflection_lm: ReflectionLM = None,
    report_to: ReportTo = None,
    no_rollouts: NoRollouts = False,
    as_json: Json = False,
) -> None:
    """Compile a program with FST and report what each channel brought on the test set."""
    with results_as_json(as_json), errors_told():
        given = parse_settings(settings)
        check_arguments(
            [program], model, given, auto=auto, arm=arm, reflection_lm=reflection_lm, out=out
        )
        if out is not None:
            check_same_run(out, seed, arm, auto, given)
        options: dict[str, Any] = {
            "reflection_lm": reflection_lm,
            "auto": auto,
            "arm": arm,
            "seed": seed,
            "log_dir": out,
            "report_to": [str(tracker) for tracker in report_to or ()],
            "log_rollouts": not no_rollouts,
        }
        task, result, tested = _run(program, model, {**options, **given})
        if as_json:
            print_json(_plain(task.name, model, result, tested))
        else:
            _report(result, tested)


def _run(program: str, model: str, options: dict[str, Any]) -> tuple[Task, FSTResult, Quadrants]:
    with console.status("loading"):
        from fst_dspy.tasks import load_task

        seed = options["seed"]
        task = load_task(program, seed)
        if not task.trainset:
            raise DataError(f"the trainset of {task.name} is empty: there must be examples in it")
        if not task.testset:
            raise DataError(
                f"{task.name} has no testset, on which the result is tested: leave some examples "
                "out of the trainset"
            )
        # What the model takes to run comes after what can be wrong without it.
        import dspy

        from fst_dspy.lm.local_lm import LocalLM
        from fst_dspy.loop.progress import RichProgress
        from fst_dspy.optimizer import FST

        fst = FST(task.metric, track_stats=True, progress=RichProgress(console), **options)
        lm = LocalLM(model)
    about = f" on {lm.model}, arm {fst.arm}, seed {seed}"
    console.print(as_text(task.name, "bold").append_text(as_text(about, "not bold")))
    with dspy.context(lm=lm):
        compiled = fst.compile(task.program, trainset=task.trainset, valset=task.valset)
        result = compiled.detailed_results
        with console.status(f"testing on {len(task.testset)} examples"):
            tested = result.quadrants(task.testset)
    return task, result, tested


def _plain(name: str, model: str, result: FSTResult, tested: Quadrants) -> dict[str, Any]:
    """What ``--json`` prints."""
    from fst_dspy.files import as_plain

    best, last = result.best, result.records[-1]
    return {
        "program": name,
        "model": model,
        "arm": result.arm,
        "seed": result.seed,
        "test_scores": as_plain(tested),
        "validation_score": {"before": result.records[0].val_score, "best": best.score},
        "best": {
            "weights": best.version,
            "candidate": best.candidate.id,
            "cycle": best.cycle,
            "texts": dict(best.candidate.components),
        },
        "kl_to_base": result.records[best.cycle].kl_to_base,
        "rollouts": as_plain(result.rollouts),
        "seconds": dict(last.seconds),
        "run_folder": result.log_dir,
    }


def _report(result: FSTResult, tested: Quadrants) -> None:
    best = as_text(f"{tested.trained_evolved:.3f}", "bold")
    rows = (
        ("base", f"{tested.base_original:.3f}", f"{tested.base_evolved:.3f}"),
        ("trained", f"{tested.trained_original:.3f}", best),
    )
    title = f"Mean test score, {tested.examples} examples, training temperature"
    console.print(table(("weights", "original context", "evolved context"), rows, title, left=1))
    for component, text in result.best.candidate.components.items():
        if result.seed_candidate.components.get(component) != text:
            console.print(panel(component, text, border="green"))
    counts, last = result.rollouts, result.records[result.best.cycle]
    console.print(
        f"{counts.total:,} rollouts (fast {counts.fast:,}, slow {counts.slow:,}, "
        f"validation {counts.eval:,}); KL to base {last.kl_to_base:.4f} nats a token; "
        f"{sum(result.records[-1].seconds.values()):.0f} s"
    )
    if result.log_dir is not None:
        console.print(f"run folder: {shown_folder(result.log_dir)}")
