"""Write the section "Tokenizers" of docs/benchmarks.md from the JSON: `python benchmarks/tokenizer_docs.py`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sections import DOCS, put_section

ROOT = Path(__file__).resolve().parent.parent
LENGTHS, SPEED = (ROOT / "benchmarks" / f"tokenizer_{name}.json" for name in ("lengths", "speed"))
TITLE = "## Tokenizers"
ABOUT = ("Tokens are mined from four fifths of the documents of a corpus; shown is by which share the other fifth gets "
         "shorter, with words only / with phrases. The invariant, equal decoded text and \"never longer\" are checked "
         "on all documents, with both sets of tokens.")
ABOUT_SPEED = ("Seconds of the extended tokenizer over seconds of its base, the median of {turns} turns on "
               "{kilobytes} kB of each text: text by text / as one batch. Above 1 is slower. Loading is reading the "
               "file tokenizer.json.")


def main() -> None:
    """Replace the section, or append it."""
    put_section(DOCS, section())


def section() -> str:
    """Render the section from what is committed."""
    found, speed = (json.loads(path.read_text(encoding="utf-8")) for path in (LENGTHS, SPEED))
    parts = [TITLE, "", "<!-- Written by benchmarks/tokenizer_docs.py from the JSON beside it. -->", "",
             "### How much shorter", "", ABOUT, "", *lengths(found["rows"], found["tokens"]), "", outcome(found), ""]
    if "machine" in speed:  # a file without it was measured by an earlier version of the code
        parts += ["### How fast", "", ABOUT_SPEED.format(turns=speed["turns"], kilobytes=speed["bytes"] // 1000), "",
                  *speeds(speed["rows"]), "", measured("tokenizer_speed.py", speed), ""]
    return "\n".join(parts)


def lengths(rows: Sequence[dict[str, Any]], wanted: int) -> list[str]:
    """Return a table of corpora by tokenizers; fewer tokens than wanted are said in brackets."""
    cells = {(row["corpus"], row["tokenizer"]): _shares(row, wanted) for row in rows}
    return _table("corpus", cells)


def speeds(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table of texts by tokenizers and numbers of new tokens, or by what else was added."""
    cells = {}
    for row in rows:
        shown = (f"{row['ratio']:.2f}" if row["text"] == "loading"
                 else f"{row['single_ratio']:.2f} / {row['batch_ratio']:.2f}")
        if row.get("way"):
            shown += f" (breaks {row['broken_documents']:.0%})" * (row["broken_documents"] > 0)
        cells[f"{row['tokenizer']}, {row.get('way') or format(row['tokens'], ',')}", row["text"]] = shown
    return _table("tokenizer, new tokens", cells)


def outcome(found: dict[str, Any]) -> str:
    """Say how many documents broke a promise."""
    broken = sum(sum(row["violations"].values()) for row in found["rows"])
    checked = sum(row["documents"] for row in found["rows"])
    return (f"Violations: **{broken:,}**, in {2 * checked:,} comparisons of a document. Up to {found['tokens']:,} "
            f"tokens that occur {found['min_count']} times or more. {measured('tokenizer_lengths.py', found)}")


def measured(script: str, found: dict[str, Any]) -> str:
    """Say how, where and when something was measured."""
    machine = found["machine"]
    return (f"Measured by `python benchmarks/{script}` on {machine['device']} with {machine['cpus']} cores, "
            f"{machine['date']}, tokenizers {found['libraries']['tokenizers']}.")


def _shares(row: dict[str, Any], wanted: int) -> str:
    return " / ".join(f"{share:.1%}" + f" ({count:,})" * (count < wanted)
                      for share, count in zip(row["shorter_shares"], row["tokens"], strict=True))


def _table(corner: str, cells: dict[tuple[str, str], str]) -> list[str]:
    """Return a table from its cells by row and column, in the order in which these come."""
    names, columns = dict.fromkeys(row for row, _ in cells), dict.fromkeys(column for _, column in cells)
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return [*lines, *(f"| {name} | " + " | ".join(cells.get((name, c), "") for c in columns) + " |" for name in names)]


if __name__ == "__main__":
    main()
