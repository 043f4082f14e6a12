"""Dates, times and durations between bounds, as regular expressions.

Bounds count whole seconds, and both ends are within.
"""

from __future__ import annotations

import calendar
import datetime
from collections.abc import Callable, Mapping
from typing import Any

DAY = 86_400
"""In seconds."""
SECOND = 1_000_000
"""In microseconds."""
_ANY_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
_COMMON_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)


def limits(
    schema: Mapping[str, Any], exact: Callable[[Any], int], step: int, least: int, most: int
) -> tuple[int, int]:
    """The first and the last step that ``ge``, ``gt``, ``le`` and ``lt`` leave.

    Args:
        schema: pydantic's core schema of the type.
        exact: A bound as a number.
        step: What of that number is one step.
        least, most: Steps that there are without bounds.

    Raises:
        ValueError: None is left.
    """
    given = {n: exact(schema[n]) for n in ("ge", "gt", "le", "lt") if schema.get(n) is not None}
    first, last = [least], [most]
    for name, bound in given.items():
        up = -(-bound // step)
        (first if name in ("ge", "gt") else last).append(
            {"ge": up, "gt": bound // step + 1, "le": bound // step, "lt": up - 1}[name]
        )
    if max(first) > min(last):
        raise ValueError(f"no value keeps to {given}")
    return max(first), min(last)


def exact(time: datetime.datetime | datetime.time | datetime.timedelta) -> int:
    """Microseconds: since midnight, or since the day 0 in UTC, or of a duration."""
    if isinstance(time, datetime.timedelta):
        return time // datetime.timedelta(microseconds=1)
    if isinstance(time, datetime.datetime) and time.tzinfo is not None:
        time = time.astimezone(datetime.UTC)
    seconds = time.hour * 3600 + time.minute * 60 + time.second
    if isinstance(time, datetime.datetime):
        seconds += time.toordinal() * DAY
    return seconds * SECOND + time.microsecond


def dates(first: datetime.date, last: datetime.date) -> str:
    """Dates as ``YYYY-MM-DD``."""
    if first.year == last.year:
        return _of_year(first, last)
    parts = [
        _of_year(first, datetime.date(first.year, 12, 31)),
        _of_year(datetime.date(last.year, 1, 1), last),
    ]
    between = range(first.year + 1, last.year)
    if between:
        parts.append(f"{numbers(between[0], between[-1], 4)}-{_COMMON_DAY}")
    if leap := [f"{year:04}" for year in between if calendar.isleap(year)]:
        parts.append(f"(?:{'|'.join(leap)})-02-29")
    return _one_of(parts)


def _of_year(first: datetime.date, last: datetime.date) -> str:
    months = []
    for month in range(first.month, last.month + 1):
        begin = first.day if month == first.month else 1
        end = last.day if month == last.month else calendar.monthrange(first.year, month)[1]
        months.append(f"{month:02}-{numbers(begin, end, 2)}")
    return f"{first.year:04}-{_one_of(months)}"


def clocks(first: int, last: int, unit: int = 3600) -> str:
    """Times of day as ``HH:MM:SS``, by their seconds since midnight."""
    if unit == 1:
        return numbers(first, last, 2)
    (begin, after), (end, until) = divmod(first, unit), divmod(last, unit)
    if begin == end:
        return f"{begin:02}:{clocks(after, until, unit // 60)}"
    parts = [
        f"{begin:02}:{clocks(after, unit - 1, unit // 60)}",
        f"{end:02}:{clocks(0, until, unit // 60)}",
    ]
    if end - begin > 1:
        parts.append(f"{numbers(begin + 1, end - 1, 2)}:{clocks(0, unit - 1, unit // 60)}")
    return _one_of(parts)


def date_times(first: int, last: int) -> str:
    """Days and times as ``YYYY-MM-DDTHH:MM:SS``, by their seconds since the day 0."""
    (begin, after), (end, until) = divmod(first, DAY), divmod(last, DAY)
    first_day, last_day = datetime.date.fromordinal(begin), datetime.date.fromordinal(end)
    if begin == end:
        return f"{first_day}T{clocks(after, until)}"
    parts = [f"{first_day}T{clocks(after, DAY - 1)}", f"{last_day}T{clocks(0, until)}"]
    if end - begin > 1:
        inner = (datetime.date.fromordinal(day) for day in (begin + 1, end - 1))
        parts.append(f"{dates(*inner)}T{_ANY_CLOCK}")
    return _one_of(parts)


def durations(first: int, last: int) -> str:
    """Durations as ``PT90S``, by their seconds."""
    parts = [f"PT{_of_any_length(max(first, 0), last)}S"] if last >= 0 else []
    if first < 0:
        parts.append(f"-PT{_of_any_length(max(-last, 1), -first)}S")
    return _one_of(parts)


def _of_any_length(first: int, last: int) -> str:
    parts = []
    for width in range(len(str(first)), len(str(last)) + 1):
        least = 10 ** (width - 1) if width > 1 else 0
        parts.append(numbers(max(first, least), min(last, 10**width - 1), width))
    return _one_of(parts)


def numbers(first: int, last: int, width: int) -> str:
    """Numbers of so many digits, with zeros in front."""
    return _digits(f"{first:0{width}}", f"{last:0{width}}")


def _digits(low: str, high: str) -> str:
    if not low:
        return ""
    rest = len(low) - 1
    if low[0] == high[0]:
        return low[0] + _digits(low[1:], high[1:])
    if low[1:] == "0" * rest and high[1:] == "9" * rest:
        return f"[{low[0]}-{high[0]}]" + "[0-9]" * rest
    parts = [low[0] + _digits(low[1:], "9" * rest), high[0] + _digits("0" * rest, high[1:])]
    if int(high[0]) - int(low[0]) > 1:
        parts.append(f"[{int(low[0]) + 1}-{int(high[0]) - 1}]" + "[0-9]" * rest)
    return _one_of(parts)


def _one_of(parts: list[str]) -> str:
    return f"(?:{'|'.join(parts)})"
