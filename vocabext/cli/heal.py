"""`vocabext heal`: an adapter and retrained rows, in a new folder."""

from pathlib import Path
from typing import Any

import click

from vocabext.cli import options, show
from vocabext.files.links import AUTO, LINKS
from vocabext.options import OBJECTIVES, HealConfig

DEFAULTS = HealConfig()


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="NEWDIR")
@options.against_option
@options.corpus_option
@click.option("--general", multiple=True, metavar="CORPUS",
              help="Other text, of which the model must not forget anything. Repeatable.")
@options.text_field_option
@options.output_option
@click.option("--text", type=int, default=DEFAULTS.text, show_default=True, metavar="N",
              help="Text to learn from, in expanded ids, general text included.")
@click.option("--rank", type=int, default=DEFAULTS.rank, show_default=True, help="Rank of the adapter.")
@click.option("--learning-rate", type=float, default=DEFAULTS.learning_rate, show_default=True,
              help="Peak step size of the adapter.")
@click.option("--row-rate", type=float, default=DEFAULTS.row_rate, show_default=True,
              help="Peak step size of the rows, in units of the root mean square of the base embedding.")
@click.option("--general-share", type=float, default=DEFAULTS.general_share, show_default=True, metavar="SHARE",
              help="Share of the text that is --general.")
@click.option("--window", type=int, default=DEFAULTS.window, show_default=True, help="Expanded ids of a window.")
@click.option("--batch", type=int, default=DEFAULTS.batch, show_default=True, help="Windows of a step.")
@click.option("--objective", type=click.Choice(OBJECTIVES), default=DEFAULTS.objective, show_default=True,
              help="What new tokens are compared with: 'runs' is the base's probability of each run, 'text' what the "
                   "text has; 'pieces' compares first pieces only.")
@click.option("--held-out", type=int, default=DEFAULTS.held_out, show_default=True, metavar="N",
              help="Held-out windows of each text; the adapter that does best on them is kept.")
@click.option("--merge", is_flag=True,
              help="Add the adapter to the weights. The body is not the base's then, and `verify` says so.")
@click.option("--link", type=click.Choice(LINKS), default=AUTO, show_default=True, help="As for `patch`.")
@click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, metavar="TYPE", help="auto, bfloat16, float16 or float32.")
@options.seed_option
@options.force_option
@options.trust_remote_code_option
@options.json_option
def heal(
    folder: Path, against: str, corpus: tuple[str, ...], general: tuple[str, ...], text_field: str, output: Path,
    merge: bool, link: str, force: bool, trust_remote_code: bool, as_json: bool, **settings: Any,
) -> None:
    """Make the body of NEWDIR used to its new tokens: write a new folder with an adapter and retrained rows.

    The body stays the base's, bit for bit: the adapter (LoRA) lies in adapter/, a plain peft folder that can be
    switched on per request. It learns to write and read text in new tokens as the base does in pieces. Interrupted,
    the same command goes on where it stopped. Needs `pip install 'vocabext[heal]'`.
    """
    from vocabext.api.model import Expanded, Model
    from vocabext.checkpoint.folder import read_json
    from vocabext.checkpoint.manifest import HEAL_NAME

    expanded = Expanded(folder, Model(against, trust_remote_code=trust_remote_code, voice=show.voice()))
    expanded.heal(corpus, output, general=general or None, text_field=text_field, merge=merge, link=link, force=force,
                  **settings)
    report = read_json(output / HEAL_NAME)
    show.emit(report, as_json, lambda: render(report, output))


def render(report: dict[str, Any], output: Path) -> None:
    """Write the held-out curve as a table."""
    show.table([(f"{point['ids']:,}", f"{point['first_pieces']:.4f}", f"{point['units']:.4f}",
                 f"{point['total']:.4f}" + (" (kept)" if point["step"] == report["kept_step"] else ""))
                for point in report["curve"]],
               ("ids seen", "first pieces, nats per place", "units, nats per place", "together"))
    show.echo(f"\n{output}: {report['adapter_parameters']:,} parameters in the adapter, "
               f"{report['steps']:,} steps in {report['seconds']:,.0f} s")
