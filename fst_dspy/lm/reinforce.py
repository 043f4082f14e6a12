"""The reinforcement job of the local provider: GRPO on groups that come as text.

DSPy's ``GRPO`` hands over answers rendered again from parsed fields, without the sampled tokens and
their log-probabilities. So a step is taken as on policy: the answers are tokenised anew, and the
importance ratio is 1. Groups, advantages and the step itself are those of the slow channel.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.clients.provider import ReinforceJob
from dspy.clients.utils_finetune import GRPOStatus, TrainDataFormat, TrainingStatus

from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.errors import ConfigError, DataError, TrainingError
from fst_dspy.lm.kept_weights import KeptWeights
from fst_dspy.lm.requests import penalty_in
from fst_dspy.lm.train_input import (
    check_format,
    check_message,
    check_messages,
    check_reward,
    encode_turn,
    field_names,
    known_settings,
)
from fst_dspy.model.policy import Policy
from fst_dspy.slow.advantage import constant_group_share, group_rows
from fst_dspy.types import Call, Group, Rollout, StepRecord

logger = logging.getLogger(__name__)

PENDING_BATCHES = 64
"""Groups asked for at a time. DSPy's ``GRPO`` fills every place, repeating the groups of a step as
often as it takes, and leaves the rest of the last repetition to the next step. With at least twice
as many places as groups, every step brings each new group at least once; what it brings twice, or
from the step before, is left out."""

_batch_ids = itertools.count()  # of all jobs: DSPy's GRPO never forgets the ids it has fulfilled
_job_ids = itertools.count(1)


class LocalReinforceJob(ReinforceJob):
    """GRPO on the groups it is given, one optimizer step for each call of ``step``.

    Args:
        lm: The ``LocalLM`` to train.
        train_kwargs: See ``reinforce_settings``.
        kept: The weights of its policy, and the versions kept of them.
        started: Where the job enters itself once it runs.

    Attributes:
        lm: The language model that is trained; its ``model`` names the weights of the latest step.
        records: One record a step.
        checkpoints: Version ids by the name they were saved under.
        pending_batch_ids: Ids of the groups it asks for; no two jobs of a process share one.
    """

    lm: dspy.LM

    def __init__(
        self,
        lm: dspy.LM,
        train_kwargs: dict[str, Any] | None = None,
        *,
        kept: KeptWeights,
        started: MutableSequence[LocalReinforceJob],
    ) -> None:
        super().__init__(lm, train_kwargs)
        self.job_id = f"reinforce-{next(_job_ids)}"
        self.state = TrainingStatus.not_started
        self.records: list[StepRecord] = []
        self.pending_batch_ids: list[int] = []
        self._kept, self._policy = kept, kept.policy
        self._started = started
        self._trainer: Any = None
        self._temperature = 1.0
        self._version = ""
        self._before: list[Any] = []

    def initialize(self) -> None:
        """Make the weights of ``lm`` live, with optimizer and schedule.

        Raises:
            ConfigError: An unknown or bad setting in ``train_kwargs``; see ``reinforce_settings``.
            ModelError: As ``KeptWeights.start``.
        """
        from fst_dspy.slow.trainer import SlowTrainer

        slow, sampling, total_steps, seed = reinforce_settings(self.lm, self.train_kwargs)
        self._temperature = sampling.temperature
        with self._policy.lock:
            self._kept.start(self.lm.model, slow.adapters, seed)
            self._trainer = SlowTrainer(self._policy, slow, sampling, total_steps, seed)
            self._version = self._policy.version()
        self._ask_for_groups()
        self._started.append(self)
        self.state = TrainingStatus.running

    def step(
        self,
        train_data: list[dict[str, Any]],
        train_data_format: TrainDataFormat | str | None = None,
    ) -> None:
        """Take one optimizer step, and bind ``lm`` to the weights it gives.

        A group that is there twice, or was there in the step before along with new ones now, is
        taken once. When all rewards of every group are equal no step is taken.

        Args:
            train_data: ``{"batch_id": int, "group": [{"messages", "completion", "reward"}, ...]}``
                each.
            train_data_format: ``TrainDataFormat.GRPO_CHAT`` or ``None``.

        Raises:
            DataError: No data, or data of another form.
            TrainingError: The job is not running, others have moved the weights meanwhile, or
                ``max_bad_steps`` steps in a row had a loss or gradient that is not finite; such
                steps are dropped.
        """
        if self._trainer is None:
            raise TrainingError(f"{self.job_id} is {self.state.value}; start another job")
        groups = read_groups(train_data, train_data_format)
        fresh = self._fresh([item["group"] for item in train_data], groups)
        with self._policy.lock:
            if self._policy.version() != self._version:
                raise TrainingError(
                    f"{self.job_id} left the weights at {self._version}, but "
                    f"{self._policy.version()} are live; run one training at a time on a model"
                )
            options = self.lm.kwargs.get("chat_template_kwargs")
            groups_P = [
                encode_group(self._policy, group, self._temperature, options) for group in fresh
            ]
            rows = group_rows(groups_P, self._trainer.slow.scale_rewards)
            if not rows:
                raise DataError(
                    f"no prompt leaves room for an answer in {self._policy.context_length} tokens"
                )
            self._kept.keep_if_named(besides=self.lm)
            stats = self._trainer.advance(rows)
            self._version = self.lm.model = self._policy.version()
        rewards = [rollout.reward for group in groups_P for rollout in group.rollouts_G]
        record = StepRecord(
            cycle=0,
            step=len(self.records) + 1,
            reward=sum(rewards) / len(rewards),
            constant_group_share=constant_group_share(groups_P),
            failures={},
            rollouts=len(rewards),
            stats=stats,
        )
        self.records.append(record)
        filled = {item.get("batch_id") for item in train_data}
        self.pending_batch_ids = [i for i in self.pending_batch_ids if i not in filled]
        self._ask_for_groups()
        self._stop_if_diverged()

    def get_status(self) -> GRPOStatus:
        """What DSPy's ``GRPO`` asks before every step."""
        return GRPOStatus(
            job_id=self.job_id,
            status=self.state.value,
            current_model=self.lm.model,
            checkpoints=dict(self.checkpoints),
            last_checkpoint=self.last_checkpoint,
            pending_batch_ids=list(self.pending_batch_ids),
        )

    def status(self) -> TrainingStatus:
        """How it stands: not started, running, succeeded or cancelled."""
        return self.state

    def save_checkpoint(self, checkpoint_name: str) -> None:
        """Keep the weights for good: ``lm.at(job.checkpoints[checkpoint_name])`` answers with them.

        Raises:
            TrainingError: The job is not running, so the live weights may be another's.
        """
        if self._trainer is None:
            raise TrainingError(f"{self.job_id} is {self.state.value}; there is nothing to save")
        self.checkpoints[checkpoint_name] = self._policy.keep()
        self.last_checkpoint = checkpoint_name

    def terminate(self) -> None:
        """End the job: the last weights are kept, the optimizer is let go. Idempotent."""
        self._end(TrainingStatus.succeeded)

    def cancel(self) -> None:
        """End the job where it stands; as ``terminate``, but for the status."""
        self._end(TrainingStatus.cancelled)

    def _end(self, state: TrainingStatus) -> None:
        if self._trainer is None:
            return
        self._trainer, self._before, self.pending_batch_ids = None, [], []
        self.state = state
        with self._policy.lock:
            if self._policy.version() == self._version:
                self._kept.keep_if_named()
            self._kept.prune()

    def _stop_if_diverged(self) -> None:
        limit = self._trainer.slow.max_bad_steps
        bad = [record.stats.skipped == "non_finite" for record in self.records[-limit:]]
        if bad[-1]:
            logger.warning("%s: loss or gradient not finite, step dropped", self.job_id)
        if len(bad) == limit and all(bad):
            raise TrainingError(
                f"loss or gradient was not finite for {limit} steps in a row; {self.lm.model} are "
                "the last good weights; lower learning_rate"
            )

    def _ask_for_groups(self) -> None:
        missing = PENDING_BATCHES - len(self.pending_batch_ids)
        self.pending_batch_ids += itertools.islice(_batch_ids, missing)

    def _fresh(self, given: Sequence[Any], groups: Sequence[GroupData]) -> list[GroupData]:
        once = {id(group): data for group, data in zip(given, groups, strict=True)}
        before = {id(group) for group in self._before}
        self._before = list(given)  # held, so that no new group can have the id of one of these
        fresh = [data for key, data in once.items() if key not in before]
        return fresh or list(once.values())


