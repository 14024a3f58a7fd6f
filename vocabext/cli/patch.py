"""`vocabext patch`: write a new model folder with the new tokens and rows."""

from pathlib import Path

import click

from vocabext.cli import options, show


@click.command()
@click.argument("rows", type=click.Path(path_type=Path), metavar="ROWS")
@options.model_option
@options.output_option
@options.force_option
@options.trust_remote_code_option
@options.json_option
def patch(rows: Path, model: str, output: Path, force: bool, trust_remote_code: bool, as_json: bool) -> None:
    """Write a new model folder: MODEL with the tokens and rows of ROWS (from `vocabext distill`).

    The new folder loads in plain transformers and plain vLLM. Rows in use are kept bit for bit, new rows take
    free rows first, and every other file is carried over. vocabext.json says what was made from what.
    """
    from vocabext.patch import patch as run_patch

    result = run_patch(rows, model, output, force=force, trust_remote_code=trust_remote_code, progress=show.progress)

    def render() -> None:
        last = result.first_new_id + result.num_new - 1
        show.table([
            ("new tokens", f"{result.num_new:,} (ids {result.first_new_id} to {last})"),
            ("rows", f"{result.num_rows_before:,} before, {result.num_rows:,} now"),
            ("head rows", result.head_rows),
            ("carried over", f"{len(result.files.carried_over)} files"),
            ("rewritten", ", ".join(result.files.rewritten)),
            ("left out", ", ".join(result.files.left_out) or "nothing"),
            ("size", f"{result.bytes_written:,} bytes, written in {result.seconds:.1f} s"),
        ], ("", str(output)))

    show.emit(result, as_json, render)
