"""The options of every stage, checked when they are made.

A field's comment says what it means, in which unit, and why its default is what it is. Measurements
behind the defaults stand in docs/decisions/.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any, TypeVar, get_args, get_type_hints

from vocabext.errors import UsageError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


@dataclass(frozen=True)
class MineConfig:
    """Options of `mine`."""

    # How many new tokens to choose; None picks the knee of the curve of savings.
    budget: int | None = 1000
    # A token must occur this often: rarer ones save little, and their rows see too little text.
    min_count: int = 10
    # Longest phrase, in words or runs of punctuation.
    max_units: int = 5
    # Longest token, in characters: a longer one is boilerplate, not vocabulary.
    max_characters: int = 48
    # Words only, no phrases.
    words_only: bool = False
    # Count near-duplicate documents and repeated passages once.
    dedup: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require(self.budget is None or self.budget > 0, f"--budget is {self.budget}; it must be 'auto' or at least 1")
        _require(self.min_count >= 2, f"--min-count is {self.min_count}; it must be at least 2")
        _require(self.max_units >= 1, f"--max-units is {self.max_units}; it must be at least 1")
        _require(self.max_characters >= 2, f"--max-characters is {self.max_characters}; it must be at least 2")


@dataclass(frozen=True)
class CollectConfig:
    """Options of `collect`."""

    # Snippets per token; the paper's default is 100, the benchmarks were measured with 25.
    snippets: int = 25
    # Length of a snippet in base ids (the paper's 50).
    window: int = 50
    # Below this many, a token is listed as short of text.
    min_snippets: int = 8
    # Let the model write text for tokens that are short of it.
    generate_missing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require(self.snippets >= 2, f"--snippets is {self.snippets}; it must be at least 2, one of them is held out")
        _require(self.window >= 8, f"--window is {self.window}; it must be at least 8 base ids")
        _require(1 <= self.min_snippets <= self.snippets,
                 f"--min-snippets is {self.min_snippets}; it must lie between 1 and --snippets ({self.snippets})")


# Without a number of its own, `--max-loss` lets so many times the budget be mined.
CANDIDATES = 3.0


@dataclass(frozen=True)
class ChooseConfig:
    """Options of `choose`."""

    # Bits per byte that text may lose by new tokens; None fills the budget with tokens that bring a larger share of
    # the savings than of the loss.
    max_loss: float | None = None
    # Mine so many times the budget, and ship the best of them; None is 1 without a bound.
    candidates: float | None = None
    # Text kept from mining that the model reads to measure costs, in bytes; the curve is measured on as much.
    choice_bytes: int = 100_000
    # Longest piece of a document that the model reads at once, in base ids.
    context: int = 512
    # Spread the model over devices, such as `0=20GiB,cpu=60GiB`; None puts it on one.
    max_memory: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require(self.max_loss is None or 0 < self.max_loss < math.inf,
                 f"--max-loss is {self.max_loss}; it must be a number of bits per byte above 0")
        _require(self.candidates is None or 1 < self.candidates < math.inf,
                 f"--candidates is {self.candidates}; it must be a number above 1: how many times the budget is mined")
        _require(self.choice_bytes > 0, f"--choice-bytes is {self.choice_bytes}; it must be at least 1")
        _require(self.context >= 16, f"--context is {self.context}; it must be at least 16")
        _check_compute(self.device, self.dtype)

    @property
    def wanted(self) -> bool:
        """Whether `run` chooses at all."""
        return self.max_loss is not None or self.candidates is not None

    def num_candidates(self, budget: int) -> int:
        """Return how many tokens are mined for a budget."""
        return math.ceil(budget * (self.candidates or CANDIDATES))


METHODS = ("distill", "mean")
OUTPUT_ROWS = ("fit", "mean", "zero", "none", "input")
OBJECTIVES = ("runs", "text", "pieces")
DEVICE = r"auto|cpu|cuda(:\d+)?"
DTYPES = ("bfloat16", "float16", "float32")


def _check_compute(device: str, dtype: str) -> None:
    """Check what can be checked without looking at the machine."""
    _require(re.fullmatch(DEVICE, device) is not None,
             f"--device is {device!r}; it must be auto, cpu, cuda or cuda:N")
    _require(dtype in ("auto", *DTYPES), f"--dtype is {dtype!r}; it must be auto, {', '.join(DTYPES)}")


def _is_layer(target: str) -> bool:
    return target == "last" or re.fullmatch(r"[1-9]\d*|0?\.\d*[1-9]\d*|1\.0*", target) is not None


@dataclass(frozen=True)
class DistillConfig:
    """Options of `distill`."""

    # `distill` is Token Distillation; `mean` writes the mean of the pieces, the baseline.
    method: str = "distill"
    # Layer whose hidden states are matched: `last`, a number from 1, or a fraction of the depth.
    target_layer: str = "last"
    # Positions compared behind the token; None for all. The error lives near the token.
    reach: int | None = 8
    # Passes over the snippets at most; a token stops when its held-out snippets stop improving.
    epochs: int = 4
    # Rounds at most; the first sees 8 snippets of each token once, each further one twice as many. 1 is quick.
    rounds: int | None = None
    # Peak step size in units of the base embedding's root mean square.
    learning_rate: float = 0.2
    # For tied models: weight of not being written where the base would write something else; 0 is off.
    silence: float = 0.02
    # Output rows: `fit` makes the model write the new tokens, `none` keeps them silent, `mean` and `zero` are
    # baselines, and `input` shares the input rows (tied models) or leaves the choice to `patch`. None is `fit` where
    # the model can have such rows, and says so where it cannot; what was asked for is refused there.
    output_rows: str | None = None
    # Text that output rows are fitted to: base ids of snippets per token.
    writing_places: int = 200
    # Share of held-out places where a new token may be written and base writes something else: the rows with the best
    # adoption within it are taken.
    false_use: float = 0.01
    # Leave a token out if its held-out error is this many times the median's, and training did not halve it;
    # 0 keeps all.
    leave_out: float = 5.0
    # Memory for what is kept of a group of tokens, in GiB; None takes an eighth of the device's memory.
    cache_gib: float | None = None
    # Spread the model over devices, such as `0=20GiB,cpu=60GiB`; None puts it on one.
    max_memory: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require(self.method in METHODS, f"--method is {self.method!r}; it must be one of {', '.join(METHODS)}")
        _require(self.epochs >= 1, f"--epochs is {self.epochs}; it must be at least 1")
        _require(self.rounds is None or self.rounds >= 1, f"--rounds is {self.rounds}; it must be at least 1")
        _require(0 < self.learning_rate < math.inf,
                 f"--learning-rate is {self.learning_rate}; it must be a number above 0")
        _require(self.reach is None or self.reach >= 0, f"--reach is {self.reach}; it must be 'all' or at least 0")
        for name in ("silence", "leave_out"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"--{name.replace('_', '-')} is {value}; it must be a number from 0 on")
        _require(self.cache_gib is None or 0 <= self.cache_gib < math.inf,
                 f"--cache-gib is {self.cache_gib}; it must be a number from 0 on")
        _require(self.output_rows in (None, *OUTPUT_ROWS),
                 f"--output-rows is {self.output_rows!r}; it must be one of {', '.join(OUTPUT_ROWS)}")
        # The mean of the pieces makes no output rows, and `patch` then takes their mean.
        _require(self.method != "mean" or self.output_rows in (None, "mean", "input"),
                 f"--output-rows is {self.output_rows!r}, but --method is 'mean', which reads no text and makes no "
                 "output rows; leave the option out, or pass --method distill")
        _require(self.writing_places >= 1, f"--writing-places is {self.writing_places}; it must be at least 1")
        _require(0 < self.false_use < 1, f"--false-use is {self.false_use}; it must lie between 0 and 1")
        _require(_is_layer(self.target_layer), f"--target-layer is {self.target_layer!r}; it must be 'last', a number "
                                               "from 1 on, or a fraction such as 0.5")
        _check_compute(self.device, self.dtype)


@dataclass(frozen=True)
class EvalConfig:
    """Options of `eval`."""

    # Held-out text read, in bytes of UTF-8: enough for steady means, short enough for a coffee.
    max_bytes: int = 200_000
    # Longest piece of a document that the model reads at once, in base ids.
    context: int = 512
    # Prompts that base and expanded continue; 0 leaves writing unmeasured.
    prompts: int = 64
    # Length of each continuation in base tokens.
    continuation: int = 64
    # Spread the model over devices, such as `0=20GiB,cpu=60GiB`; None puts it on one.
    max_memory: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require(self.max_bytes > 0, f"--max-bytes is {self.max_bytes}; it must be at least 1")
        _require(self.context >= 16, f"--context is {self.context}; it must be at least 16")
        _require(self.prompts >= 0, f"--prompts is {self.prompts}; it must not be negative")
        _check_compute(self.device, self.dtype)


@dataclass(frozen=True)
class HealConfig:
    """Options of `heal`."""

    # Rank of the adapter; vLLM takes 8, 16, 32, 64, 128 and more, and serves it under --max-lora-rank.
    rank: int = 32
    # Text to learn from, in expanded ids, general text included.
    text: int = 400_000
    # Peak step size of the adapter.
    learning_rate: float = 1e-3
    # Peak step size of the rows, in units of the root mean square of the base embedding.
    row_rate: float = 0.04
    # Share of the text that is general, where some is given.
    general_share: float = 0.25
    # Expanded ids of a window, and windows of a step.
    window: int = 192
    batch: int = 2
    # What new tokens are compared with: `runs` takes the base's probability of each run, `text` what the text has,
    # `pieces` compares first pieces only.
    objective: str = "runs"
    # Held-out windows that choose what is kept.
    held_out: int = 16
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("rank", 1), ("window", 32), ("batch", 1), ("held_out", 1)):
            value = getattr(self, name)
            _require(value >= least, f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        for name in ("learning_rate", "row_rate"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"--{name.replace('_', '-')} is {value}; it must be a number above 0")
        _require(self.text >= self.window * self.batch,
                 f"--text is {self.text}; it must be at least one step, {self.window * self.batch} ids")
        _require(0 <= self.general_share < 1,
                 f"--general-share is {self.general_share}; it must be from 0 on and below 1")
        _require(self.objective in OBJECTIVES,
                 f"--objective is {self.objective!r}; it must be one of {', '.join(OBJECTIVES)}")
        _check_compute(self.device, self.dtype)


# ---- keywords ------------------------------------------------------------------------------------

STAGES: tuple[type, ...] = (MineConfig, CollectConfig, DistillConfig, ChooseConfig, EvalConfig)
# Words that the command line and messages have for the value None.
WORDS = {"budget": "auto", "reach": "all"}
Options = TypeVar("Options")


def fields_of(*stages: type) -> "dict[str, Field[Any]]":
    """Return the fields of the options of some stages by name; what several have is there once."""
    return {field.name: field for stage in stages for field in fields(stage)}


def pick(stage: type[Options], options: Mapping[str, Any]) -> Options:
    """Make the options of a stage from those of the keywords that are its own.

    Raises:
        TypeError: If a value is of another type than its option.
        UsageError: If a value is out of its range.
    """
    types = get_type_hints(stage)
    chosen = {name: options[name] for name in fields_of(stage) if name in options}
    for name, value in chosen.items():
        if WORDS.get(name) == value:
            chosen[name] = None
        else:
            _check_type(name, value, types[name])
    return stage(**chosen)


def _check_type(name: str, value: object, expected: Any) -> None:
    kinds = get_args(expected) or (expected,)
    accepted = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise TypeError(f"{name} is {value!r}, of type {type(value).__name__}; it must be {wanted}")