@dataclass(frozen=True)
class AnswerData:
    """One answer of a group, as text: its prompt, its own text and its reward."""

    messages: list[dict[str, str]]
    text: str
    reward: float


GroupData = list[AnswerData]


def read_groups(train_data: Any, train_data_format: Any) -> list[GroupData]:
    """The groups that DSPy's ``GRPO`` hands to a step, checked.

    Raises:
        DataError: No data, another format, or a group, message or reward that is none.
    """
    check_format(train_data, train_data_format, TrainDataFormat.GRPO_CHAT)
    groups = []
    for number, item in enumerate(train_data):
        where = f"train_data[{number}]['group']"
        members = item.get("group") if isinstance(item, Mapping) else None
        if not isinstance(members, list) or not members:
            raise DataError(
                f"train_data[{number}] must be a dict with a batch_id and a non-empty group, "
                f"got {item!r:.80}"
            )
        groups.append([_read_answer(f"{where}[{n}]", answer) for n, answer in enumerate(members)])
    return groups


def _read_answer(where: str, answer: Any) -> AnswerData:
    if not isinstance(answer, Mapping):
        raise DataError(f"{where} must be a dict, got {answer!r:.80}")
    return AnswerData(
        messages=check_messages(f"{where}['messages']", answer.get("messages")),
        text=check_message(f"{where}['completion']", answer.get("completion"))["content"],
        reward=check_reward(f"{where}['reward']", answer.get("reward")),
    )


