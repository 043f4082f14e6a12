"""All that a trainer needs to go on: its tensors and a few numbers, in memory or in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fst_dspy.errors import StoreError

WEIGHTS, OPTIMIZER, RNG, TEACHER, SCALARS = (
    "weights.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "teacher.safetensors",
    "trainer.json",
)
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TrainingState:
    """The state of a trainer between two steps; tensors are on the CPU.

    Attributes:
        weights: What is trained: all weights, or adapters alone.
        optimizer: Its moments, and float32 copies of weights where there are any.
        rng: The states of random number generators, by device.
        scalars: Plain values.
        teacher: Averaged weights that teach; none where the live ones do, or nothing does.
        live: Whether tensors are the trainer's own, which its next step changes.
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    scalars: Mapping[str, Any]
    teacher: Mapping[str, Tensor] = field(default_factory=dict)
    live: bool = False

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        parts = (self.weights, self.optimizer, self.teacher)
        tensors = [tensor for part in parts for tensor in part.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def copied(self) -> TrainingState:
        """The same with tensors that no step changes."""
        if not self.live:
            return self
        weights, optimizer, teacher = (
            {name: tensor.clone() for name, tensor in tensors.items()}
            for tensors in (self.weights, self.optimizer, self.teacher)
        )
        return replace(self, weights=weights, optimizer=optimizer, teacher=teacher, live=False)

    def write(self, folder: Path) -> None:
        """Write all to an existing folder; no pickle, and no copies in memory.

        The files are not written atomically: the caller makes the folder appear at once.
        """
        parts = {WEIGHTS: self.weights, OPTIMIZER: self.optimizer, RNG: self.rng}
        if self.teacher:
            parts[TEACHER] = self.teacher
        for name, tensors in parts.items():
            whole = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            save_file(whole, folder / name)
        (folder / SCALARS).write_text(json.dumps(dict(self.scalars)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> TrainingState:
        """What ``write`` wrote.

        Raises:
            StoreError: A file is missing or unreadable, or of another version.
        """
        try:
            scalars = json.loads((folder / SCALARS).read_text(encoding="utf-8"))
            weights, optimizer, rng = (load_file(folder / n) for n in (WEIGHTS, OPTIMIZER, RNG))
            teacher = load_file(folder / TEACHER) if (folder / TEACHER).is_file() else {}
        except Exception as error:
            raise StoreError(f"cannot read the training state in {folder}: {error}") from error
        if scalars["schema_version"] != SCHEMA_VERSION:
            raise StoreError(
                f"{folder} has training state of version {scalars['schema_version']}, this package "
                f"reads {SCHEMA_VERSION}; go on with the package that wrote it"
            )
        return cls(weights, optimizer, rng, scalars, teacher)
