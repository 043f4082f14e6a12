"""Trackers: a run in TensorBoard, Weights & Biases or MLflow, by way of accelerate's trackers.

``FST(metric, report_to="tensorboard", log_dir="runs/mine")``, or a list of names. Every optimizer
step, every cycle and every cycle's prompts are logged, on one axis for both channels: **the
rollouts run so far, of all channels**. It is what the budget is counted in, the fast channel moves
along it where no optimizer step is taken, and so runs of all arms can be laid over one another; the
optimizer step would leave ``gepa_only`` on a single point. The optimizer step and the cycle are
logged as figures, for those who would rather plot against them.

Nothing leaves the machine unless the user says so. All is written to the run folder:

* ``tensorboard/``: ``tensorboard --logdir runs`` shows every run under ``runs``;
* ``wandb/``: offline, for ``wandb sync``; ``WANDB_MODE=online`` sends it at once;
* ``mlflow/mlflow.db``, with the prompts as artifacts beside it; ``MLFLOW_TRACKING_URI``, or
  ``mlflow.set_tracking_uri`` before the compile, sends it elsewhere.

``trackers.json`` holds what was logged last. A resumed run goes on in the same tracker's run; the
steps that it takes again since its last checkpoint are not logged again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from accelerate import PartialState

from fst_dspy.errors import ConfigError, FSTError, StoreError
from fst_dspy.files import read_json
from fst_dspy.run.store import RunStore
from fst_dspy.run.tracker_kinds import INSTALLED, KINDS, Logged, Tracker
from fst_dspy.types import CycleRecord, Population, StepRecord

STATE = "trackers.json"


def tracker_names(report_to: str | Sequence[str] | None, log_dir: Path | None) -> tuple[str, ...]:
    """The trackers that ``report_to`` asks for, each once.

    Raises:
        ConfigError: One that is unknown or not installed, or there is no run folder.
    """
    names = (report_to,) if isinstance(report_to, str) else tuple(dict.fromkeys(report_to or ()))
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"report_to takes {', '.join(KINDS)}, not {name!r}")
        if not INSTALLED[name]():
            raise ConfigError(f"report_to={name!r} needs a package: pip install 'fst-dspy[{name}]'")
    if names and log_dir is None:
        raise ConfigError("report_to writes to the run folder: set log_dir (fst compile --out)")
    return names


class Trackers:
    """The trackers of one run: a context, which ends them; does nothing where there are none."""

    def __init__(
        self, names: Sequence[str], store: RunStore | None, settings: Mapping[str, Any]
    ) -> None:
        """Read what was logged before.

        Args:
            names: As ``tracker_names`` gives them.
            store: The run folder, which holds the trackers' files.
            settings: Logged with a new run; nested plain values.
        """
        self._store, self._settings = store, settings
        state = store.folder / STATE if store is not None and names else None
        before = read_json(state) if state is not None and state.exists() else {}
        self._logged = {name: Logged(**before.get(name, {})) for name in names}
        self._open: dict[str, Tracker] = {}

    def __enter__(self) -> Trackers:
        """Start the trackers of a new run; a resumed one's wait until there is news.

        Raises:
            StoreError: A tracker does not start, as where it is told to go online and cannot.
        """
        try:
            for name, logged in self._logged.items():
                if logged.run_id is None:
                    self._tracker(name)
        except BaseException:
            self._close(failed=True)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(failed=kind is not None)

    def step(self, record: StepRecord, rollouts: int) -> None:
        """Log an optimizer step.

        Args:
            record: Of the step.
            rollouts: Run by the end of it, from the start of the run, over all channels.

        Raises:
            StoreError: A tracker fails.
        """
        for name in self._behind("step", record.step):
            with _clear_errors(name):
                self._tracker(name).log(step_values(record), step=rollouts)
            self._note(name, step=record.step, rollouts=rollouts)

    def cycle(self, record: CycleRecord, population: Population) -> None:
        """Log a cycle and the prompts it ended with.

        Raises:
            StoreError: A tracker fails.
        """
        rollouts = record.total_rollouts.total
        for name in self._behind("cycle", record.cycle):
            with _clear_errors(name):
                tracker = self._tracker(name)
                tracker.log_prompts(record, population)
                tracker.log(cycle_values(record), step=rollouts)
            self._note(name, cycle=record.cycle, rollouts=rollouts)

    def _close(self, *, failed: bool) -> None:
        while self._open:
            name, tracker = self._open.popitem()
            with _clear_errors(name):
                tracker.close(failed=failed)

    def _behind(self, what: Literal["step", "cycle"], number: int) -> list[str]:
        return [name for name, logged in self._logged.items() if getattr(logged, what) < number]

    def _tracker(self, name: str) -> Tracker:
        if name not in self._open:
            assert self._store is not None
            PartialState()  # accelerate's trackers do not log without it
            logged = self._logged[name]
            with _clear_errors(name):
                tracker = KINDS[name](self._store.folder.resolve(), logged)
                tracker.start()
                self._open[name] = tracker
                if logged.run_id is None:
                    tracker.store_init_configuration(_flat(self._settings))
                    self._note(name, run_id=tracker.id)
        return self._open[name]

    def _note(self, name: str, **news: Any) -> None:
        assert self._store is not None
        self._logged[name] = replace(self._logged[name], **news)
        self._store.write_json(STATE, {key: asdict(value) for key, value in self._logged.items()})


def step_values(record: StepRecord) -> dict[str, float]:
    """The figures of an optimizer step; one that was skipped has no loss, gradient or clip share.

    Entropy in nats a token, shares from 0 to 1, the rest as in ``StepRecord`` and ``StepStats``.
    """
    stats = record.stats
    values = {
        "progress/cycle": record.cycle,
        "progress/optimizer_step": record.step,
        "slow/reward": record.reward,
        "slow/constant_group_share": record.constant_group_share,
        "slow/failure_share": sum(record.failures.values()) / max(1, record.rollouts),
        "slow/learning_rate": stats.learning_rate,
        "slow/rows": stats.rows,
        "slow/skipped": int(stats.skipped is not None),
    }
    if stats.skipped is None:
        names = ("loss", "grad_norm", "entropy", "clip_share")
        values |= {f"slow/{name}": getattr(stats, name) for name in names}
    return values


def cycle_values(record: CycleRecord) -> dict[str, float]:
    """The figures of a cycle, as in ``CycleRecord``.

    Rollouts, tokens, seconds and proposals are counted from the start of the run. What only slow
    rollouts can tell is left out where there were none.
    """
    values: dict[str, Any] = {
        "progress/cycle": record.cycle,
        "progress/optimizer_step": record.step,
        "cycle/val_score": record.val_score,
        "cycle/kl_to_base": record.kl_to_base,
        "cycle/candidates": len(record.candidate_ids),
        "rollouts": {**asdict(record.total_rollouts), "total": record.total_rollouts.total},
        "seconds": record.seconds,
        "tokens": record.tokens,
        "proposals": record.proposals,
        "cycle/failure_share": sum(record.failure_shares.values()),
        "failures": record.failure_shares,
    }
    if record.train_reward is not None:
        values |= {
            "cycle/train_reward": record.train_reward,
            "cycle/entropy": record.entropy,
            "cycle/constant_group_share": record.constant_group_share,
        }
    return {name: value for name, value in _flat(values).items() if isinstance(value, int | float)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as ``"outer/inner"``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    try:
        yield
    except FSTError:
        raise
    except Exception as error:
        raise StoreError(
            f"{name} failed: {type(error).__name__}: {error}. The run folder stands as it is; "
            f"start the run again to go on, or leave {name} out of report_to"
        ) from error
