"""The `vocabext` command: its verbs, and how every way of ending becomes an exit code.

A verb's file is imported when the verb runs, so `vocabext --help` imports no torch. Errors leave
here as one line on stderr:

    VocabextError          the error's own exit code (see `vocabext.errors`)
    wrong usage            2
    a signal               128 + its number (Ctrl-C: 130); outputs are renamed into place last: none is half-written
    the system says no     1: a full disk, a limit, no memory, no permission
    reader of stdout gone  1, without a word
    anything else          a traceback: a bug of ours
"""

import difflib
import errno
import importlib
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import click

from vocabext import __version__
from vocabext.errors import ServerError, VocabextError, lacks_memory
from vocabext.tables import visible


class Verb(NamedTuple):
    """Where a verb lives, and its one line in `vocabext --help`."""

    target: str
    short_help: str


VERBS: Mapping[str, Verb] = {
    "inspect": Verb("vocabext.cli.inspect:inspect", "Show a model's rows, ids and tokenizer, and how it can grow."),
    "mine": Verb("vocabext.cli.mine:mine", "Find the words and phrases of a corpus that are worth a token."),
    "collect": Verb("vocabext.cli.collect:collect", "Sample snippets of a corpus for every new token."),
    "distill": Verb("vocabext.cli.distill:distill", "Train the rows of the new tokens; the model stays as it is."),
    "choose": Verb("vocabext.cli.choose:choose", "Choose the tokens that save most for what they cost."),
    "patch": Verb("vocabext.cli.patch:patch", "Write a new model folder with the new tokens and rows."),
    "heal": Verb("vocabext.cli.heal:heal", "Train an adapter that makes a body used to its new tokens."),
    "verify": Verb("vocabext.cli.verify:verify", "Prove that an expanded model still means what its base meant."),
    "diff": Verb("vocabext.cli.diff:diff", "Show what an expansion has changed: files, tensors, rows, tokens."),
    "revert": Verb("vocabext.cli.revert:revert", "Make the base again from an expanded model, byte for byte."),
    "eval": Verb("vocabext.cli.eval:evaluate", "Measure base, mean-of-pieces and distilled on held-out text."),
    "run": Verb("vocabext.cli.run:run", "Walk from a corpus to a verified model, skipping what is up to date."),
    "serve": Verb("vocabext.cli.serve:serve", "Serve base and expanded with vLLM, measure both, write a report."),
}


