"""Every error a user can cause or meet.

    VocabextError                exit 1   the work could not be done
    ├── UsageError               exit 2   the call or command line is wrong: a missing path, a bad value
    │   └── OutputExistsError    exit 2   the output is there already, and --force was not given
    ├── CorpusError              exit 1   the text cannot be read, or there is none
    ├── TokenizerError           exit 1   the tokenizer cannot be loaded or extended
    ├── CheckpointError          exit 1   the model folder is incomplete or contradicts itself
    │   └── UnsupportedError     exit 1   the model is of a kind that no tokens can be added to
    ├── MissingExtraError        exit 1   an optional dependency is not installed
    ├── ServerError              exit 1   a server did not start, or died
    └── BadCheckpointError       exit 3   `verify` ran and found a fault

A message says what is wrong, with the values that disagree, and what to do: one line, no trailing
full stop. It writes options as a shell does (`--min-count`); `vocabext.api` gives Python callers the
name of the parameter. Anything else that escapes (`AssertionError`, `KeyError`, ...) is a bug of ours.
"""

import errno
import os
from typing import ClassVar

# What torch, its devices, C++ and the linker say when there is no memory left.
NO_MEMORY = (os.strerror(errno.ENOMEM), "can't allocate memory", "out of memory", "std::bad_alloc",
             "can't start new thread", "failed to map segment")


class VocabextError(Exception):
    """The base of all errors that are reported as one line, without a traceback."""

    exit_code: ClassVar[int] = 1


class UsageError(VocabextError):
    """The call or command line is wrong: a path that is not there, an option out of its range."""

    exit_code = 2


class OutputExistsError(UsageError):
    """The output exists already and `--force` was not given."""

    def __init__(self, path: object) -> None:
        super().__init__(f"{path} exists already; choose another output, or pass --force to replace it")


class CorpusError(VocabextError):
    """The corpus cannot be read, or holds no text."""


class TokenizerError(VocabextError):
    """The tokenizer cannot be loaded, or cannot be extended without changing other text."""


class CheckpointError(VocabextError):
    """The model folder is incomplete, or its parts contradict each other."""


class UnsupportedError(CheckpointError):
    """The model is whole, but of a kind that no tokens can be added to: a classifier, an encoder-decoder."""


class MissingExtraError(VocabextError):
    """An optional dependency is needed and not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'vocabext[{extra}]'")


class ServerError(VocabextError):
    """A server did not become ready, or stopped while it was needed."""


class BadCheckpointError(VocabextError):
    """`verify` ran to its end and found at least one fault."""

    exit_code = 3


def in_one_line(error: BaseException, length: int = 300) -> str:
    """Return what a library's error says; advice to its Python callers as the option that does the same.

    Args:
        error: The error.
        length: At most so many characters.
    """
    said = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in said:
        return "it comes with code of its own; look at the code, and pass --trust-remote-code to run it"
    return said[:length]


def lacks_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it was made from, says that memory could not be had.

    Many libraries, and whoever turns their errors into lines about a model, would blame the model for the machine.
    """
    while error is not None:
        said = "" if isinstance(error, VocabextError) else str(error)  # ours may quote a server's log
        if isinstance(error, MemoryError) or any(words in said for words in NO_MEMORY):
            return True
        error = error.__cause__
    return False
