"""`vocabext revert`: make the base again from an expanded checkpoint."""

from pathlib import Path

import click

from vocabext.cli import options, show
from vocabext.files.links import AUTO, LINKS


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="NEWDIR")
@options.output_option
@click.option("--link", type=click.Choice(LINKS), default=AUTO, show_default=True,
              help="How untouched shards come over: linked where the file system can, always linked, or copied.")
@options.force_option
@options.json_option
def revert(folder: Path, output: Path, link: str, force: bool, as_json: bool) -> None:
    """Write the base model that NEWDIR was expanded from, byte for byte; the base itself is not needed.

    Every file is compared with the digest that was recorded of the base's. Where something but the expansion has
    changed, nothing is written.
    """
    from vocabext.revert import revert as run_revert

    result = run_revert(folder, output, link=link, force=force, progress=show.progress)

    def render() -> None:
        show.table([
            ("base", result.base),
            ("restored", f"{result.num_files:,} files, {result.num_bytes:,} bytes, in {result.seconds:.1f} s"),
            ("without a recorded digest", ", ".join(result.unproven) or "none"),
            *((f"not kept: {name}", reason) for name, reason in result.lost.items()),
        ], ("", str(output)))

    show.emit(result, as_json, render)
