"""The search space of a study: which of FST's settings are tuned, over which values.

In code::

    space = default_space().extend(Float("learning_rate", 1e-5, 1e-3, log=True))
    space = space.extend(Int("val_size", 16, 64, step=16)).without("temperature")

In YAML, with the same meaning::

    extends: default            # leave this line out to replace the default space
    parameters:
      learning_rate: {low: 1e-5, high: 1e-3, log: true}
      val_size: {low: 16, high: 64, step: 16}
      loss_type: [cispo, dapo]
      epsilon_high: {low: 1, high: 10, when: {loss_type: [cispo]}}
      temperature: null         # not tuned after all
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import yaml

from fst_dspy.config import (
    ALIASES,
    AUTO,
    PARTS,
    STANDS_FOR,
    BudgetConfig,
    check_setting,
    used_by,
)
from fst_dspy.errors import ConfigError
from fst_dspy.slow.learning_rate import default_learning_rate

Value = bool | int | float | str
SAME = {target: name for name, target in STANDS_FOR.items()}
"""Settings that the default space has under another name."""
When = Mapping[str, Sequence[Value]]


@dataclass(frozen=True)
class Float:
    """A real-valued setting.

    Attributes:
        name: One of FST's flat settings.
        low, high: The range, both ends included.
        log: Sample evenly in the logarithm.
        when: Tune it only where each of these settings has one of these values; they come earlier
            in the space. Elsewhere it keeps its default.
        by_size: The range is that of the smallest models: ``Space.for_size`` moves it.
    """

    name: str
    low: float
    high: float
    log: bool = False
    when: When | None = None
    by_size: bool = False

    @property
    def ends(self) -> tuple[Value, ...]:
        """Values that show whether the whole range can work."""
        return (self.low, self.high)

    def has(self, value: Any) -> bool:
        """Whether a value is one of this range's."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def distribution(self) -> optuna.distributions.BaseDistribution:
        """The same as Optuna writes it."""
        return optuna.distributions.FloatDistribution(self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Int:
    """A whole-valued setting: ``low``, ``low + step``, ... up to ``high``. Else as ``Float``."""

    name: str
    low: int
    high: int
    step: int = 1
    log: bool = False
    when: When | None = None

    @property
    def ends(self) -> tuple[Value, ...]:
        """Values that show whether the whole range can work."""
        return (self.low, self.high)

    def has(self, value: Any) -> bool:
        """Whether a value is one of this range's."""
        in_range = isinstance(value, int) and self.low <= value <= self.high
        return in_range and (value - self.low) % self.step == 0

    def distribution(self) -> optuna.distributions.BaseDistribution:
        """The same as Optuna writes it."""
        return optuna.distributions.IntDistribution(self.low, self.high, self.log, self.step)


@dataclass(frozen=True)
class Categorical:
    """A setting that takes one of a few values, in no order. ``when`` as for ``Float``."""

    name: str
    choices: tuple[Value, ...]
    when: When | None = None

    @property
    def ends(self) -> tuple[Value, ...]:
        """Values that show whether the whole range can work: all of them."""
        return self.choices

    def has(self, value: Any) -> bool:
        """Whether a value is one of the choices."""
        return value in self.choices

    def distribution(self) -> optuna.distributions.BaseDistribution:
        """The same as Optuna writes it."""
        return optuna.distributions.CategoricalDistribution(self.choices)


Parameter = Float | Int | Categorical


@dataclass(frozen=True)
class Space:
    """The parameters that a study tunes, in the order in which they are drawn.

    Attributes:
        size: Parameters of the model whose defaults these are; 0 stands for the smallest models.

    Raises:
        ConfigError: A setting that FST does not have (the nearest name is suggested), a value that
            it does not take, a range the wrong way round, or a ``when`` on a later parameter or on
            values that it never has.
    """

    parameters: tuple[Parameter, ...]
    size: int = 0

    def __post_init__(self) -> None:
        if not self.parameters:
            raise ConfigError("the search space is empty; give it at least one parameter")
        limits = {field.name for field in fields(BudgetConfig)}
        seen: dict[str, Parameter] = {}
        for parameter in self.parameters:
            name = parameter.name
            if name in limits:
                raise ConfigError(f"{name} is the study's budget, the same for all its trials")
            if name in seen:
                raise ConfigError(f"{name} is in the search space twice")
            for value in parameter.ends:
                check_setting(name, value)
            for other, values in (parameter.when or {}).items():
                if other not in seen:
                    raise ConfigError(f"{name} depends on {other!r}, which must come before it")
                if isinstance(values, str) or not isinstance(values, Collection):
                    raise ConfigError(f"{name}: give a list of values of {other}, not {values!r}")
                if not any(map(seen[other].has, values)):
                    raise ConfigError(f"{name}: {other} never has one of the values {values}")
            try:
                parameter.distribution()
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from error
            seen[name] = parameter

    def extend(self, *parameters: Parameter) -> Space:
        """This space with more parameters; one of a known name takes the old one's place."""
        merged = {parameter.name: parameter for parameter in self.parameters}
        merged.update({parameter.name: parameter for parameter in parameters})
        return replace(self, parameters=tuple(merged.values()))

    def without(self, *names: str) -> Space:
        """This space with fewer parameters.

        Raises:
            ConfigError: A name that is not in it.
        """
        known = [parameter.name for parameter in self.parameters]
        for name in names:
            if name not in known:
                raise ConfigError(f"{name!r} is not in the search space: {', '.join(known)}")
        return replace(self, parameters=tuple(p for p in self.parameters if p.name not in names))

    def for_size(self, size: int) -> Space:
        """This space for a model of so many parameters.

        The learning rate's default is the model's own, and a range that was given for the smallest
        models goes along with it; where adapters are tuned as well, its upper end with theirs.
        """
        small, full, adapters = (
            default_learning_rate(count, lora=lora)
            for count, lora in ((0, False), (size, False), (size, True))
        )
        top = adapters if "lora_rank" in (p.name for p in self.parameters) else full

        def moved(parameter: Parameter) -> Parameter:
            if not (isinstance(parameter, Float) and parameter.by_size):
                return parameter
            low, high = parameter.low * full / small, parameter.high * top / small
            return replace(parameter, low=_round(low), high=_round(high), by_size=False)

        return Space(tuple(map(moved, self.parameters)), size)

    def fixed_by(self, names: Iterable[str]) -> list[str]:
        """The parameters that settings of these names say, under whatever name they are known."""
        given = {ALIASES.get(name, name) for name in names}
        given |= {SAME.get(name, name) for name in given} | {
            own for own, other in SAME.items() if other in given
        }
        return sorted(given & {parameter.name for parameter in self.parameters})

    def beside(self, names: Iterable[str]) -> Space:
        """This space less the parameters that settings of these names say."""
        return self.without(*self.fixed_by(names))

    def of_arm(self, arm: str) -> Space:
        """This space less the parameters of a channel that the arm does not have."""
        names = [parameter.name for parameter in self.parameters]
        return self.without(*(set(names) - used_by(arm, dict.fromkeys(names)).keys()))

    def suggest(self, trial: optuna.Trial) -> dict[str, Value]:
        """Draw the settings of a trial, as ``FST`` takes them."""
        settings: dict[str, Value] = {}
        for parameter in self.parameters:
            if _applies(parameter, settings):
                settings[parameter.name] = _suggest(trial, parameter)
        return settings

    def restrict(self, settings: Mapping[str, Any]) -> dict[str, Value]:
        """Those of the settings that are in this space, with a value it has."""
        kept: dict[str, Value] = {}
        for parameter in self.parameters:
            value = settings.get(parameter.name)
            if value is None or not _applies(parameter, kept):
                continue
            if parameter.has(value):
                kept[parameter.name] = value
        return kept

    def defaults(self) -> dict[str, Value]:
        """FST's own defaults of the settings in this space, where the space has them."""
        plain: dict[str, Any] = {f.name: f.default for kind in PARTS.values() for f in fields(kind)}
        per_candidate = plain["group_size"] // plain["population_size"]
        own = {"lora_rank": 0, "rollouts_per_candidate": per_candidate}
        own["learning_rate"] = default_learning_rate(self.size, lora=False)
        return self.restrict({**plain, **own})


def default_space() -> Space:
    """What is worth tuning on a new task, with ranges around the defaults.

    The range of the learning rate is around the default of the model that is tuned.
    """
    return Space(
        (
            Float("learning_rate", 3e-5, 1e-3, log=True, by_size=True),
            Int("steps_per_cycle", 2, 12, step=2),
            Categorical("population_size", (2, 4, 8)),
            Categorical("rollouts_per_candidate", (1, 2, 4)),
            Float("temperature", 0.7, 1.2),
            Float("epsilon_high", 1.0, 8.0, log=True),
            Int("first_cycle_iterations", 2, 14, step=2),
            Int("cycle_iterations", 0, 4),
            Int("minibatch_size", 4, 20, step=4),
            Categorical("demo_tokens", ("auto", 0, 128, 256)),
            Categorical("lora_rank", (0, 4, 16)),
        )
    )


def usual_space(arm: str, settings: Mapping[str, Any]) -> Space:
    """The default space of an arm, less what settings say, or the preset that ``auto`` names."""
    said = {**AUTO.get(settings.get("auto") or "", {}), **settings}
    return default_space().of_arm(arm).beside(said)


def _round(value: float) -> float:
    """To two digits, as the default rates are."""
    return float(f"{value:.1e}")


def draw_settings(space: Space, count: int, seed: int) -> list[dict[str, Any]]:
    """The defaults and then settings drawn evenly from the space; a function of its arguments."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    optuna.logging.set_verbosity(verbosity)
    study.enqueue_trial(space.defaults())
    return [space.suggest(study.ask()) for _ in range(count)]


def load_space(path: str | Path) -> Space:
    """Read a space from a YAML file; its form is in this module's docstring.

    Raises:
        ConfigError: The file cannot be read or says something that is not a space.
    """
    try:
        plain = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the search space {path}: {error}") from error
    if not isinstance(plain, dict) or not isinstance(plain.get("parameters"), dict):
        raise ConfigError(f"{path} must have a mapping under 'parameters'")
    unknown = sorted({*plain} - {"extends", "parameters"})
    if unknown or plain.get("extends", "default") != "default":
        raise ConfigError(f"{path} has 'extends: default' (or not) and 'parameters', nothing else")
    given = plain["parameters"]
    added = [_from_plain(name, value) for name, value in given.items() if value is not None]
    if "extends" not in plain:
        return Space(tuple(added))
    space = default_space().without(*(name for name, value in given.items() if value is None))
    return space.extend(*added)


def _from_plain(name: str, plain: Any) -> Parameter:
    """A parameter from YAML: a list of choices, or a mapping with a range or choices."""
    if isinstance(plain, list):
        plain = {"choices": plain}
    if not isinstance(plain, dict):
        raise ConfigError(
            f"{name}: give a list of values or {{low: ..., high: ...}}, not {plain!r}"
        )
    plain = dict(plain)
    make: Callable[..., Parameter]
    if "choices" in plain:
        make, plain["choices"] = Categorical, tuple(plain["choices"])
    else:
        # YAML 1.1 takes 1e-5, without a point, for text.
        for key in ("low", "high"):
            if isinstance(plain.get(key), str):
                plain[key] = _number(name, plain[key])
        whole = _is_whole_setting(name)
        make = Int if whole else Float
        if not whole:
            plain.update({key: float(plain[key]) for key in ("low", "high") if key in plain})
    try:
        return partial(make, name)(**plain)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from error


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is not a number") from None


def _is_whole_setting(name: str) -> bool:
    """Whether a setting takes whole numbers; asks by its type in ``fst_dspy.config``."""
    kinds = {f.name: str(f.type) for kind in PARTS.values() for f in fields(kind)}
    return kinds.get(name, "int").startswith("int")


def _applies(parameter: Parameter, settings: Mapping[str, Value]) -> bool:
    conditions = (parameter.when or {}).items()
    return all(settings.get(name) in values for name, values in conditions)


def _suggest(trial: optuna.Trial, parameter: Parameter) -> Value:
    match parameter:
        case Float(name, low, high, log):
            return trial.suggest_float(name, low, high, log=log)
        case Int(name, low, high, step, log):
            return trial.suggest_int(name, low, high, step=step, log=log)
        case Categorical(name, choices):
            value = trial.suggest_categorical(name, choices)
            assert value is not None
            return value
