"""DSPy's training providers over a local policy: DSPy's ``GRPO`` and ``dspy.BootstrapFinetune``.

Every ``LocalLM`` carries a ``LocalProvider``, so that DSPy's own weight optimizers, alone or inside
``dspy.BetterTogether``, train it in this process. DSPy's ``GRPO`` hands over answers rendered again
from parsed fields, without token ids; a step on them is taken as on policy. (``fst_dspy.FST`` with
``arm="rl_only"`` trains on the sampled tokens themselves.)

Weights move on in place, but DSPy's programs name the weights they were made for: a version id in
``lm.model``. Those stay at hand for as long as a language model names them; see ``kept_weights``.
"""

from __future__ import annotations

import threading
from collections import deque
from functools import partial
from typing import Any

from dspy.clients.provider import Provider, TrainingJob
from dspy.clients.utils_finetune import TrainDataFormat, TrainingStatus

from fst_dspy.lm.kept_weights import KeptWeights
from fst_dspy.lm.reinforce import LocalReinforceJob
from fst_dspy.lm.train_input import field_names, known_settings
from fst_dspy.model.policy import Policy

REMEMBERED_JOBS = 8


class LocalProvider(Provider):
    """Trains the policy of a ``LocalLM``; one provider serves all its copies.

    Attributes:
        policy: Whose weights are trained.
        kept: The versions that training leaves behind; every job shares them.
        jobs: The latest reinforcement jobs, oldest first, with what they recorded.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.kept = KeptWeights(policy)
        self.finetunable = True
        self.reinforceable = True
        self.jobs: deque[LocalReinforceJob] = deque(maxlen=REMEMBERED_JOBS)
        self.TrainingJob = LocalTrainingJob
        self.ReinforceJob = partial(LocalReinforceJob, kept=self.kept, started=self.jobs)

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalProvider:
        return self

    def finetune(
        self,
        job: LocalTrainingJob,
        model: str,
        train_data: list[dict[str, Any]],
        train_data_format: TrainDataFormat | str | None,
        train_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Supervised fine-tuning on the last message of each conversation, which is an assistant's.

        Jobs on one policy run one after another. Calls of the model wait meanwhile.

        Args:
            job: Hears how it goes, and can be cancelled.
            model: Version id of the weights to start from.
            train_data: ``{"messages": [{"role", "content"}, ...]}`` each.
            train_data_format: ``TrainDataFormat.CHAT`` or ``None``.
            train_kwargs: Fields of ``fst_dspy.lm.sft.FinetuneConfig``; ``lora=True`` for adapters.

        Returns:
            Version id of the new weights, which are live and kept.

        Raises:
            ConfigError: An unknown or bad setting.
            DataError: No data, or data of another form.
            ModelError: The weights to start from are not at hand.
            TrainingError: The loss or the weights became non-finite, or the job was cancelled; the
                live weights are then those it started from.
        """
        # Training libraries take seconds to import, which a program that only calls should not pay.
        from fst_dspy.lm.sft import FinetuneConfig, fine_tune, read_conversations

        try:
            settings = known_settings(train_kwargs or {}, field_names(FinetuneConfig))
            config = FinetuneConfig(**settings)
            conversations = read_conversations(train_data, train_data_format)
            with self.policy.lock:
                job.state = TrainingStatus.running
                self.kept.start(model, config.lora, config.seed)
                self.kept.keep_if_named()
                try:
                    fine_tune(self.policy, conversations, config, job.cancelled_by_user.is_set)
                except BaseException:
                    self.policy.restore(model)
                    raise
                version = self.kept.keep(job)
        except BaseException:
            cancelled = job.cancelled_by_user.is_set()
            job.state = TrainingStatus.cancelled if cancelled else TrainingStatus.failed
            raise
        job.state = TrainingStatus.succeeded
        return version


class LocalTrainingJob(TrainingJob):
    """A fine-tuning job: a future of the ``LocalLM`` with the new weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state = TrainingStatus.pending
        self.cancelled_by_user = threading.Event()

    def status(self) -> TrainingStatus:
        """How it stands: pending, running, succeeded, failed or cancelled."""
        return self.state

    def cancel(self) -> bool:
        """Stop after the optimizer step under way; ``result()`` is then a ``TrainingError``.

        Returns:
            Whether there was anything left to stop.
        """
        if self.done():
            return False
        self.cancelled_by_user.set()
        return True
