"""Which ids the files of a model folder name, and what they say about writing them.

A config may name ids that no tokenizer knows: an end of text behind the vocabulary, a place for an image. A new token
must not get such an id, or generation stops at it. And it must not hide from generation what a rule names:

- Generation compares each id that it writes with those that end a text, and with those that are suppressed or forced.
  It does not find an id inside a new token.
- It finds a run that is banned (`bad_words_ids`) or biased id by id. A token that holds the run, or begins or ends
  inside it, hides it.

`Rules.broken_by` says so, and such tokens are refused. To extend the bans by them instead would take an entry for every
way of writing the run, and a config that differs from the base's.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vocabext.checkpoint.architecture import with_inner
from vocabext.checkpoint.folder import CONFIG_NAME, read_json

GENERATION_NAME = "generation_config.json"
FILES = (CONFIG_NAME, GENERATION_NAME, "tokenizer_config.json", "processor_config.json", "*preprocessor_config.json",
         "added_tokens.json")
# Entries whose numbers are ids: `eos_token_id`, `image_token_index`, `bad_words_ids`, `boi_id`, `lang_to_id`, ...
ID_KEY = re.compile(r"(^|_)(tokens?|words|eos|bos|pad|unk|sep|cls|mask|start|stop|end|boi|eoi|boa|eoa|bov|eov"
                    r"|image|audio|video|vision|decoder|lang_to|task_to)_(ids?|index|indices|indexes)$|^(?!num_|max_|n_).*_token$")
ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "sequence_bias", "added_tokens_decoder")
# An id further behind the last row is a default that somebody forgot to change: it gets no row.
MAX_MISSING_ROWS = 256
MAX_LISTED = 5

# Ids that end a text, or are forced or suppressed at any place; ids that are suppressed at the beginning; whole runs.
ANYWHERE = ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id", "forced_decoder_ids", "suppress_tokens",
            "stop_token_ids", "stop_token_id")
FIRST = "begin_suppress_tokens"
RUNS = ("bad_words_ids", "sequence_bias")
STOPS = "stop_strings"


@dataclass(frozen=True)
class Rules:
    """What the files say about generation, in base ids, each with the file and entry that say it.

    Attributes:
        anywhere: Ids that no new token may hold: they end a text, or are suppressed or forced.
        first: Ids that no new token may begin with: they are suppressed at the beginning.
        runs: Runs of ids that are banned, or made more or less likely.
        stops: Texts that end a generation.
    """

    anywhere: dict[int, str] = field(default_factory=dict)
    first: dict[int, str] = field(default_factory=dict)
    runs: dict[tuple[int, ...], str] = field(default_factory=dict)
    stops: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many rules there are."""
        return len(self.anywhere) + len(self.first) + len(self.runs) + len(self.stops)

    def broken_by(self, text: str, run: Sequence[int]) -> str | None:
        """Say which rule a new token with this text and run would break; None if it breaks none."""
        for i in run:
            if i in self.anywhere:
                return f"holds the id {i}, which {self.anywhere[i]} names"
        if run[0] in self.first:
            return f"begins with the id {run[0]}, which {self.first[run[0]]} names"
        for banned, where in self.runs.items() if not self._in_runs.isdisjoint(run) else ():
            if _overlap(banned, run):
                return f"holds a part of the ids {list(banned)}, which {where} names"
        for stop, where in self.stops.items():
            if any(text[:end].endswith(stop) or stop.endswith(text[:end]) for end in range(1, len(text))):
                return f"goes on behind the text {stop!r}, which {where} names"
        return None

    @cached_property
    def _in_runs(self) -> frozenset[int]:
        return frozenset(i for run in self.runs for i in run)

    def describe(self) -> str:
        """Say in a line which rules no new token breaks."""
        found: dict[str, Mapping[Any, str]] = {
            "ids that no new token holds": self.anywhere, "ids that none begins with": self.first,
            "runs of ids that none overlaps": self.runs, "texts that none goes on behind": self.stops}
        return "; ".join(f"{len(some):,} {what} ({', '.join(sorted(set(some.values())))})"
                         for what, some in found.items() if some)

    def to_json(self) -> dict[str, Any]:
        """Return the rules as JSON-ready values."""
        return {"anywhere": {str(i): where for i, where in self.anywhere.items()},
                "first": {str(i): where for i, where in self.first.items()},
                "runs": [[*run] for run in self.runs], "stops": [*self.stops]}


def _overlap(banned: Sequence[int], run: Sequence[int]) -> bool:
    """Tell whether one run, shifted along the other, can agree with it wherever both have an id."""
    pairs = (zip(banned[max(0, shift) :], run[max(0, -shift) :], strict=False)
             for shift in range(1 - len(run), len(banned)))
    return any(all(one == other for one, other in both) for both in pairs)


