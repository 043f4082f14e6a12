"""What the files of a run folder must hold to be shown, checked as they are read.

A run folder may be a stranger's, cut off or edited by hand. Whatever passes has the types named
here, so that what shows it neither trips nor takes a text for a number. Keys that are not named
are passed over: later versions may write more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import TypedDict

from fst_dspy.errors import StoreError
from fst_dspy.files import read_json, read_jsonl
from fst_dspy.run.records import read_number

LARGEST = 1e100
"""No number that a run writes is larger, and those that are not do not overflow in a chart."""

DEEPEST = 100
"""So many lists and objects inside one another can be shown."""


def _charted(value: float) -> float:
    if LARGEST < abs(value) < float("inf"):
        raise ValueError(f"is larger than {LARGEST:g}")
    return value


Count = Annotated[int, Field(ge=0, le=10**15)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Diagnostic = Annotated[float, AfterValidator(_charted)]
"""May be infinite or not a number, as it is where a step was dropped for that."""
Unbounded = Annotated[Diagnostic, BeforeValidator(read_number)]
"""Likewise, of a number that is then written as null."""


@with_config(ConfigDict(strict=True))
class _Counts(TypedDict):
    fast: Count
    slow: Count
    eval: Count
    reused: Count


@with_config(ConfigDict(strict=True))
class _Turns(TypedDict):
    turns: Count
    steps: Count
    invalid: Count
    errors: Count
    seconds: Number


@with_config(ConfigDict(strict=True))
class _Reflection(TypedDict):
    calls: Count
    tokens: Count
    cost: Number
    unpriced: Count


@with_config(ConfigDict(strict=True))
class _Proposals(TypedDict):
    reflection: NotRequired[_Reflection | None]
    proposals: NotRequired[Count]
    advice: NotRequired[str]
    empty: NotRequired[Count]
    duplicate: NotRequired[Count]


def _scored(cycle: Cycle) -> Cycle:
    if len(cycle["candidate_ids"]) != len(cycle["val_scores"]):
        raise ValueError("has not as many val_scores as candidate_ids")
    return cycle


@with_config(ConfigDict(strict=True))
class Cycle(TypedDict):
    """A row of ``cycles.jsonl``: ``types.CycleRecord``."""

    cycle: Count
    step: Count
    candidate_ids: list[str]
    best_candidate_id: str
    train_reward: Number | None
    val_score: Number
    val_scores: list[Number]
    kl_to_base: Unbounded
    entropy: Diagnostic | None
    constant_group_share: Number
    failure_shares: dict[str, Number]
    failure_messages: NotRequired[dict[str, str]]
    rollouts: _Counts
    total_rollouts: _Counts
    tokens: dict[str, Count]
    seconds: dict[str, Number]
    weights_version: str
    share: NotRequired[str]
    decided: NotRequired[str | None]
    proposals: NotRequired[_Proposals]
    reward_range: NotRequired[Annotated[list[Number], Field(min_length=2, max_length=2)] | None]
    format_share: NotRequired[Number | None]
    turns: NotRequired[_Turns]
    peak_memory: NotRequired[Count]
    cold_start: NotRequired[list[str]]


@with_config(ConfigDict(strict=True))
class _StepStats(TypedDict):
    entropy: Diagnostic
    grad_norm: Diagnostic
    loss: NotRequired[Diagnostic]
    learning_rate: NotRequired[Diagnostic]
    clip_share: NotRequired[Diagnostic]
    skipped: str | None
    taught: NotRequired[Count]
    lesson: NotRequired[Diagnostic]
    untaught: NotRequired[dict[str, Count]]


@with_config(ConfigDict(strict=True))
class Step(TypedDict):
    """A row of ``steps.jsonl``: ``types.StepRecord``."""

    cycle: Count
    step: Count
    reward: Number
    constant_group_share: Number
    failures: dict[str, Count]
    rollouts: Count
    stats: _StepStats


@with_config(ConfigDict(strict=True))
class _Candidate(TypedDict):
    id: str
    components: dict[str, str]
    parent_ids: list[str]
    cycle: Count
    source: str


def _complete(row: PopulationRow) -> PopulationRow:
    shape = [len(score_V) for score_V in row["score_K_V"]]
    if shape and shape != [len(row["val_ids"])] * len(row["candidates"]):
        raise ValueError("has not a score for each candidate on each example")
    return row


@with_config(ConfigDict(strict=True))
class PopulationRow(TypedDict):
    """A row of ``population.jsonl``: ``types.Population`` at the end of a cycle."""

    cycle: Count
    candidates: list[_Candidate]
    val_ids: list[str]
    score_K_V: list[list[Number]]


@with_config(ConfigDict(strict=True))
class _Failure(TypedDict):
    kind: str
    message: str


@with_config(ConfigDict(strict=True))
class _Call(TypedDict):
    predictor: str
    prompt_ids_T: list[Annotated[int, Field(ge=0, lt=2**31)]]
    completion_ids_T: list[int]
    text: str
    finish_reason: str
    prompt_of: NotRequired[Count]
    prompt_shared: NotRequired[Count]


@with_config(ConfigDict(strict=True))
class _Trace(TypedDict):
    predictor: str
    inputs: NotRequired[dict[str, Any]]
    inputs_of: NotRequired[Count]
    outputs: dict[str, Any] | None


@with_config(ConfigDict(strict=True))
class _Turn(TypedDict):
    observation: str
    action: str
    result: str
    reward: Number
    status: str
    seconds: Number
    calls: Count
    said: NotRequired[dict[str, str]]


@with_config(ConfigDict(strict=True))
class RolloutRow(TypedDict):
    """A row of ``rollouts.jsonl``: ``types.Rollout`` as packed, with its step and advantage."""

    step: Count
    cycle: Count
    reward: Number
    advantage: Number
    example_id: str
    candidate_id: str
    failure: _Failure | None
    feedback: str
    calls: list[_Call]
    traces: list[_Trace]
    feedback_by_predictor: NotRequired[dict[str, str]]
    turns: NotRequired[list[_Turn]]


def _failure_score(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    score = settings.get("sampling", {}).get("failure_score", 0.0)
    if type(score) not in (int, float) or not abs(score) <= LARGEST:
        raise ValueError("sampling.failure_score is no number")
    return settings


@with_config(ConfigDict(strict=True))
class Config(TypedDict):
    """``config.json``: what is shown of it."""

    arm: NotRequired[str]
    seed: NotRequired[int]
    model: NotRequired[str]
    settings: NotRequired[Annotated[dict[str, dict[str, Any]], AfterValidator(_failure_score)]]
    environment: NotRequired[dict[str, Any]]
    student: NotRequired[dict[str, str]]
    train_ids: NotRequired[list[str]]
    val_ids: list[str]


@with_config(ConfigDict(strict=True))
class _Pair(TypedDict):
    version: str
    candidate_id: str


@with_config(ConfigDict(strict=True))
class Quadrants(TypedDict):
    """``quadrants.json``: ``rollouts.evaluate.Quadrants``, and the pair that was tested."""

    base_original: Number
    base_evolved: Number
    trained_original: Number
    trained_evolved: Number
    examples: Count
    scores: NotRequired[dict[str, list[Number]]]
    pair: NotRequired[_Pair]


def _of_each_example(found: Quadrants) -> Quadrants:
    scores = found.get("scores", {})
    if scores and scores.keys() != found.keys() - {"examples", "scores", "pair"}:
        raise ValueError("scores are not those of the four quadrants")
    if any(len(score_V) != found["examples"] for score_V in scores.values()):
        raise ValueError("scores has not one for each example")
    return found


@with_config(ConfigDict(strict=True))
class Proposal(TypedDict):
    """A row of ``proposals.jsonl``: ``fast.judge.Verdict``, and the optimizer steps by then."""

    step: Count
    cycle: Count
    iteration: Count
    id: str
    parent_ids: list[str]
    source: str
    components: dict[str, str]
    accepted: bool
    reason: str
    before: list[Number]
    after: list[Number]


@with_config(ConfigDict(strict=True))
class Answer(TypedDict):
    """A row of ``answers.jsonl``: ``run.answers.answer_rows``, and when it was given."""

    cycle: Count
    step: Count
    candidate_id: str
    example_id: str
    reward: Number
    feedback: str
    failure: str | None
    outputs: dict[str, str] | None
    text: str
    inputs: NotRequired[dict[str, str]]
    labels: NotRequired[dict[str, str]]


@with_config(ConfigDict(strict=True))
class _Best(TypedDict):
    cycle: Count
    candidate: _Candidate


@with_config(ConfigDict(strict=True))
class Result(TypedDict):
    """``result.json``: what is shown of it."""

    best: NotRequired[_Best]
    records: NotRequired[list[dict[str, Any]]]


CONFIG = TypeAdapter(Config)
QUADRANTS = TypeAdapter(Annotated[Quadrants, AfterValidator(_of_each_example)])
RESULT = TypeAdapter(Result)
CYCLE = TypeAdapter(Annotated[Cycle, AfterValidator(_scored)])
STEP = TypeAdapter(Step)
POPULATION = TypeAdapter(Annotated[PopulationRow, AfterValidator(_complete)])
ROLLOUT = TypeAdapter(RolloutRow)
PROPOSAL = TypeAdapter(Proposal)
ANSWER = TypeAdapter(Answer)


def read_checked(path: Path, schema: TypeAdapter[Any]) -> Any:
    """A JSON file that holds what it should.

    Raises:
        StoreError: It cannot be read, or does not.
    """
    with _damage_told():
        _refuse_other_than_file(path)
        return _checked(read_json(path), schema, str(path))


def read_checked_rows(path: Path, schema: TypeAdapter[Any]) -> Iterator[Any]:
    """The rows of a JSON-lines file, each of which holds what it should; none without the file.

    Raises:
        StoreError: The file cannot be read, or a row does not.
    """
    with _damage_told():
        if path.exists():
            _refuse_other_than_file(path)
        for number, row in enumerate(read_jsonl(path), start=1):
            yield _checked(row, schema, f"{path}, line {number}")


@contextmanager
def _damage_told() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise StoreError(
            f"{error}; the run folder was edited or is damaged: leave it out, or take the file "
            "from a copy"
        ) from error


def _refuse_other_than_file(path: Path) -> None:
    if not path.is_file():  # reading a pipe or a device might never end
        raise StoreError(f"{path} is no file")


def _checked(value: Any, schema: TypeAdapter[Any], where: str) -> Any:
    try:
        _refuse_deep(value)
        return schema.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise StoreError(f"{where}: {place}: {first['msg']}") from error
    except ValueError as error:
        raise StoreError(f"{where}: {error}") from error


def _refuse_deep(value: Any) -> None:
    """Walk down the levels together: what is deep would overflow the stack where it is shown."""
    level, depth = [value], 0
    while level := [
        inner
        for outer in level
        if isinstance(outer, dict | list)
        for inner in (outer.values() if isinstance(outer, dict) else outer)
        if isinstance(inner, dict | list)
    ]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} lists and objects inside one another")
