"""DSPy's training providers over a local policy: ``dspy.GRPO`` and ``dspy.BootstrapFinetune``.

Every ``LocalLM`` carries a ``LocalProvider``, so that DSPy's own weight optimizers, alone or inside
``dspy.BetterTogether``, train it in this process. ``dspy.GRPO`` hands over answers rendered again
from parsed fields, without token ids; a step on them is taken as on policy. (``fst_dspy.FST`` with
``arm="rl_only"`` trains on the sampled tokens themselves.)

Weights move on in place, but DSPy's programs name the weights they were made for: a version id in
``lm.model``. A version stays at hand for as long as a ``LocalLM`` names it; before the live weights
move, they are kept if one does, and what none names any more is forgotten when a job starts or ends.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dspy.clients.provider import Provider, ReinforceJob, TrainingJob
from dspy.clients.utils_finetune import GRPOStatus, TrainDataFormat, TrainingStatus

from fst_dspy.advantage import constant_group_share, group_rows
from fst_dspy.config import LoraConfig, SamplingConfig, SlowConfig, as_lora
from fst_dspy.errors import ConfigError, DataError, TrainingError
from fst_dspy.local_lm import LocalLM, versions_in_use
from fst_dspy.policy import Policy
from fst_dspy.turns import check_message, check_messages, check_reward, encode_turn
from fst_dspy.types import Call, Group, Rollout, StepRecord

logger = logging.getLogger(__name__)

PENDING_BATCHES = 64
"""Groups asked for at a time. ``dspy.GRPO`` fills every place, repeating the groups of a step as
often as it takes, and leaves the rest of the last repetition to the next step. With at least twice
as many places as groups, every step brings each new group at least once; what it brings twice, or
from the step before, is left out."""
REMEMBERED_JOBS = 8

_batch_ids = itertools.count()  # of all jobs: dspy.GRPO never forgets the ids it has fulfilled
_job_ids = itertools.count(1)


class LocalProvider(Provider):
    """Trains the policy of a ``LocalLM``; one provider serves all its copies.

    Attributes:
        policy: Whose weights are trained.
        jobs: The latest reinforcement jobs, oldest first, with what they recorded.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.finetunable = True
        self.reinforceable = True
        self.TrainingJob = LocalTrainingJob
        self.ReinforceJob = LocalReinforceJob
        self.jobs: deque[LocalReinforceJob] = deque(maxlen=REMEMBERED_JOBS)
        self._left_behind: dict[str, TrainingJob | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalProvider:
        return self

    def finetune(  # type: ignore[override]
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
            train_kwargs: Fields of ``fst_dspy.sft.FinetuneConfig``; ``lora=True`` for adapters.

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
        from fst_dspy.sft import FinetuneConfig, fine_tune, read_conversations

        try:
            config = FinetuneConfig(**known(train_kwargs or {}, field_names(FinetuneConfig)))
            conversations = read_conversations(train_data, train_data_format)
            with self.policy.lock:
                job.state = TrainingStatus.running
                self.start(model, config.lora, config.seed)
                try:
                    fine_tune(self.policy, conversations, config, job.cancelled_by_user.is_set)
                except BaseException:
                    self.policy.restore(model)
                    raise
                version = self.keep(job)
        except BaseException:
            cancelled = job.cancelled_by_user.is_set()
            job.state = TrainingStatus.cancelled if cancelled else TrainingStatus.failed
            raise
        job.state = TrainingStatus.succeeded
        return version

    def start(self, version: str, lora: LoraConfig | None, seed: int) -> None:
        """Make a version live to train it, with adapters where wanted; hold ``policy.lock``.

        Without ``lora``, what the weights have is trained: adapters, or else all of them.

        Raises:
            ConfigError: The weights have adapters of other settings.
            ModelError: The version is not at hand, or adapters are wanted on weights that are not
                the base.
        """
        self.prune()
        self.keep_if_named()
        self.policy.restore(version)
        if lora is None or lora == self.policy.lora:
            return
        if self.policy.lora is not None:
            raise ConfigError(
                f"{version} has adapters with {self.policy.lora}; leave lora out to train them on, "
                f"or start from {self.policy.base_version} for {lora}"
            )
        self.policy.add_lora(lora, seed)

    def keep_if_named(self, besides: LocalLM | None = None) -> None:
        """Keep the live weights, which are about to move on, if a ``LocalLM`` names them."""
        version = self.policy.version()
        if version != self.policy.base_version and version in versions_in_use(
            self.policy, besides=besides
        ):
            self.keep()

    def keep(self, job: TrainingJob | None = None) -> str:
        """Keep the live weights until no ``LocalLM`` names them; of a job, not before it is done."""
        version = self.policy.keep()
        self._left_behind[version] = job
        return version

    def prune(self) -> None:
        """Forget the versions kept here that no ``LocalLM`` names."""
        used = versions_in_use(self.policy)
        for version, job in list(self._left_behind.items()):
            if version not in used and (job is None or job.done()):
                del self._left_behind[version]
                self.policy.forget(version)


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


class LocalReinforceJob(ReinforceJob):
    """GRPO on the groups it is given, one optimizer step for each call of ``step``.

    Attributes:
        lm: The language model that is trained; its ``model`` names the weights of the latest step.
        records: One record a step.
        checkpoints: Version ids by the name they were saved under.
        pending_batch_ids: Ids of the groups it asks for; no two jobs of a process share one.
    """

    lm: LocalLM

    def __init__(self, lm: LocalLM, train_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(lm, train_kwargs)
        self.job_id = f"reinforce-{next(_job_ids)}"
        self.state = TrainingStatus.not_started
        self.records: list[StepRecord] = []
        self.pending_batch_ids: list[int] = []
        self._provider: LocalProvider = lm.provider
        self._policy = lm.policy
        self._trainer: Any = None
        self._version = ""
        self._before: list[Any] = []

    def initialize(self) -> None:
        """Make the weights of ``lm`` live, with optimizer and schedule.

        Raises:
            ConfigError: An unknown or bad setting in ``train_kwargs``; see ``reinforce_settings``.
            ModelError: As ``LocalProvider.start``.
        """
        from fst_dspy.slow import SlowTrainer

        slow, sampling, total_steps, seed = reinforce_settings(self.lm, self.train_kwargs)
        with self._policy.lock:
            self._provider.start(self.lm.version, slow.lora, seed)
            self._trainer = SlowTrainer(self._policy, slow, sampling, total_steps, seed)
            self._version = self._policy.version()
        self._ask_for_groups()
        self._provider.jobs.append(self)
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
            TrainingError: The job is not running, or others have moved the weights meanwhile.
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
            groups_P = [encode_group(self._policy, group) for group in fresh]
            rows = group_rows(groups_P, self._trainer.slow.scale_rewards)
            if not rows:
                raise DataError(
                    f"no prompt leaves room for an answer in {self._policy.context_length} tokens"
                )
            self._provider.keep_if_named(besides=self.lm)
            stats = self._trainer.advance(rows, on_policy=True)
            self._version = self.lm.model = self._policy.version()
        if stats.skipped == "non_finite":
            logger.warning("%s: loss or gradient not finite, step dropped", self.job_id)
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

    def get_status(self) -> GRPOStatus:
        """What ``dspy.GRPO`` asks before every step."""
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
                self._provider.keep_if_named()
            self._provider.prune()

    def _ask_for_groups(self) -> None:
        missing = PENDING_BATCHES - len(self.pending_batch_ids)
        self.pending_batch_ids += itertools.islice(_batch_ids, missing)

    def _fresh(self, given: Sequence[Any], groups: Sequence[GroupData]) -> list[GroupData]:
        once = {id(group): data for group, data in zip(given, groups, strict=True)}
        before = {id(group) for group in self._before}
        self._before = list(given)  # held, so that no new group can have the id of one of these
        fresh = [data for key, data in once.items() if key not in before]
        return fresh or list(once.values())


@dataclasses.dataclass(frozen=True)
class AnswerData:
    """One answer of a group, as text: its prompt, its own text and its reward."""

    messages: list[dict[str, str]]
    text: str
    reward: float


GroupData = list[AnswerData]


def read_groups(train_data: Any, train_data_format: Any) -> list[GroupData]:
    """The groups that ``dspy.GRPO`` hands to a step, checked.

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


def check_format(train_data: Any, given: Any, wanted: TrainDataFormat) -> None:
    """Raise ``DataError`` where there is no data, or data said to be of another format."""
    if given is not None and given != wanted:
        raise DataError(
            f"train data of format {getattr(given, 'value', given)!r} cannot be used here; "
            f"give {wanted.value!r}"
        )
    if not isinstance(train_data, list) or not train_data:
        raise DataError(
            f"train_data must be a non-empty list, got {train_data!r:.80}; with nothing to learn "
            "from, look at the metric and the adapter"
        )


def encode_group(policy: Policy, group: GroupData) -> Group:
    """A group in tokens; an answer whose prompt fills the context window has no call."""
    rollouts = []
    for answer in group:
        turn = encode_turn(policy, answer.messages, answer.text, policy.context_length)
        call = turn and Call(
            predictor="",
            prompt_ids_T=turn.prompt_ids_T,
            completion_ids_T=turn.completion_ids_T,
            logprobs_T=(),  # unknown: the sampled tokens are gone; an on-policy step needs none
            text=answer.text,
            finish_reason="stop",
            temperature=1.0,
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
LOOP_FIELDS = ("steps_per_cycle", "group_size", "problems_per_step")
"""Fields of ``SlowConfig`` that ``dspy.GRPO`` decides."""


def reinforce_settings(
    lm: LocalLM, train_kwargs: Mapping[str, Any]
) -> tuple[SlowConfig, SamplingConfig, int, int]:
    """Settings of a reinforcement job from ``dspy.GRPO``'s ``train_kwargs``.

    Args:
        lm: Whose temperature the rollouts are sampled at.
        train_kwargs: Fields of ``SlowConfig`` such as ``learning_rate``, ``loss_type``, ``beta``
            and ``lora`` (``True``, a dict or a ``LoraConfig``), and ``seed`` of dropout and
            adapters; ``max_steps``, which a learning rate schedule that decays spans;
            ``num_generations``, which ``dspy.GRPO`` sets; ``temperature``, if only to be checked.

    Returns:
        Settings of the trainer and of sampling, ``max_steps`` and the seed.

    Raises:
        ConfigError: An unknown name, a bad value, a temperature other than the LM's, or a schedule
            that decays without ``max_steps``.
    """
    fields = field_names(SlowConfig)
    settings = known(train_kwargs, [*(f for f in fields if f not in LOOP_FIELDS), *OWN_KWARGS])
    own = {name: settings.pop(name) for name in OWN_KWARGS if name in settings}
    sampled_at = 1.0 if lm.kwargs.get("temperature") is None else lm.kwargs["temperature"]
    if own.get("temperature", sampled_at) != sampled_at:
        raise ConfigError(
            f"temperature={own['temperature']} in train_kwargs, but the rollouts are sampled at the "
            f"LM's {sampled_at}; make it LocalLM(..., temperature={own['temperature']})"
        )
    if own.get("num_generations", 2) < 2:
        raise ConfigError(
            "a group of one rollout has no advantage; set num_rollouts_per_grpo_step to 2 or more "
            "on dspy.GRPO"
        )
    try:
        slow = SlowConfig(**settings)
        sampling = SamplingConfig(temperature=sampled_at, max_tokens=lm.kwargs.get("max_tokens"))
    except TypeError as error:
        raise ConfigError(f"a setting in train_kwargs has the wrong type: {error}") from error
    if "max_steps" not in own and not slow.lr_scheduler_type.startswith("constant"):
        raise ConfigError(
            f"lr_scheduler_type={slow.lr_scheduler_type!r} needs max_steps in train_kwargs, over "
            "which it decays: the num_train_steps of dspy.GRPO"
        )
    return slow, sampling, own.get("max_steps", 1), own.get("seed", 0)


def known(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A copy of the settings, ``lora`` made a ``LoraConfig`` or ``None``.

    Raises:
        ConfigError: A name that is not among ``names``; the nearest one is suggested.
    """
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(names))}"
            raise ConfigError(f"unknown setting {name!r} in train_kwargs{hint}")
    result = dict(settings)
    if "lora" in result:
        result["lora"] = as_lora(result["lora"])
    return result


def field_names(cls: Any) -> list[str]:
    """The names of a dataclass's fields."""
    return [f.name for f in dataclasses.fields(cls)]
