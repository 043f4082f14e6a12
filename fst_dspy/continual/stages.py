"""The stages of a stream of tasks: what each left behind, and its way to and from files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fst_dspy.config import LoraConfig
from fst_dspy.errors import StoreError
from fst_dspy.model.policy import Policy
from fst_dspy.results.result import FSTResult, result_from_json
from fst_dspy.student.candidate import make_candidate
from fst_dspy.types import Candidate


@dataclass(frozen=True)
class TaskStage:
    """One task learned, for the first time or again.

    Attributes:
        task: The task's name.
        started_from: The task whose population it began with; ``None`` for the program's own
            prompt.
        lora: Settings of the adapters that the weights have after it, or ``None``.
        result: What the compile did and found; its counts include the search for a population to
            begin with.
    """

    task: str
    started_from: str | None
    lora: LoraConfig | None
    result: FSTResult

    @property
    def version(self) -> str:
        """Version id of the shared weights after the stage."""
        return self.result.best.version

    @property
    def candidate(self) -> Candidate:
        """The task's best candidate."""
        return self.result.best.candidate

    def candidates(self, count: int) -> tuple[Candidate, ...]:
        """At most ``count`` of its population, the best first, as given to another run."""
        found = {c.id: c for c in (self.candidate, *self.result.population.candidates)}
        # Parents and cycles of birth belong to the run that found them.
        return tuple(make_candidate(c.components) for c in list(found.values())[:count])


def keep_version(
    policy: Policy, version: str, lora: LoraConfig | None, state: Mapping[str, Tensor]
) -> None:
    """Keep weights that were read from a file under their version id; the live ones stay.

    Args:
        policy: Of the model that they belong to.
        version: The id they must have.
        lora: Their adapters' settings, or ``None``.
        state: As from ``Policy.trainable_state``.

    Raises:
        StoreError: They are other weights than the id says.
        ModelError: They are of another model.
    """
    with policy.lock:
        live = policy.keep()
        try:
            policy.restore(policy.base_version)
            if lora is not None:
                policy.add_lora(lora, seed=0)
            policy.load_trainable_state(state)
            if policy.version() != version:
                raise StoreError(f"the weights come out as {policy.version()}, not as {version}")
            policy.keep()
        finally:
            policy.restore(live)


def read_version(policy: Policy, stage: TaskStage) -> bool:
    """Have a stage's weights at hand, from its run folder if need be; whether they are."""
    if policy.has(stage.version):
        return True
    if stage.result.log_dir is None:
        return False
    name = f"{stage.version.rsplit('@', 1)[-1]}.safetensors"
    path = Path(stage.result.log_dir) / "versions" / name
    if not path.is_file():
        return False
    keep_version(policy, stage.version, stage.lora, load_file(path))
    return True


def stage_to_json(stage: TaskStage) -> dict[str, Any]:
    """A stage as plain values. A run folder is not named: it stays behind."""
    return {**asdict(stage), "result": {**stage.result.to_dict(), "log_dir": None}}


def stage_from_json(plain: Mapping[str, Any]) -> TaskStage:
    """The inverse of ``stage_to_json``.

    Raises:
        ConfigError: A candidate does not match its id, or a setting is unknown.
    """
    return TaskStage(
        task=plain["task"],
        started_from=plain["started_from"],
        lora=LoraConfig(**plain["lora"]) if plain["lora"] else None,
        result=result_from_json(plain["result"]),
    )
