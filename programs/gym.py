"""Any dataset of the package reasoning-gym, with the dataset's own verifier: for real models.

``fst compile gym:dataset=gsm_symbolic --model Qwen/Qwen3-0.6B``. The tasks of the paper, and the
dataset that stands for each:

- CodeIO: ``codeio``, the data it used, predicting the output or the input of a program;
- math (Polaris): ``gsm_symbolic``, word problems with other names and numbers in each;
- star-graph search: ``path_star`` (``programs/star_graph.py`` is the one for small models);
- HoVer and Physics: none; see ``programs/multihop.py`` for HoVer.

Needs ``pip install 'fst-dspy[gym]'``. What to know of the datasets:

- ``codeio`` runs the code snippets of the package to make its questions; they run in a folder of
  their own, but are not confined to it.
- The verifiers of ``EVALUATING`` run the model's answer as Python code. They are used only with
  ``trust_answers=true``.
- The same seed gives the same questions in every process, except with a few datasets that go by
  the order of Python sets (``isomorphic_strings``, ``knight_swap``, ``polynomial_multiplication``,
  ``ransom_note``, ``word_ladder``: set ``PYTHONHASHSEED``) or by the date (``time_intervals``).
- ``number_sequence`` draws, about once in 500, a sequence that it never finishes computing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import dspy
import numpy as np

from fst_dspy.errors import ConfigError, DataError
from fst_dspy.types import Task

EVALUATING = frozenset(
    {
        "binary_matrix",
        "composite",  # may hold any of the others
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Datasets whose verifiers pass the answer to ``eval``, or to sympy's parser, which does."""
DRAWS = 10
"""Entries drawn for each one wanted, before a dataset is said to have too few different ones."""
EXAMPLE_ANSWERS = ("possible_answer", "example_answer", "example_correct_answer")
"""Metadata with one right answer of many, where an entry has no ``answer``."""
EXPLANATIONS = ("answer_cot", "rule")
"""Metadata that says how the answer is found."""


class SolveProblem(dspy.Signature):
    """Solve the problem. The answer is the final result alone, in the form the problem asks for."""

    problem: str = dspy.InputField()
    answer: str = dspy.OutputField()


def load(
    seed: int = 0,
    dataset: str = "codeio",
    train: int = 200,
    val: int = 64,
    test: int = 200,
    reasoning: bool = True,
    trust_answers: bool = False,
    **config: Any,
) -> Task:
    """The task of one dataset. No problem is in two splits.

    Args:
        seed: Seed of the problems; neighbouring seeds share none but by chance.
        dataset: Its name in reasoning-gym, such as ``"codeio"`` or ``"gsm_symbolic"``.
        train, val, test: Problems in each split.
        reasoning: Ask for the reasoning before the answer. A model of some hundred million weights
            answers better, and several times faster, without.
        trust_answers: Allow a verifier that runs the model's answers as code (``EVALUATING``).
        **config: The dataset's own settings, such as ``difficulty=6``.

    Raises:
        ConfigError: reasoning-gym is missing, has no such dataset or setting, or cannot make the
            dataset; its verifier would run answers, or gives full marks to any.
        DataError: It has too few different problems.
    """
    if min(train, val, test) < 0:
        raise DataError(f"a split cannot have fewer than 0 problems: {train}, {val}, {test}")
    if "size" in config:
        raise ConfigError("the splits say how many problems there are: use train=, val=, test=")
    count = train + val + test
    registry = _datasets()
    _check_name(dataset, registry, trust_answers)
    _check_config(dataset, registry[dataset][1], config)
    own_seed = random.Random(f"gym {dataset} {seed}").getrandbits(31)  # seed + 1 is a shift by one
    with _contained(own_seed):
        source = _make(dataset, {**config, "seed": own_seed, "size": DRAWS * max(1, count)})
        entries = _draw(source, dataset, count)
    metric = make_metric(source, entries)
    if entries and verify(source, next(iter(entries.values())), "?")[0] >= 1:
        raise ConfigError(f"the verifier of {dataset} gives full marks to any answer")
    examples = [
        dspy.Example(problem=problem, answer=right_answer(entry) or "").with_inputs("problem")
        for problem, entry in entries.items()
    ]
    return Task(
        name=f"gym-{dataset}",
        program=(dspy.ChainOfThought if reasoning else dspy.Predict)(SolveProblem),
        metric=metric,
        trainset=examples[:train],
        valset=examples[train : train + val],
        testset=examples[train + val :],
    )


def make_metric(
    source: Any, entries: Mapping[str, Mapping[str, Any]]
) -> Callable[..., dspy.Prediction]:
    """The metric, in GEPA's form: the verifier's score, and what would have been right.

    Args:
        source: The dataset, which has ``score_answer(answer, entry)``, 0 to 1.
        entries: Its entries by problem; the metric scores examples of these problems only.
    """

    def metric(
        gold: dspy.Example,
        pred: dspy.Prediction,
        trace: Any = None,
        pred_name: str | None = None,
        pred_trace: Any = None,
    ) -> dspy.Prediction:
        entry = entries[gold.problem]
        answer = str(getattr(pred, "answer", None) or "").strip()
        score, fault = verify(source, entry, answer)
        return dspy.Prediction(score=score, feedback=_feedback(score, fault, answer, entry))

    return metric


