"""What a long benchmark has done already, kept in a folder, so that it can be measured in several sittings.

A folder belongs to one set of options and one machine: whatever was kept under others is refused, not mixed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vocabext.distill import DistillResult
from vocabext.files.atomic import write_json
from vocabext.files.jsonl import read_jsonl, write_jsonl
from vocabext.tokens import TokenSnippets


@dataclass(frozen=True)
class Made:
    """What ours reports of a run.

    Attributes:
        layer: The layer that was matched.
        relative_error: Error on the tokens' own held-out snippets, as a share of the mean's.
        shown: How many snippets each token was shown, repetitions included.
        at_start: How many tokens keep a row that nothing was trained into.
        left_out: How many would be left out of a checkpoint.
        stated_bytes: Memory that was stated before the work, the model included.
    """

    layer: int
    relative_error: float | None
    shown: Sequence[int]
    at_start: int
    left_out: int
    stated_bytes: int | None = None

    @classmethod
    def of(cls, result: DistillResult) -> "Made":
        """Read it off a result."""
        return cls(result.layer, result.relative_error, [report.shown for report in result.reports],
                   sum(report.method != "distill" for report in result.reports),
                   sum(report.left_out is not None for report in result.reports),
                   None if result.memory is None else result.memory.total_bytes)


@dataclass(frozen=True)
class Run:
    """Rows that somebody made, and what they cost.

    Attributes:
        name: Who, and with which budget.
        seconds: Wall time.
        cpu_seconds: Processor time of all threads.
        dtype: What the model computed in.
        input_ND: Input rows.
        output_ND: Output rows; None where the input rows are that too.
        memory: Most memory in use, and how much of it was in use before the model was loaded; None if not watched.
        made: What ours reports; None for the reference.
    """

    name: str
    seconds: float
    cpu_seconds: float
    dtype: str
    input_ND: torch.Tensor
    output_ND: torch.Tensor | None = None
    memory: tuple[int, int] | None = None
    made: Made | None = None


class Kept:
    """A folder of what is done; without one, nothing is kept.

    Raises:
        SystemExit: If the folder was begun with other options, or on another machine.
    """

    def __init__(self, folder: Path | None, facts: Mapping[str, Any]) -> None:
        """Open the folder.

        Args:
            folder: Where; made if it is not there. None keeps nothing.
            facts: What must not change from one sitting to the next; JSON-ready.
        """
        self._folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        known = self.value("facts", lambda: dict(facts))
        for key, value in facts.items():
            if known.get(key) != value:
                raise SystemExit(f"{folder} was begun with {key} {known.get(key)}, not {value}; take another folder")

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a JSON value, made now if it is not kept."""
        if self._folder is None:
            return make()
        path = self._folder / f"{name}.json"
        if not path.is_file():
            write_json(path, make())
        return json.loads(path.read_text())

    def records(self, make: Callable[[], list[TokenSnippets]]) -> list[TokenSnippets]:
        """Return the tokens with their snippets, made now if they are not kept."""
        if self._folder is None:
            return make()
        path = self._folder / "snippets.jsonl"
        if not path.is_file():
            write_jsonl(path, "snippets", {}, [record.to_json() for record in make()])
        return [TokenSnippets.from_json(row) for row in read_jsonl(path, ("snippets",))[1]]

    def runs(self, name: str, make: Callable[[], list[Run]]) -> list[Run]:
        """Return runs that belong together, made now if they are not kept."""
        if self._folder is None:
            return make()
        path = self._folder / f"{name.replace('/', '_')}.json"
        if not path.is_file():
            runs = make()
            tensors = {f"{index}.{side}": rows.contiguous().clone() for index, run in enumerate(runs)
                       for side in ("input_ND", "output_ND") if (rows := getattr(run, side)) is not None}
            save_file(tensors, path.with_suffix(".safetensors"))
            write_json(path, [{**{key: value for key, value in vars(run).items() if not key.endswith("_ND")},
                               "made": run.made and asdict(run.made)} for run in runs])
        rows = load_file(path.with_suffix(".safetensors"))
        return [Run(**{**facts, "memory": facts["memory"] and tuple(facts["memory"]),
                       "made": facts["made"] and Made(**facts["made"])},
                    input_ND=rows[f"{index}.input_ND"], output_ND=rows.get(f"{index}.output_ND"))
                for index, facts in enumerate(json.loads(path.read_text()))]
