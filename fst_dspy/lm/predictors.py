"""Which of a program's predictors call the local model, and with what settings.

Which language model a predictor calls is for DSPy to say: its own, or that of the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dspy

from fst_dspy.config import LoraConfig, SamplingConfig
from fst_dspy.errors import ConfigError, ProgramError
from fst_dspy.lm.compiled import follows, mark_compiled
from fst_dspy.lm.kept_weights import refuse_quantized
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.lm.requests import DEFAULT_MAX_TOKENS, penalty_in
from fst_dspy.model.policy import Policy
from fst_dspy.student.candidate import bind
from fst_dspy.student.identity import adapter_identity
from fst_dspy.student.modules import every_predictor
from fst_dspy.types import Candidate

SAMPLED = ("temperature", "top_p", "max_tokens")
"""Settings of a language model that ``SamplingConfig`` has as well."""


def resolved_lm(predictor: dspy.Predict) -> Any:
    """The language model that DSPy sends a predictor's calls to; ``None`` where there is none."""
    return predictor.lm or dspy.settings.lm


def shares_policy(lm: Any, policy: Any) -> bool:
    """Whether a language model is a local one over this policy."""
    return isinstance(lm, LocalLM) and lm.policy is policy


def find_local_lm(program: dspy.Module) -> LocalLM:
    """The one ``LocalLM`` that the program's predictors call.

    Raises:
        ProgramError: There is none, or predictors call local models of several policies, or one
            policy with several weights.
    """
    used = [resolved_lm(predictor) for predictor in every_predictor(program).values()]
    local = [lm for lm in used if isinstance(lm, LocalLM)]
    if not local:
        named = sorted({str(getattr(lm, "model", lm)) for lm in used if lm is not None})
        found = f"only {', '.join(named)}, which cannot be trained here" if named else "none"
        raise ProgramError(
            f"the program needs a local model to train, found {found}; set one with "
            'dspy.configure(lm=fst_dspy.LocalLM("embedded")) or program.set_lm(...)'
        )
    if any(lm.policy is not local[0].policy for lm in local):
        raise ProgramError(
            "the program's predictors call several local models; FST trains one: give them the "
            "same LocalLM"
        )
    if versions := {lm.version for lm in local} - {local[0].version}:
        raise ProgramError(
            f"the program's predictors call one model with several weights, {local[0].version} and "
            f"{', '.join(sorted(versions))}; training starts from one: call program.set_lm(...)"
        )
    return local[0]


def check_trained(program: dspy.Module, policy: Policy, lora: LoraConfig | None = None) -> None:
    """Refuse to train what cannot be: a quantized model's weights, and some ways of sampling.

    ``top_p`` and ``top_k`` cut the policy's distribution, and the loss takes the whole of it, as
    TRL does. Penalties move it from token to token, and the loss would know nothing of it.

    Raises:
        ConfigError: The model is quantized and no adapters are trained, or a predictor's LM, or its
            own ``config``, has penalties.
    """
    refuse_quantized(policy, lora)
    for name, predictor in every_predictor(program).items():
        lm = resolved_lm(predictor)
        if not shares_policy(lm, policy):
            continue
        said = {**lm.kwargs, **(getattr(predictor, "config", None) or {})}
        if penalty := penalty_in(said):
            raise ConfigError(
                f"the predictor {name!r} samples with {penalty}={said[penalty]}, and what is "
                "sampled so cannot be trained on: leave it out, and set it on the compiled "
                "program's LM if you need it there"
            )


class RolloutLMs:
    """The language models of a program's rollouts: its own, but live, uncached, and sampled.

    A language model that the program shares with others keeps being shared, as one copy; so
    ``module.get_lm()`` answers as before. Those of other policies stay as they are.

    Temperature, ``top_p`` and ``max_tokens`` are the run's where an LM leaves them to the default,
    which is what the LM of DSPy's settings says, or one that all predictors agree with, or else
    what a new ``LocalLM`` says. What an LM says otherwise holds, as does a predictor's ``config``.

    Args:
        program: The student.
        lm: The local model that is trained.
        sampling: The run's own settings.
    """

    def __init__(self, program: dspy.Module, lm: LocalLM, sampling: SamplingConfig) -> None:
        self.policy = lm.policy
        self._run = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.max_tokens is not None:
            self._run["max_tokens"] = sampling.max_tokens
        self._default = self._default_of(program)
        self._made: dict[int, tuple[LocalLM, LocalLM]] = {}  # with the original: ids are reused
        settings_lm = dspy.settings.lm
        self.settings_lm = lm if settings_lm is None else settings_lm
        self._structured = False

    def hold(self, structured: bool) -> None:
        """From here on hold answers to their format, or as each LM says itself."""
        self._structured = structured
        for lm, copy in self._made.values():
            held = structured or lm.kwargs.get("structured")
            copy.kwargs = {**copy.kwargs, "structured": held}

    def of(self, lm: Any) -> Any:
        """What stands for a language model in rollouts; the same every time."""
        if not shares_policy(lm, self.policy):
            return lm
        if id(lm) not in self._made:
            self._made[id(lm)] = (lm, self._copy(lm))
        return self._made[id(lm)][1]

    def _copy(self, lm: LocalLM) -> LocalLM:
        left = {
            name: value
            for name, value in self._run.items()
            if lm.kwargs.get(name) == self._default.get(name)
        }
        held = {"structured": True} if self._structured else {}
        return lm.live().copy(num_retries=0, **left, **held)

    def _default_of(self, program: dspy.Module) -> Mapping[str, Any]:
        if shares_policy(dspy.settings.lm, self.policy):
            return dspy.settings.lm.kwargs
        used = [p.lm for p in every_predictor(program).values() if shares_policy(p.lm, self.policy)]
        said = [{name: lm.kwargs.get(name) for name in SAMPLED} for lm in used]
        if said and all(row == said[0] for row in said):
            return said[0]
        limit = min(DEFAULT_MAX_TOKENS, self.policy.context_length // 8)
        return {"temperature": 1.0, "max_tokens": limit}


def bound_to(
    student: dspy.Module, candidate: Candidate, lm: LocalLM, *, structured: bool = False
) -> dspy.Module:
    """A compiled copy of a program: a candidate's texts in it, its trained predictors on ``lm``.

    Each keeps the settings of the LM that it called before, and those that shared one go on sharing
    one. Those that DSPy sends to other models are left alone. What the program does with language
    models as it runs, it goes on doing (``fst_dspy.lm.compiled``). With ``structured`` answers are
    held to their formats, as they were in training.
    """
    held = {"structured": True} if structured else {}
    lm = lm.copy(**held) if held else lm
    compiled = bind(student, candidate)
    bound: dict[int, LocalLM] = {}
    following = []
    for predictor in every_predictor(compiled).values():
        own = resolved_lm(predictor)
        if own is not None and not shares_policy(own, lm.policy):
            continue
        if follows(predictor):
            following.append(predictor)
        predictor.lm = (
            lm if own is None else bound.setdefault(id(own), own.copy(model=lm.model, **held))
        )
    mark_compiled(compiled, lm, following, adapter_identity(dspy.settings.adapter))
    compiled._compiled = True
    return compiled