class LazyGroup(click.Group):
    """A group that imports a verb's module only when that verb is used."""

    def __init__(self, *args: Any, verbs: Mapping[str, Verb], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the verbs in the order in which they are used."""
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a verb."""
        if cmd_name not in self._verbs:
            return None
        module_name, _, attribute = self._verbs[cmd_name].target.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name:
                raise
            raise VocabextError(f"{cmd_name} is not part of this installation ({module_name} is missing)") from None
        command = getattr(module, attribute)
        assert isinstance(command, click.Command), f"{self._verbs[cmd_name].target} is no click command"
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb, or say which one was probably meant."""
        name = args[0]
        if name not in self._verbs and not name.startswith("-"):
            close = difflib.get_close_matches(name, self._verbs, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(self._verbs)}"
            raise click.UsageError(f"there is no verb {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of verbs without importing any of them."""
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.short_help) for name, verb in self._verbs.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; raise `_Stopped` on Ctrl-C, since click would write lines of its own."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Stopped("interrupted", 128 + signal.SIGINT) from None

    def main(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> NoReturn:
        """Run a command line to its end, and exit with its code."""
        kwargs["standalone_mode"] = False
        try:
            result = super().main(args, *rest, **kwargs)
            sys.stdout.flush()  # a full disk behind stdout must be an error, not a silent loss at exit
            code = result if isinstance(result, int) and not isinstance(result, bool) else 0
        except _Stopped as stopped:
            code = _fail(str(stopped), stopped.code)
        except click.exceptions.NoArgsIsHelpError as error:
            code = _fail(error.format_message(), error.exit_code)
        except BrokenPipeError:
            code = _fail("", 1)
        except Exception as error:
            line = one_line(error)
            if line is None:
                raise
            code = _fail(f"error: {line}", exit_code(error))
        sys.exit(code)


class _Stopped(BaseException):
    """A signal has asked the process to stop. It is no `Exception`, so that no `except Exception` swallows it."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def exit_code(error: BaseException) -> int:
    """Return the exit code for an error that ends the command."""
    if isinstance(error, VocabextError | click.ClickException):
        return error.exit_code
    return 1


def one_line(error: BaseException) -> str | None:
    """Say in one line what a user can do about an error.

    Returns:
        The line, or None for a bug of ours.
    """
    if lacks_memory(error):
        return _memory_line(error)
    if isinstance(error, ServerError):
        return str(error)  # its further lines are the end of the server's log
    if isinstance(error, VocabextError):
        return " ".join(str(error).split())
    if isinstance(error, click.ClickException):
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else None
        hint = f" (see '{path} --help')" if path else ""
        return " ".join(error.format_message().split()).rstrip(".") + hint
    return _operating_system_line(error)


def _operating_system_line(error: BaseException) -> str | None:
    """Say what the operating system refuses, if an error, or one that led to it, is such a refusal."""
    link: BaseException | None = error
    while link is not None:
        if (line := _refusal(link)) is not None:
            return line
        link = link.__cause__ or link.__context__
    # Any other OSError says what is wrong with the user's files. One that only led to `error` may have been handled.
    if not isinstance(error, OSError):
        return None
    text = error.strerror.lower() if error.strerror else " ".join(str(error).split())
    return f"{text}: {error.filename}" if error.filename else text or None


def _refusal(error: BaseException) -> str | None:
    """Say what the system lacks: space, memory, permission; None if the error is of another kind."""
    number = _error_number(error)
    where = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the device{where}; free some, or choose an output elsewhere"
    if number == errno.EFBIG:
        return (f"a file would become larger than it may be{where}; raise the limit (see `ulimit -f`), or choose an "
                "output on another file system")
    if number == errno.EIO:
        return f"the device failed{where}: {os.strerror(number).lower()}; check the disk, or use another one"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission{where}: {os.strerror(number).lower()}"
    return None


def _error_number(error: BaseException) -> int | None:
    """Return the system's number of an error; libraries wrap it into types of their own, and keep its text."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if os.strerror(errno.ENOSPC) in text:
        return errno.ENOSPC
    found = re.search(r"\(os error (\d+)\)", text)
    return int(found[1]) if found else None


def _memory_line(error: BaseException | None) -> str:
    """Say that memory is short, and how much was asked for where an error says that."""
    asked = ""
    while error is not None and not asked:
        found = re.search(r"allocate ([\d.]+ ?(?:bytes|[KMGTPE]i?B))", str(error))
        asked, error = f": {found[1]} were asked for" if found else "", error.__cause__
    return (f"not enough memory{asked}; free some, raise the limit (see `ulimit -v`), or use a machine or device with "
            "more")


def _fail(line: str, code: int) -> int:
    for stream in (sys.stderr, sys.stdout):
        try:
            if line and stream is sys.stderr:
                click.echo(visible(line), err=True)
            stream.flush()
        except OSError:  # reader or terminal are gone; without this, Python's own flush at exit fails, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


@click.group(
    cls=LazyGroup,
    verbs=VERBS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 ran and found a bad checkpoint.",
)
@click.version_option(__version__, prog_name="vocabext")
def cli() -> None:
    """Give a language model names for the words of your domain, without retraining it.

    A new token stands for a fixed run of the model's own tokens, so text without new tokens is
    untouched. The flow: mine, collect, distill, patch, verify, eval; `run` walks all of these. Then serve.
    """


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise _Stopped("terminated", 128 + number)


def main() -> NoReturn:
    """Run the `vocabext` command."""
    signal.signal(signal.SIGTERM, _stop)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # under `nohup`, SIGHUP is ignored and stays so
            signal.signal(number, _stop)
    # Libraries below us show bars and advice of their own; these switch them off, unless the user has set them.
    for name, value in {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():
        os.environ.setdefault(name, value)
    cli.main(prog_name="vocabext")