def verify(source: Any, entry: Mapping[str, Any], answer: str) -> tuple[float, str]:
    """The verifier's score, 0 to 1, and why it could not read the answer, if it could not."""
    if not answer:
        return 0.0, ""
    try:
        return float(source.score_answer(answer, entry)), ""
    except Exception as error:  # verifiers trip over answers of the wrong form
        return 0.0, f"{type(error).__name__}: {error}"


def right_answer(entry: Mapping[str, Any]) -> str | None:
    """A right answer to an entry, if it has one."""
    known = [entry["answer"], *(entry["metadata"].get(key) for key in EXAMPLE_ANSWERS)]
    answer = next((value for value in known if value is not None), None)
    return answer if answer is None or isinstance(answer, str) else json.dumps(answer)


def _feedback(score: float, fault: str, answer: str, entry: Mapping[str, Any]) -> str:
    verdict = "Right" if score >= 1 else "Wrong"
    if 0 < score < 1:
        verdict = f"Not fully right (score {score:.2f} of 1)"
    said = f"the answer was {_quoted(answer)}" if answer else "there was no answer"
    parts = [f"{verdict}: {said}."]
    if fault:
        parts.append(f"It could not be read ({fault}).")
    right = right_answer(entry)
    if score < 1 and right is not None:
        parts.append(f"The right answer, or one of them, is {_quoted(right)}.")
    told = [str(entry["metadata"][key]) for key in EXPLANATIONS if key in entry["metadata"]]
    parts += [f"The way to the right answer: {' '.join(text.split())}" for text in told]
    return " ".join(parts)


def _quoted(text: str) -> str:
    # On one line: the lines of a grid are no sentences.
    return "`" + text.replace("\n", "\\n") + "`"


def _datasets() -> Mapping[str, tuple[type, type]]:
    """reasoning-gym's datasets by name: the class of each and that of its config."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(
            f"the datasets of reasoning-gym cannot be loaded ({error}); pip install 'fst-dspy[gym]'"
        ) from error
    return DATASETS


def _check_name(dataset: str, registry: Mapping[str, Any], trust_answers: bool) -> None:
    if dataset not in registry:
        near = difflib.get_close_matches(dataset, registry, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(sorted(registry))}"
        raise ConfigError(f"reasoning-gym has no dataset {dataset!r}; {hint}")
    if dataset in EVALUATING and not trust_answers:
        raise ConfigError(
            f"the verifier of {dataset} runs the model's answers as Python code on this machine; "
            "pass trust_answers=true to allow it"
        )


def _check_config(dataset: str, config_type: Any, config: Mapping[str, Any]) -> None:
    known = sorted({f.name for f in dataclasses.fields(config_type)} - {"seed", "size"})
    for name in config:
        if name not in known:
            raise ConfigError(
                f"{dataset} of reasoning-gym has no setting {name!r}; it has: "
                f"{', '.join(known) or 'none'}"
            )


def _make(dataset: str, config: Mapping[str, Any]) -> Any:
    from reasoning_gym import create_dataset

    try:
        return create_dataset(dataset, **config)
    except Exception as error:  # the config's assertions; packages or files that are not there
        raise ConfigError(
            f"reasoning-gym cannot make {dataset} with {dict(config)}: "
            f"{type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def _contained(seed: int) -> Iterator[None]:
    """Make generators repeatable and quiet, and let them write their files where they are removed.

    Some use the global random generators; the snippets of codeio print, warn and write files.
    """
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _draw(source: Any, dataset: str, count: int) -> dict[str, dict[str, Any]]:
    """``count`` entries of different problems, by problem."""
    from tqdm import tqdm

    entries: dict[str, dict[str, Any]] = {}
    reason = "it repeats itself"
    with tqdm(total=count, desc=f"problems of {dataset}", delay=2, leave=False) as bar:
        for index in range(len(source)):
            if len(entries) == count:
                return entries
            try:
                entry = source[index]
            except ImportError as error:
                raise ConfigError(f"{dataset} of reasoning-gym needs a package: {error}") from error
            except Exception as error:  # the snippets of codeio, for one, are not all sound
                reason = f"the last error was {type(error).__name__}: {error}"
                continue
            if entry["metadata"].get("input_data") != {}:  # codeio's sign that a snippet failed
                entries.setdefault(entry["question"].strip(), entry)
                bar.update(len(entries) - bar.n)
    if len(entries) < count:
        raise DataError(
            f"{dataset} gave {len(entries)} different problems in {len(source)} draws, {count} are "
            f"wanted ({reason}); ask for fewer with train=, val=, test=, or change its settings"
        )
    return entries
