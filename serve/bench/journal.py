"""bench.json while it is being written: every pass is on the disk as soon as it is measured.

A server may die, a disk fill up, a user press Ctrl-C, and what was measured in an hour must stay. So the result file
is written after every pass, with `"state": "partial"` until all rounds are there, and the same command goes on where
it stopped. It goes on only with the same settings on the same kind of machine: results of two set-ups are never mixed.
A block (the passes that are compared with each other) that was cut short is measured again as a whole; the passes that
are dropped for it are counted.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vocabext.errors import OutputExistsError, UsageError
from vocabext.files.atomic import read_object, write_json
from vocabext.serve.bench.answers import AnswerPlan
from vocabext.serve.bench.client import Load
from vocabext.serve.bench.scenarios import Point

FORMAT_VERSION = 2
PARTIAL, COMPLETE = "partial", "complete"
PLACE_NAMES = ("base", "expanded", "base again")

Step = tuple[int, int, Point]


@dataclass(frozen=True)
class Pass:
    """One point, measured once on one server; bench.json calls it a run.

    Attributes:
        round: Counted from 0.
        place: 0, 1, 2: base, expanded, base again.
        point: What was asked of the server.
        load: What was measured; its `texts` are not kept in the file.
    """

    round: int
    place: int
    point: Point
    load: Load

    @property
    def step(self) -> Step:
        """Which pass it is: (round, place, point)."""
        return self.round, self.place, self.point

    def to_json(self) -> dict[str, Any]:
        """Return the pass as it stands in bench.json."""
        values = asdict(self.load)
        values.pop("texts")
        return {"round": self.round + 1, "role": PLACE_NAMES[self.place], **asdict(self.point), **values}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Pass":
        """Read a pass back."""
        lists = {name: tuple(row[name]) for name in ("request_seconds", "ttft_seconds", "output_characters",
                                                     "prompt_tokens", "output_tokens", "errors")}
        load = Load(duration_seconds=float(row["duration_seconds"]), texts=(), **lists)
        point = Point(row["scenario"], row["concurrency"], row["request_rate"])
        return cls(int(row["round"]) - 1, PLACE_NAMES.index(row["role"]), point, load)


class Journal:
    """The passes of a comparison, kept in a file.

    Attributes:
        passes: What has been measured.
        failures: What went wrong on the way, one record each.
        dropped: How many passes were dropped, and measured again.
        answers: The `max_tokens` of each role and scenario.
        notes: What else was found out on the way.
        resumed: How often the comparison was taken up again.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Begin with nothing; the file is written with the first pass."""
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.passes: list[Pass] = []
        self.failures: list[dict[str, Any]] = []
        self.dropped = 0
        self.answers: dict[str, dict[str, AnswerPlan]] = {}
        self.notes: dict[str, Any] = {}
        self.resumed = 0

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any], *, force: bool = False) -> "Journal":
        """Take up a partial result of the same settings, or begin anew; with `force`, begin anew whatever is there.

        `settings` is what must be equal for two passes to be comparable, JSON-ready.

        Raises:
            OutputExistsError: If the file is there and is no partial result.
            UsageError: If it is a partial result of other settings.
        """
        journal = cls(path, settings)
        if force or not path.exists():
            return journal
        document = read_object(path) or {}
        if not is_partial(document):
            raise OutputExistsError(path)
        old = document["settings"] if isinstance(document.get("settings"), dict) else {}
        if document.get("version") != FORMAT_VERSION or old != journal.settings:
            raise UsageError(f"{path} holds a partial result of other settings ({_difference(old, journal.settings)}); "
                             "choose another output, or pass --force to begin anew")
        try:
            journal._take_up(document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{path} is damaged ({type(error).__name__}: {error}); choose another output, or pass "
                             "--force to begin anew") from None
        return journal

    def _take_up(self, document: Mapping[str, Any]) -> None:
        self.passes = [Pass.from_json(row) for row in document["runs"]]
        self.failures = list(document["failures"])
        self.dropped = int(document["dropped_runs"])
        self.answers = {role: {name: AnswerPlan(tuple(plan["tokens"]), tuple(plan["characters"]))
                               for name, plan in plans.items()} for role, plans in document["answers"].items()}
        self.notes = dict(document["notes"])
        self.resumed = int(document["resumed"]) + 1

    def keep_blocks(self, blocks: Sequence[Sequence[Step]]) -> None:
        """Drop the passes of blocks that are not complete."""
        have = {one.step for one in self.passes}
        whole = {step for block in blocks if have.issuperset(block) for step in block}
        kept = [one for one in self.passes if one.step in whole]
        self.dropped += len(self.passes) - len(kept)
        self.passes = kept

    def has(self, *step: *Step) -> bool:
        """Tell whether a pass has been measured."""
        return any(one.step == step for one in self.passes)

    def save(self) -> None:
        """Write what there is, as a partial result."""
        write_json(self.path, self.to_json(PARTIAL))

    def to_json(self, state: str) -> dict[str, Any]:
        """Return what the journal knows, JSON-ready."""
        return {
            "artifact": "bench", "version": FORMAT_VERSION, "state": state, "settings": self.settings,
            "failures": self.failures, "dropped_runs": self.dropped, "resumed": self.resumed,
            "answers": {role: {name: asdict(plan) for name, plan in plans.items()}
                        for role, plans in self.answers.items()},
            "notes": self.notes, "runs": [one.to_json() for one in self.passes],
        }


def is_partial(document: Any) -> bool:
    """Tell whether a JSON document is a bench.json that was cut short."""
    return isinstance(document, dict) and document.get("artifact") == "bench" and document.get("state") == PARTIAL


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name the first setting that differs, with both values."""
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            return _difference(before, after)
        return f"{name} was {json.dumps(before)[:80]}, now it is {json.dumps(after)[:80]}"
    return "its format"