@dataclass(frozen=True)
class NamedIds:
    """What the files of a folder say about ids.

    Attributes:
        where: The ids that they name, with file and entry.
        num_rows: Rows that config.json says there are; None if it says nothing.
        rules: Stops and bans of generation.
    """

    where: dict[int, str] = field(default_factory=dict)
    num_rows: int | None = None
    rules: Rules = field(default_factory=Rules)

    def reserved(self, num_own_ids: int) -> dict[int, str]:
        """Return the named ids behind the tokenizer's own; new tokens go behind them."""
        end = max(num_own_ids, self.num_rows or 0) + MAX_MISSING_ROWS
        return {i: where for i, where in sorted(self.where.items()) if num_own_ids <= i < end}

    def out_of_reach(self, num_own_ids: int) -> dict[int, str]:
        """Return the named ids so far behind all rows that neither they nor the ids before them get rows."""
        reserved = self.reserved(num_own_ids)
        return {i: where for i, where in sorted(self.where.items()) if i >= num_own_ids and i not in reserved}


def named_ids(folder: Path) -> NamedIds:
    """Read which ids the files of a folder name; the folder need not hold a model.

    Raises:
        CheckpointError: If one of the files is no JSON object.
    """
    documents = {path.name: read_json(path) for pattern in FILES for path in sorted(folder.glob(pattern))
                 if path.is_file()}
    sizes = [part.get("vocab_size") for part in reversed(with_inner(documents.get(CONFIG_NAME, {})))]
    num_rows = next((size for size in sizes if type(size) is int), None)
    where: dict[int, str] = {}
    for name, document in documents.items():
        entries = {"added tokens": [*document.values()]}.items() if name == "added_tokens.json" \
            else _id_entries(document, num_rows)
        for key, value in entries:
            for i in _ids(value):
                where.setdefault(i, f"{name}: {key}")
    return NamedIds(where, num_rows, _rules(documents, num_rows))


def listed(named: Mapping[int, str]) -> str:
    """Name ids in a line, with what they are; names the first of many and counts the rest."""
    shown = ", ".join(f"{i} ({what})" for i, what in [*named.items()][:MAX_LISTED])
    return shown + (f" and {len(named) - MAX_LISTED:,} more" if len(named) > MAX_LISTED else "")


def _id_entries(document: Mapping[str, Any], num_rows: int | None) -> Iterator[tuple[str, Any]]:
    """Yield all entries that name ids, at any depth."""
    for path, part in _parts(document, num_rows):
        for key, value in part.items():
            if ID_KEY.search(key) or key in ID_LISTS:
                yield f"{path}{key}", [*map(_as_id, value)] if key == "added_tokens_decoder" else value


def _as_id(key: object) -> object:
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _parts(document: Mapping[str, Any], num_rows: int | None, path: str = ""
           ) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield an object and the objects in it, but not a nested config that has a vocabulary of its own."""
    yield path, document
    for key, value in document.items():
        if isinstance(value, dict) and not (key != "text_config" and value.get("vocab_size") not in (None, num_rows)):
            yield from _parts(value, num_rows, f"{path}{key}.")


def _ids(value: Any) -> Iterator[int]:
    """Yield the numbers in a value that can be ids (some files say 290.0); -1 and null mean that there is none."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _ids(item)
    elif type(value) in (int, float) and value >= 0 and float(value).is_integer():
        yield int(value)


def _rules(documents: Mapping[str, Mapping[str, Any]], num_rows: int | None) -> Rules:
    rules = Rules()
    for name in (CONFIG_NAME, GENERATION_NAME):
        for path, part in _parts(documents.get(name, {}), num_rows):
            said = f"{name}: {path}"
            for key in ANYWHERE:
                value = part.get(key)
                if key == "forced_decoder_ids" and isinstance(value, list):  # pairs of a place and an id
                    value = [pair[-1] for pair in value if isinstance(pair, list) and pair]
                rules.anywhere.update({i: said + key for i in _ids(value) if i not in rules.anywhere})
            rules.first.update({i: said + FIRST for i in _ids(part.get(FIRST)) if i not in rules.first})
            for key in RUNS:
                rules.runs.update({run: said + key for run in _runs(part.get(key), key) if run not in rules.runs})
            stops = part.get(STOPS) or []
            rules.stops.update({stop: said + STOPS for stop in ([stops] if isinstance(stops, str) else stops)
                                if isinstance(stop, str) and stop and stop not in rules.stops})
    return rules


def _runs(value: Any, key: str) -> Iterator[tuple[int, ...]]:
    """Yield the runs of `bad_words_ids` ([run, ...]) or `sequence_bias` ([[run, bias], ...])."""
    for entry in value if isinstance(value, list) else []:
        run = entry[0] if key == "sequence_bias" and isinstance(entry, list) and len(entry) == 2 else entry
        if isinstance(run, list) and (found := tuple(_ids(run))):
            yield found
