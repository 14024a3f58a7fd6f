"""`vocabext choose`: the tokens that save most for what they cost."""

from pathlib import Path
from typing import Any

import click

from vocabext.cli import options, show
from vocabext.options import CANDIDATES, ChooseConfig

DEFAULTS = ChooseConfig()
NUM_SHOWN = 10

bound_options = options.together(  # what `choose` and `run` share
    click.option("--max-loss", type=float, metavar="BITS",
                 help="Bits per byte that text may lose by new tokens (`eval` calls it reading), measured with quickly "
                      "distilled rows on text kept from mining; ships what saves most within it.  [default: no bound; "
                      "tokens that bring a larger share of the savings than of the loss]"),
    options.field(DEFAULTS, "choice_bytes", "Text that is read to measure what tokens cost, in bytes; the curve is "
                  "measured on as much held-out text."),
)
choose_options = options.together(  # with which `run` chooses
    bound_options,
    click.option("--candidates", type=float, metavar="FACTOR",
                 help="Mine FACTOR times the budget, and ship the best by what they save and cost.  "
                      f"[default: {CANDIDATES:g} with --max-loss, else nothing is chosen]"),
)


@click.command()
@click.argument("rows", type=click.Path(path_type=Path), metavar="ROWS")
@options.model_option
@options.corpus_option
@click.option("--heldout", multiple=True, metavar="CORPUS",
              help="Other text, to measure the curve of savings against loss on. Repeatable.  [default: no curve]")
@click.option("--budget", type=click.IntRange(min=1), required=True, metavar="N", help="Most tokens to take.")
@options.output_option
@bound_options
@options.compute_options
@options.text_field_option
@options.force_option
@options.trust_remote_code_option
@options.json_option
def choose(
    rows: Path, model: str, corpus: tuple[str, ...], heldout: tuple[str, ...], budget: int, output: Path,
    text_field: str, force: bool, trust_remote_code: bool, as_json: bool, **settings: Any,
) -> None:
    """Choose the tokens of ROWS (from `vocabext distill`) that save most for what they cost.

    The corpus must be kept back: nothing that was mined or distilled from. PATH gets the chosen tokens, as `collect`
    and `distill` read them; choice.json beside it says of each token what it saves and costs, and why it was left out.
    """
    from vocabext.api.model import Model
    from vocabext.choose.stage import CHOICE_NAME
    from vocabext.files.atomic import check_output

    for path in (output, output.with_name(CHOICE_NAME)):
        check_output(path, force=force)
    chosen = Model(model, trust_remote_code=trust_remote_code, voice=show.voice()).choose(
        rows, corpus, heldout=heldout, budget=budget, text_field=text_field, **settings)
    chosen.save(output, force=True)  # what may be replaced was checked before the work
    show.emit(chosen.to_json(), as_json, lambda: render_choice(chosen.to_json()))


def render_choice(document: dict[str, Any]) -> None:
    """Write the curve, and what was left out."""
    for name, title in (("by_savings", "by savings alone"), ("chosen", "chosen")):
        found = document[name]
        show.echo(f"{title}: {found['tokens']:,} tokens save {found['saved_share']:.1%} and lose "
                   f"{found['loss_bits_per_byte']:.4f} bits per byte of text kept from mining")
    if document["frontier"]:
        show.echo("\nheld-out text")
        show.table([(point["rule"], point["tokens"], f"{point['saved_share']:.1%}",
                     f"{point['loss_bits_per_byte']:.4f}", "chosen" if point["chosen"] else "")
                    for point in document["frontier"]],
                   ("rule", "tokens", "shorter", "bits per byte lost", ""))
    left_out = [row for row in document["tokens"] if not row["kept"]]
    if left_out:
        show.echo(f"\nleft out: {len(left_out):,} tokens, the first of them")
        show.table([(repr(row["token"]), row["uses"], row["saved"], row["loss_nats_per_use"], row["why"])
                    for row in left_out[:NUM_SHOWN]], ("token", "uses", "saved", "nats per use", "why"))
