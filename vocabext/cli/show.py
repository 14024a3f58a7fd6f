"""What the verbs show: results on stdout, everything else on stderr."""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from vocabext.api.voice import Voice
from vocabext.progress import Pace, Task
from vocabext.tables import format_table as format_table  # part of what the verbs show
from vocabext.tables import visible

PLAIN_INTERVAL_SECONDS = 5.0
"""Where there is no terminal: the time between two lines of progress."""


def echo(text: str, *, err: bool = False) -> None:
    """Write to stdout or stderr, with control characters made visible: all output of the verbs goes through here."""
    click.echo(visible(text), err=err)


def note(message: str) -> None:
    """Write one line to stderr: a remark that is no result."""
    echo(message, err=True)


def emit(document: Any, as_json: bool, human_render: Callable[[], None]) -> None:
    """Write a verb's result to stdout: as one JSON document, or as `human_render` writes it with `table` and `echo`.

    JSON gets what `to_plain` makes of the result.
    """
    if as_json:
        echo(json.dumps(to_plain(document), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        human_render()


def to_plain(value: Any) -> Any:
    """Convert a result to values that every JSON reader accepts.

    Dataclasses become objects; paths, text; numpy's and torch's values, Python's; NaN and infinity, null.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and torch, which this module must not import
        return to_plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> None:
    """Write a table to stdout."""
    echo(format_table(rows, headers))


@contextmanager
def progress(description: str, /, total: int | None = None, unit: str = "") -> Iterator[Task]:
    """Show on stderr how far a piece of long work is: the `Progress` of every stage.

    A terminal gets a bar with rate and time left, anything else a plain line every few seconds and one at the end.
    `total` is None where nobody can know; `unit` is a plural.
    """
    with (_bar if sys.stderr.isatty() else _lines)(description, total, unit) as task:
        yield task


def voice() -> Voice:
    """Return what calls of the API report to from here: bars or lines on stderr, and options as they are typed."""
    return Voice(progress, note, str)


class PlainTask:
    """Progress as plain lines, for logs and pipes."""

    def __init__(
        self, description: str, total: int | None, unit: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._description, self._unit, self._clock = description, unit and f" {unit}", clock
        self._pace = Pace(total, clock)
        self._remark = ""
        self._last_line = clock()

    def advance(self, amount: int = 1, /) -> None:
        """Count `amount` units, and write a line if the last one is old enough."""
        self._pace.advance(amount)
        now = self._clock()
        if now - self._last_line >= PLAIN_INTERVAL_SECONDS:
            self._last_line = now
            left = self._pace.seconds_left
            self._write(self._count(), f"{_format_rate(self._pace.rate)}{self._unit}/s",
                        "" if left is None else f"{_format_seconds(left)} left")

    def skip(self, amount: int, /) -> None:
        """Take `amount` units out of the total."""
        self._pace.skip(amount)

    def note(self, text: str, /) -> None:
        """Set the remark that the next lines end with."""
        self._remark = text

    def close(self) -> None:
        """Write the last line."""
        self._write(f"{self._count()} in {_format_seconds(self._pace.seconds)}")

    def _write(self, *parts: str) -> None:
        note(f"{self._description}: {', '.join(filter(None, (*parts, self._remark)))}")

    def _count(self) -> str:
        done, total = self._pace.done, self._pace.total
        if not total or done == total:
            return f"{done:,}{self._unit}"
        return f"{done:,} of {total:,}{self._unit} ({done / total:.0%})"


def _format_rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _format_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


@contextmanager
def _lines(description: str, total: int | None, unit: str) -> Iterator[Task]:
    task = PlainTask(description, total, unit)
    yield task
    task.close()  # not after an error: the error is the last line then


@contextmanager
def _bar(description: str, total: int | None, unit: str) -> Iterator[Task]:
    # rich takes a tenth of a second to import: not before there is something to show
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Task as RichTask
    from rich.text import Text

    pace = Pace(total)

    class CountColumn(ProgressColumn):
        def render(self, task: RichTask) -> Text:
            of = "" if task.total is None else f"/{task.total:,.0f}"
            speed = f"  {_format_rate(pace.rate)}/s" if pace.done else ""
            return Text(f"{task.completed:,.0f}{of}{' ' + unit if unit else ''}{speed}")

    class LeftColumn(TimeElapsedColumn):
        def render(self, task: RichTask) -> Text:
            left = None if task.finished else pace.seconds_left
            return super().render(task) if left is None else Text(f"{_format_seconds(left)} left")

    class BarTask:
        def __init__(self, bar: Progress, task_id: TaskID) -> None:
            self._bar, self._task_id = bar, task_id

        def advance(self, amount: int = 1, /) -> None:
            pace.advance(amount)
            self._bar.advance(self._task_id, amount)

        def skip(self, amount: int, /) -> None:
            pace.skip(amount)
            self._bar.update(self._task_id, total=pace.total)

        def note(self, text: str, /) -> None:
            self._bar.update(self._task_id, remark=visible(text))

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), CountColumn(), LeftColumn(),
               TextColumn("{task.fields[remark]}", markup=False))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield BarTask(bar, bar.add_task(visible(description), total=total, remark=""))
