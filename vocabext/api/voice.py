"""Where a call reports progress and remarks, and how its messages name options.

Stages write options as a shell does (`--min-count`), and the command line shows that. A Python caller reads the name of
the parameter (`min_count`), gets remarks from the logger `vocabext`, and bars in a notebook.
"""

import difflib
import functools
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from vocabext.errors import ServerError, VocabextError
from vocabext.options import STAGES, HealConfig, fields_of
from vocabext.progress import Pace, Progress, Task, no_progress

P = ParamSpec("P")
R = TypeVar("R")

LOGGER = logging.getLogger("vocabext")
# `python_names` writes SWITCHES with True or False, PARAMETERS by their name, and RENAMED ones by their name in Python.
SWITCHES = {"force", "full", "merge", "trust_remote_code", "untie", "vllm", "skip_weights",
            *(field.name for field in fields_of(*STAGES).values() if isinstance(field.default, bool))}
PARAMETERS = {"base", "corpus", "general", "heldout", "link", "model", "output", "text_field", "work",
              *fields_of(*STAGES, HealConfig)}
RENAMED = {"against": "base"}
# `python_names` replaces NO_PATH in the error about a path that is not there: a Python caller may also pass text.
NO_PATH, NO_TEXT = "or OWNER/NAME:SPLIT)", "or OWNER/NAME:SPLIT, a text in memory vocabext.Document(NAME, TEXT))"
OPTION = re.compile(r"--([a-z][a-z-]*[a-z])(?: (distill|mean|fit|zero|none|input|cpu|auto|hard|copy)\b)?")


@dataclass(frozen=True)
class Voice:
    """Where a call reports.

    Attributes:
        progress: Shows how far long work is.
        say: Told what a user should know, a line at a time.
        spell: Turns the options in a line into what the caller knows them by.
    """

    progress: Progress
    say: Callable[[str], None]
    spell: Callable[[str], str]

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Let errors name options as the caller knows them."""
        try:
            yield
        except ServerError:
            raise  # its text is the log of another program, whose options are not ours
        except VocabextError as error:
            error.args = tuple(self.spell(part) if isinstance(part, str) else part for part in error.args)
            raise


def python_names(line: str) -> str:
    """Write options as the parameters that they are in Python: `--min-count` becomes `min_count`."""

    def name(found: re.Match[str]) -> str:
        option, value = found[1].replace("-", "_"), found[2]
        option = RENAMED.get(option, option)
        if option in SWITCHES:
            return f"{option}=True"
        if option.removeprefix("no_") in SWITCHES:
            return f"{option.removeprefix('no_')}=False"
        if option not in PARAMETERS:
            return found[0]
        return f"{option}={value!r}" if value else option

    return OPTION.sub(name, line).replace(NO_PATH, NO_TEXT)


def python_voice(verbose: bool | None = None) -> Voice:
    """Return the voice for a Python caller.

    Args:
        verbose: Show progress bars; None shows them in notebooks only.
    """
    shown = _in_notebook() if verbose is None else verbose
    return Voice(_bar if shown else no_progress, lambda line: LOGGER.warning(python_names(line)), python_names)


def spelled(method: Callable[P, R]) -> Callable[P, R]:
    """Let the errors of a method name options as its voice does; without a voice, as Python's parameters."""
    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        voice = getattr(args[0], "voice", None) if args else None
        with (voice if isinstance(voice, Voice) else python_voice(verbose=False)).errors():
            return method(*args, **kwargs)

    return call


# -- options ------------------------------------------------------------------------------------------------------

def takes(*stages: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Show the options of stages in the signature of a function that takes them as `**options`."""
    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        known = {p.name for p in own}
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
                for name, field in fields_of(*stages).items() if name not in known]
        signature = inspect.signature(function)
        function.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return function

    return decorate


def check_names(options: Mapping[str, object], *stages: type) -> None:
    """Check that keywords are options of the stages.

    Raises:
        TypeError: If one is not; says which option was probably meant.
    """
    known = fields_of(*stages)
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"
            raise TypeError(f"there is no option {name!r}; {hint}")


# -- progress -----------------------------------------------------------------------------------------------------

def _in_notebook() -> bool:
    """Tell whether this process is a kernel of Jupyter."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return "IPKernelApp" in getattr(shell, "config", {})


class _BarTask:
    def __init__(self, bar: Any, pace: Pace) -> None:
        self._bar, self._pace = bar, pace

    def advance(self, amount: int = 1, /) -> None:
        self._pace.advance(amount)
        self._bar.update(amount)

    def skip(self, amount: int, /) -> None:
        self._pace.skip(amount)
        self._bar.total = self._pace.total

    def note(self, text: str, /) -> None:
        self._bar.set_postfix_str(text)


@contextmanager
def _bar(description: str, /, total: int | None = None, unit: str = "") -> Iterator[Task]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm asks for ipywidgets; without, it shows a bar of text
        from tqdm.auto import tqdm
    pace = Pace(total)

    class Bar(tqdm):
        @property
        def format_dict(self) -> dict[str, Any]:
            return {**super().format_dict, "rate": pace.rate or None}

    with Bar(desc=description, total=total, unit=f" {unit}" if unit else "it") as bar:
        yield _BarTask(bar, pace)
