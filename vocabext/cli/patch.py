"""`vocabext patch`: write a new model folder with the new tokens and rows."""

from pathlib import Path

import click

from vocabext.cli import options, show
from vocabext.files.links import AUTO, LINKS


@click.command()
@click.argument("rows", type=click.Path(path_type=Path), metavar="ROWS")
@options.model_option
@options.output_option
@options.force_option
@click.option("--link", type=click.Choice(LINKS), default=AUTO, show_default=True,
              help="How weights that stay as they are come into the new folder. `auto` shares their bytes where the "
                   "file system can (reflink, else hard link) and copies them elsewhere; `hard` insists on hard "
                   "links. A hard-linked file must not be edited in place: it is the base's file, too.")
@click.option("--untie", is_flag=True,
              help="Give a tied model an output head of its own. Done without being asked where ROWS has output rows "
                   "that differ from the input rows.")
@options.trust_remote_code_option
@options.json_option
def patch(rows: Path, model: str, output: Path, force: bool, link: str, untie: bool, trust_remote_code: bool,
          as_json: bool) -> None:
    """Write a new model folder: MODEL with the tokens and rows of ROWS (from `vocabext distill`).

    The new folder loads in plain transformers and plain vLLM. Rows in use are kept bit for bit, new rows take
    free rows first, and every other file is carried over. vocabext.json says what was made from what, and with
    vocabext_base/ `vocabext revert` gets MODEL back. Weights are never loaded; the folder appears when it is whole.
    """
    from vocabext.api.model import Model

    result = Model(model, trust_remote_code=trust_remote_code, voice=show.voice()).patch(
        rows, output, force=force, link=link, untie=untie).patched
    assert result is not None  # it was made just now

    def render() -> None:
        linked = f", {result.num_linked} of them as {result.links}s" if result.num_linked else ""
        last = result.first_new_id + result.num_new - 1
        show.table([
            ("new tokens", f"{result.num_new:,} (ids {result.first_new_id} to {last})"),
            *([("searched for in text", f"{result.num_searched:,} of them, whose parts are no tokens")]
              if result.num_searched else []),
            ("rows", f"{result.num_rows_before:,} before, {result.num_rows:,} now"),
            ("head rows", result.head_rows),
            ("carried over", f"{len(result.files.carried_over)} files" + linked),
            ("rewritten", ", ".join(result.files.rewritten)),
            ("left out", "; ".join(f"{name} ({why})" for name, why in result.files.left_out.items()) or "nothing"),
            ("size", f"{result.folder_bytes:,} bytes"),
            ("written", f"{result.bytes_written:,} bytes in {result.seconds:.1f} s"),
        ], ("", str(output)))

    show.emit(result, as_json, render)
