"""The versions of a policy's weights that training leaves behind, kept for whoever names them.

A version stays at hand for as long as a language model names it: before the live weights move they
are kept if one does, and what none names any more is forgotten when a job starts or ends.
"""

from __future__ import annotations

from typing import Protocol

from fst_dspy.config import LoraConfig
from fst_dspy.errors import ConfigError
from fst_dspy.lm.in_use import versions_in_use
from fst_dspy.model.policy import Policy


class Job(Protocol):
    """What kept weights may be waiting for: a job that hands them over, such as a future."""

    def done(self) -> bool: ...


class KeptWeights:
    """Which weights of a policy are live for training, and which are kept meanwhile.

    Attributes:
        policy: Whose weights they are.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._left_behind: dict[str, Job | None] = {}

    def start(self, version: str, lora: LoraConfig | None, seed: int) -> None:
        """Make a version live to train it, with adapters where wanted; hold ``policy.lock``.

        Without ``lora``, what the weights have is trained: adapters, or else all of them.

        Raises:
            ConfigError: They have adapters of other settings, or are quantized and have none.
            ModelError: The version is not at hand, or adapters are wanted on weights that are not
                the base.
        """
        self.prune()
        if self.policy.version() != self.policy.base_version:
            self.keep_if_named()
        self.policy.restore(version)
        refuse_quantized(self.policy, lora or self.policy.lora)
        if lora is None or lora == self.policy.lora:
            return
        if self.policy.lora is not None:
            raise ConfigError(
                f"{version} has adapters with {self.policy.lora}; leave lora out to train them on, "
                f"or start from {self.policy.base_version} for {lora}"
            )
        self.policy.add_lora(lora, seed)

    def keep_if_named(self, besides: object = None) -> None:
        """Keep the live weights, which are about to move on, if a language model names them.

        Args:
            besides: A language model that will name the new ones, and so does not count.
        """
        if self.policy.version() in versions_in_use(self.policy, besides=besides):
            self.keep()

    def keep(self, job: Job | None = None) -> str:
        """Keep the live weights until none names them, and the job, if any, is done.

        Returns:
            Their version id.
        """
        version = self.policy.keep()
        self._left_behind[version] = job
        return version

    def prune(self) -> None:
        """Forget the versions kept here that no language model names."""
        used = versions_in_use(self.policy)
        for version, job in list(self._left_behind.items()):
            if version not in used and (job is None or job.done()):
                del self._left_behind[version]
                self.policy.forget(version)


def refuse_quantized(policy: Policy, lora: LoraConfig | None) -> None:
    """Raise ``ConfigError`` where a quantized model's own weights would be trained."""
    if lora is None and getattr(policy.model, "is_quantized", False):
        raise ConfigError(
            f"{policy.name} is quantized: its weights are too coarse for an optimizer step; train "
            "adapters over them (lora=True), or load the model unquantized"
        )
