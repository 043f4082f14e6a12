"""Dates, times and durations between bounds: the expressions let through those alone."""

from __future__ import annotations

import datetime
import re
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_dspy.grammar import bounds
from fst_dspy.grammar.values import bare_pattern, schema_of


def _near(ends: tuple[int, int], off: int, least: int, most: int) -> int:
    return max(least, min(most, ends[off % 2] + off))


@given(
    ends=st.lists(st.integers(1, datetime.date.max.toordinal()), min_size=2, max_size=2),
    off=st.integers(-800, 800),
)
def test_dates(ends: list[int], off: int) -> None:
    first, last = (datetime.date.fromordinal(n) for n in sorted(ends))
    day = datetime.date.fromordinal(
        _near((first.toordinal(), last.toordinal()), off, 1, datetime.date.max.toordinal())
    )
    written = re.compile(bounds.dates(first, last))
    assert bool(written.fullmatch(str(day))) == (first <= day <= last)
    assert not written.fullmatch(f"{last}"[:4] + "-02-30")


@given(
    ends=st.lists(st.integers(0, bounds.DAY - 1), min_size=2, max_size=2),
    days=st.integers(0, 3),
    off=st.integers(-4_000, 4_000),
)
def test_times_of_a_day_and_of_some_days(ends: list[int], days: int, off: int) -> None:
    first, last = sorted(ends)
    time = _near((first, last), off, 0, bounds.DAY - 1)
    midnight = datetime.datetime(2023, 12, 30)
    shown = (midnight + datetime.timedelta(seconds=time)).time().isoformat()
    assert bool(re.fullmatch(bounds.clocks(first, last), shown)) == (first <= time <= last)
    zero = midnight.toordinal() * bounds.DAY
    first, last = zero + first, zero + last + days * bounds.DAY
    then = _near((first, last), off, bounds.DAY, last + bounds.DAY)
    shown = (midnight + datetime.timedelta(seconds=then - zero)).isoformat()
    assert bool(re.fullmatch(bounds.date_times(first, last), shown)) == (first <= then <= last)


@given(
    ends=st.lists(st.integers(-2_000, 200_000), min_size=2, max_size=2),
    off=st.integers(-1_500, 1_500),
)
def test_durations(ends: list[int], off: int) -> None:
    first, last = sorted(ends)
    time = _near((first, last), off, -9_999, 999_999)
    shown = f"{'-' if time < 0 else ''}PT{abs(time)}S"
    assert bool(re.fullmatch(bounds.durations(first, last), shown)) == (first <= time <= last)


DAY = datetime.date(2024, 2, 29)
NOON = datetime.datetime(2024, 2, 29, 12)
HALF = datetime.timedelta(microseconds=500_000)


@pytest.mark.parametrize(
    ("kind", "limits", "good", "bad"),
    [
        (datetime.date, {"gt": DAY}, ["2024-03-01"], ["2024-02-29"]),
        (datetime.date, {"lt": DAY}, ["2024-02-28"], ["2024-02-29"]),
        (datetime.datetime, {"ge": NOON + HALF}, ["2024-02-29T12:00:01"], ["2024-02-29T12:00:00"]),
        (datetime.datetime, {"lt": NOON + HALF}, ["2024-02-29T12:00:00"], ["2024-02-29T12:00:01"]),
        (
            datetime.datetime,
            {"ge": NOON.replace(tzinfo=datetime.UTC)},
            ["2024-02-29T12:00:00Z"],
            ["2024-02-29T12:00:00", "2024-02-29T11:59:59Z"],
        ),
        (datetime.time, {"gt": datetime.time(9)}, ["09:00:01", "23:59:59"], ["09:00:00"]),
        (datetime.timedelta, {"le": datetime.timedelta(hours=1)}, ["PT3600S"], ["PT3601S", "PT1H"]),
        (pydantic.PastDate, {}, ["2024-02-29"], ["9999-12-31"]),
        (pydantic.FutureDatetime, {}, ["9998-12-31T00:00:00Z"], ["2024-02-29T00:00:00"]),
        (pydantic.AwareDatetime, {}, ["2024-02-29T00:00:00.5+02:00"], ["2024-02-29T00:00:00"]),
        (pydantic.NaiveDatetime, {}, ["2024-02-29T00:00:00"], ["2024-02-29T00:00:00Z"]),
    ],
)
def test_bounds_of_a_type(
    kind: Any, limits: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    class Held(pydantic.BaseModel):
        value: kind = pydantic.Field(**limits)

    own = {n: v for n, v in schema_of(Held)["properties"]["value"].items() if n != "title"}
    pattern = bare_pattern(own)
    assert pattern is not None
    for text in good:
        assert re.fullmatch(pattern, text)
        Held.model_validate({"value": text})
    assert not any(re.fullmatch(pattern, text) for text in bad)


def test_bounds_that_leave_nothing_are_an_error() -> None:
    with pytest.raises(ValueError, match="no value keeps to"):
        bounds.limits({"gt": 5, "lt": 6}, int, 1, 0, 9)
