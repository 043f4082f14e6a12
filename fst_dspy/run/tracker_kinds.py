"""The three trackers: accelerate's, with prompts, a place in the run folder and a way to go on."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import is_mlflow_available, is_tensorboard_available, is_wandb_available

from fst_dspy.types import CycleRecord, Population

PROJECT = "fst_dspy"
"""W&B's project, unless ``WANDB_PROJECT`` names one, and MLflow's experiment likewise."""


@dataclass(frozen=True)
class Logged:
    """What a tracker has: the id of its run, the last step and cycle, and where on the axis."""

    run_id: str | None = None
    step: int = 0
    cycle: int = -1
    rollouts: int = -1


class TensorBoard(TensorBoardTracker):
    """Event files in the run folder's ``tensorboard/``."""

    def __init__(self, folder: Path, logged: Logged) -> None:
        # What was logged but not noted, the run having been killed in between, is logged again:
        # this hides the first.
        purge = None if logged.run_id is None else logged.rollouts + 1
        super().__init__("tensorboard", folder, purge_step=purge)

    @property
    def id(self) -> str:
        return self.run_name

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """As text: accelerate's own would show as further runs."""
        self.log({"settings": _code(json.dumps(values, indent=1))}, step=0)

    def log_prompts(self, record: CycleRecord, population: Population) -> None:
        markdown = prompts_markdown(record, population)
        self.log({"prompts": markdown}, step=record.total_rollouts.total)

    def close(self, *, failed: bool) -> None:
        self.finish()


class WandB(WandBTracker):
    """A W&B run in the run folder's ``wandb/``; every resumption adds a folder to it.

    W&B writes in a process of its own, which dies with a run that is killed and takes the last
    second with it.
    """

    def __init__(self, folder: Path, logged: Logged) -> None:
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":  # W&B looks for its telemetry server even then
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")  # seconds, not 15
        super().__init__(
            os.environ.get("WANDB_PROJECT", PROJECT),
            dir=folder,
            name=folder.name,
            id=logged.run_id,
            resume="allow",
            mode=mode,
            reinit="create_new",  # a run of the user's own is left alone
        )

    @property
    def id(self) -> str:
        return self.run.id

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """In this run: accelerate's own writes to whichever is W&B's current one."""
        self.run.config.update(values)

    def log(
        self, values: dict[str, Any], step: int | None = None, *, commit: bool = True, **kwargs: Any
    ) -> None:
        """At once, not with the next step; W&B takes no second row at a step, so it is moved on."""
        assert step is not None
        super().log(values, step=max(step, self.run.step), commit=commit, **kwargs)

    def log_prompts(self, record: CycleRecord, population: Population) -> None:
        """In the row that is logged next, the cycle's figures."""
        columns = ["cycle", "candidate", "score", "source", "parents", "component", "text"]
        scored = zip(population.candidates, record.val_scores, strict=True)
        data = [
            [record.cycle, one.id, score, one.source, ", ".join(one.parent_ids), name, text]
            for one, score in scored
            for name, text in one.components.items()
        ]
        at = record.total_rollouts.total
        self.log_table("prompts", columns, data, step=at, commit=False)

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow(MLflowTracker):
    """An MLflow run in the run folder's ``mlflow/``, or where the user's tracking URI points."""

    def __init__(self, folder: Path, logged: Logged) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
        import mlflow

        own = folder / "mlflow"
        self._uri = None if mlflow.is_tracking_uri_set() else f"sqlite:///{own / 'mlflow.db'}"
        if self._uri is not None:
            own.mkdir(exist_ok=True)
        super().__init__(
            PROJECT,
            logging_dir=(own / "artifacts").as_uri() if self._uri is not None else None,
            run_id=logged.run_id,
            run_name=folder.name,
            nested_run=True,  # beneath a run of the user's own, where there is one
        )

    @property
    def id(self) -> str:
        return self.active_run.info.run_id

    def start(self) -> None:
        self._set_uri(self._uri)
        try:
            super().start()
        except BaseException:
            self._set_uri(None)
            raise

    def log_prompts(self, record: CycleRecord, population: Population) -> None:
        import mlflow

        markdown = prompts_markdown(record, population)
        mlflow.log_text(markdown, f"prompts/cycle-{record.cycle:04}.md")

    def close(self, *, failed: bool) -> None:
        import mlflow

        try:
            mlflow.end_run("FAILED" if failed else "FINISHED")
        finally:
            self._set_uri(None)

    def _set_uri(self, uri: str | None) -> None:
        """MLflow keeps one for the whole process: ours is there for the compile only."""
        import mlflow

        if self._uri is not None:
            mlflow.set_tracking_uri(uri)


Tracker = TensorBoard | WandB | MLflow
KINDS: dict[str, type[TensorBoard] | type[WandB] | type[MLflow]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}
INSTALLED = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "mlflow": is_mlflow_available,
}


def prompts_markdown(record: CycleRecord, population: Population) -> str:
    """A population's texts, each candidate with its score and where it came from."""
    parts = [f"# Cycle {record.cycle}"]
    for candidate, score in zip(population.candidates, record.val_scores, strict=True):
        best = " (best)" if candidate.id == record.best_candidate_id else ""
        parents = f" from {', '.join(candidate.parent_ids)}" if candidate.parent_ids else ""
        parts.append(f"## {candidate.id}: score {score:.3f}{best}")
        parts.append(f"{candidate.source}, cycle {candidate.cycle}{parents}")
        for component, text in candidate.components.items():
            parts += [f"**{component}**", _code(text)]
    return "\n\n".join(parts)


def _code(text: str) -> str:
    """A Markdown code block, whatever is in the text."""
    return indent(text, "    ")
