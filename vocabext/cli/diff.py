"""`vocabext diff`: what an expansion has changed, in a page."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vocabext.cli import options, show

if TYPE_CHECKING:
    from vocabext.diff import Cut, Difference

CUT = "|"  # between two tokens


@click.command()
@click.argument("base", metavar="BASE")
@click.argument("expanded", type=click.Path(path_type=Path), metavar="EXPANDED")
@click.option("--tokens", "num_tokens", type=click.IntRange(min=0), default=10, show_default=True,
              help="How many new tokens to show; --json holds all.")
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="A text to show as both cut it. Repeatable.")
@options.trust_remote_code_option
@options.json_option
def diff(
    base: str, expanded: Path, num_tokens: int, texts: tuple[str, ...], trust_remote_code: bool, as_json: bool
) -> None:
    """Show what EXPANDED has that BASE has not: files, tensors, rows, and tokens with their runs.

    BASE is a folder or hub id, EXPANDED a folder that `vocabext patch` made from it. All bytes are compared; whether
    the differences are sound is for `vocabext verify` to say.
    """
    from vocabext.diff import diff as run_diff

    found = run_diff(base, expanded, texts, trust_remote_code=trust_remote_code, progress=show.progress)
    show.emit(found, as_json, lambda: _render(found, num_tokens))


def _render(found: "Difference", num_tokens: int) -> None:
    show.echo(f"{found.expanded}: {found.base} and {found.rows.num_new:,} new tokens "
               f"(rows by {found.method}, made {found.created})")
    _render_files(found)
    _render_tensors(found)
    _render_tokens(found, num_tokens)
    for cut in found.examples:
        show.echo("")
        show.table([_cut_row("base", cut.before), _cut_row("expanded", cut.after)], ("", "tokens", "text"))


def _render_files(found: "Difference") -> None:
    from vocabext.diff import LINKED, SAME

    alike = [file for file in found.files if file.state in (SAME, LINKED)]
    linked = sum(file.state == LINKED for file in alike)
    show.echo(f"\n{len(alike):,} files are the same"
               f"{f', {linked:,} of them one file on the disk (hard links)' if linked else ''}")
    show.table([(file.name, file.state, file.bytes_before, file.bytes_after, file.reason) for file in found.files
                if file not in alike], ("file", "", "bytes before", "now", ""))
    for key, (before, after) in found.config.items():
        show.echo(f"config.json: {key} is {after!r}, was {before!r}")


def _render_tensors(found: "Difference") -> None:
    changed = sum(tensor.rows_after is not None for tensor in found.tensors)
    show.echo(f"\n{found.num_tensors - changed:,} of {found.num_tensors:,} tensors have the same bytes")
    show.table([(t.name, t.dtype, " x ".join(str(size) for size in t.width), t.rows_before, t.rows_after, t.note)
                for t in found.tensors], ("tensor", "type", "width", "rows before", "now", ""))
    rows = found.rows
    show.echo(f"\n{rows.num_new:,} new rows (ids {rows.first_id} to {rows.last_id}): {rows.num_free_taken:,} took "
               "free rows, "
               f"{rows.num_new - rows.num_free_taken:,} were added, with {rows.num_surplus:,} unused behind them")


def _render_tokens(found: "Difference", num_tokens: int) -> None:
    shown = found.tokens[:num_tokens]
    if not shown:
        return
    show.echo("")
    show.table([(str(t.token_id), repr(t.token), CUT.join(t.pieces), " ".join(map(str, t.run)), _example(t.example))
                for t in shown], ("id", "token", "pieces", "run", "example, now cut as"))
    if len(found.tokens) > len(shown):
        show.echo(f"and {len(found.tokens) - len(shown):,} more; --tokens or --json shows them")


def _example(cut: "Cut | None") -> str:
    return "none found" if cut is None else repr(CUT.join(cut.after))[1:-1]


def _cut_row(name: str, parts: tuple[str, ...]) -> tuple[str, int, str]:
    return name, len(parts), repr(CUT.join(parts))[1:-1]
