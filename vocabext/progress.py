"""How a stage tells the outside how far it is, without knowing who listens.

A stage takes `progress: Progress = no_progress` and writes

    with progress("reading the corpus", total, "documents") as task:
        for document in documents:
            ...
            task.advance()

The command line passes `vocabext.cli.show.progress`; a program that calls the stage passes
nothing, or its own.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Task(Protocol):
    """One piece of long work that is under way."""

    def advance(self, amount: int = 1, /) -> None:
        """Report that `amount` more units are done."""

    def note(self, text: str, /) -> None:
        """Replace the short remark shown beside the count, such as the loss."""


class Progress(Protocol):
    """Opens a `Task`; it ends with the `with` block."""

    def __call__(
        self, description: str, /, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[Task]:
        """Start a task.

        Args:
            description: What is being done, such as `"reading the corpus"`.
            total: How many units there are, or None where nobody can know.
            unit: What is counted, in the plural, such as `"documents"`.
        """


class _SilentTask:
    """A task that nobody watches."""

    def advance(self, amount: int = 1, /) -> None:
        """Do nothing."""

    def note(self, text: str, /) -> None:
        """Do nothing."""


def no_progress(description: str, /, total: int | None = None, unit: str = "") -> AbstractContextManager[Task]:
    """Start a task that reports nothing: the default of every stage."""
    return nullcontext(_SilentTask())
