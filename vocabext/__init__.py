"""Give a language model names for the words of your domain, without retraining it.

Names are imported when they are first used, so `import vocabext` is quick and loads neither torch nor transformers.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vocabext.api.expand import expand
    from vocabext.api.model import Expanded, Model, load
    from vocabext.api.results import ChosenTokens, Evaluation, NewRows, Snippets, TokenTable
    from vocabext.checkpoint.verdicts import Verification
    from vocabext.corpus import Document
    from vocabext.errors import VocabextError
    from vocabext.tokens import Expansion, NewToken, TokenSnippets

__version__: Final = "0.3.0"

__all__ = ["ChosenTokens", "Document", "Evaluation", "Expanded", "Expansion", "Model", "NewRows", "NewToken",
           "Snippets", "TokenSnippets", "TokenTable", "Verification", "VocabextError", "expand", "load"]

_HOMES = {
    "vocabext.api.expand": ("expand",),
    "vocabext.api.model": ("Expanded", "Model", "load"),
    "vocabext.api.results": ("ChosenTokens", "Evaluation", "NewRows", "Snippets", "TokenTable"),
    "vocabext.checkpoint.verdicts": ("Verification",),
    "vocabext.corpus": ("Document",),
    "vocabext.errors": ("VocabextError",),
    "vocabext.tokens": ("Expansion", "NewToken", "TokenSnippets"),
}


# OpenMP reads this when torch is loaded. Its threads wait for each other many times in a pass of a model; a thread that
# waits by spinning holds its core, and beside a busy neighbour the one that is waited for does not get to run.
# A setting of the user's own stays.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SET_FOR_TORCH: Final[dict[str, str]] = (
    {} if "torch" in sys.modules or any(name in os.environ for name in _WAITING) else {"OMP_WAIT_POLICY": "PASSIVE"})
os.environ.update(SET_FOR_TORCH)


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            found = globals()[name] = getattr(importlib.import_module(module), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