def encode_group(
    policy: Policy,
    group: GroupData,
    temperature: float = 1.0,
    options: Mapping[str, Any] | None = None,
) -> Group:
    """A group in tokens; an answer whose prompt fills the context window has no call.

    Args:
        temperature: That the answers were sampled at.
        options: Variables of the chat template.
    """
    rollouts = []
    for answer in group:
        turn = encode_turn(policy, answer.messages, answer.text, policy.context_length, options)
        call = turn and Call(
            predictor="",
            prompt_ids_T=turn.prompt_ids_T,
            completion_ids_T=turn.completion_ids_T,
            logprobs_T=(),  # unknown: the sampled tokens are gone; an on-policy step needs none
            text=answer.text,
            finish_reason="stop",
            temperature=temperature,
        )
        rollouts.append(
            Rollout(
                example_id="",
                candidate_id="",
                calls=(call,) if call else (),
                traces=(),
                reward=answer.reward,
                feedback="",
                failure=None,
                policy_version=policy.step,
            )
        )
    return Group("", tuple(rollouts))


OWN_KWARGS = ("num_generations", "max_steps", "seed", "temperature")
LOOP_FIELDS = (
    "steps_per_cycle",
    "group_size",
    "problems_per_step",
    "revisit_constant",
)
"""Fields of ``SlowConfig`` that DSPy's ``GRPO`` decides."""


def reinforce_settings(
    lm: dspy.LM, train_kwargs: Mapping[str, Any]
) -> tuple[SlowConfig, SamplingConfig, int, int]:
    """Settings of a reinforcement job from the ``train_kwargs`` of DSPy's ``GRPO``.

    Args:
        lm: Whose temperature the rollouts are sampled at.
        train_kwargs: Fields of ``SlowConfig`` such as ``learning_rate``, ``loss_type``, ``beta``
            and ``lora`` (``True``, a dict or a ``LoraConfig``), and ``seed`` of dropout and
            adapters; ``max_steps``, which a learning rate schedule that decays spans;
            ``num_generations``, which DSPy's ``GRPO`` sets; ``temperature``, if only to be checked.

    Returns:
        Settings of the trainer and of sampling, ``max_steps`` and the seed.

    Raises:
        ConfigError: An unknown name, a bad value, a temperature not the LM's, a penalty, or a
            schedule that decays without ``max_steps``.
    """
    fields = field_names(SlowConfig)
    names = [*(f for f in fields if f not in LOOP_FIELDS), *OWN_KWARGS]
    settings = known_settings(train_kwargs, names)
    own = {name: settings.pop(name) for name in OWN_KWARGS if name in settings}
    sampled_at = 1.0 if lm.kwargs.get("temperature") is None else lm.kwargs["temperature"]
    if own.get("temperature", sampled_at) != sampled_at:
        raise ConfigError(
            f"temperature={own['temperature']} in train_kwargs, but the rollouts are sampled at "
            f"the LM's {sampled_at}; make it LocalLM(..., temperature={own['temperature']})"
        )
    if penalty := penalty_in(lm.kwargs):
        raise ConfigError(
            f"the LM samples with {penalty}={lm.kwargs[penalty]}, and what is sampled so cannot be "
            "trained on: leave it out"
        )
    if own.get("num_generations", 2) < 2:
        raise ConfigError(
            "a group of one rollout has no advantage; set num_rollouts_per_grpo_step to 2 or more "
            "on DSPy's GRPO"
        )
    try:
        slow = SlowConfig(**settings)
        sampling = SamplingConfig(temperature=sampled_at, max_tokens=lm.kwargs.get("max_tokens"))
    except TypeError as error:
        raise ConfigError(f"a setting in train_kwargs has the wrong type: {error}") from error
    if "max_steps" not in own and not slow.lr_scheduler_type.startswith("constant"):
        raise ConfigError(
            f"lr_scheduler_type={slow.lr_scheduler_type!r} needs max_steps in train_kwargs, over "
            "which it decays: the num_train_steps of DSPy's GRPO"
        )
    return slow, sampling, own.get("max_steps", 1), own.get("seed", 0)
