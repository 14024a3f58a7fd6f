"""`vocabext distill`: train the rows of the new tokens."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vocabext.cli import options, show
from vocabext.options import METHODS, OUTPUT_ROWS, DistillConfig

if TYPE_CHECKING:
    from vocabext.distill.output_rows.stage import OutputRows

DEFAULTS = DistillConfig()

distill_options = options.together(  # what `distill` and `run` share
    options.compute_options,
    options.field(DEFAULTS, "method", "'distill' trains; 'mean' writes the mean of the pieces, in seconds.",
                  type=click.Choice(METHODS)),
    options.field(DEFAULTS, "target_layer", "Layer whose hidden states are matched: 'last', a number, or a fraction of "
                  "the depth.", metavar="LAYER"),
    click.option("--rounds", type=int, default=DEFAULTS.rounds, metavar="N",
                 help="Rounds at most; the first shows 8 snippets of each token, each further one twice as many. 1 is "
                      "quick.  [default: as many as --epochs allows]"),
    options.field(DEFAULTS, "epochs", "Passes over the snippets at most; a token stops when its held-out snippets do "
                  "not improve."),
    click.option("--reach", default="all" if DEFAULTS.reach is None else str(DEFAULTS.reach), show_default=True,
                 metavar="N", callback=options.number_or("all"), help="Positions compared behind the token, or 'all'."),
    click.option("--cache-gib", type=float, default=DEFAULTS.cache_gib, metavar="GIB",
                 help="Memory for states, keys and values that are kept of a group of tokens.  [default: an eighth of "
                      "the device's]"),
    options.field(DEFAULTS, "leave_out", "Leave out tokens whose held-out error is above FACTOR times the median's and "
                  "was not halved by training; 0 keeps all.", metavar="FACTOR"),
    click.option("--output-rows", type=click.Choice(OUTPUT_ROWS), default=DEFAULTS.output_rows,
                 help="'fit' makes the model write the new tokens; 'none' keeps it from writing them; 'mean' and "
                      "'zero' are baselines; 'input' takes the input rows (tied models).  [default: 'fit' where the "
                      "model can have such rows]"),
    options.field(DEFAULTS, "writing_places", "Text that output rows are fitted to, in base ids of snippets per token.",
                  metavar="N"),
    options.field(DEFAULTS, "false_use", "Largest share of held-out places where fitted rows may write a new token and "
                  "the base writes something else. Of the rows within it, those that write most are taken; with a "
                  "larger share, the model writes more new tokens.", metavar="SHARE"),
    options.field(DEFAULTS, "silence", "For tied models with --output-rows input: weight of the penalty for writing a "
                  "new token where the base would write something else; 0 is off."),
    options.field(DEFAULTS, "learning_rate", "Peak step size, in units of the root mean square of the base embedding."),
)


def _show_writing(output: "OutputRows") -> None:
    """Say what the output rows are good for."""
    show.echo(f"\noutput rows: {output.kind}")
    silent = [token for token in output.tokens if token.silent is not None]
    if (found := output.held_out) is not None:
        show.table([
            ("written", f"{len(output.tokens) - len(silent):,}"),
            ("read, not written", f"{len(silent):,}"),
            ("adopted where the base writes the run", "-" if found.adoption is None else f"{found.adoption:.1%}"),
            ("written where the base writes something else",
             f"{found.false_use:.2%} of places (--false-use {output.bound:.2%})"),
            ("loss of base targets elsewhere", f"{found.nll_rise_nats:.4f} nats"),
            ("seconds", f"{output.read_seconds:.0f} to read, {output.fit_seconds:.0f} to fit"),
        ], ("on held-out snippets", ""))
    if silent:
        show.echo("\nthe model reads these tokens and does not write them "
                   f"({len(silent):,} of {len(output.tokens):,})")
        show.table([(repr(token.token), token.silent) for token in silent[:10]], ("token", "why"))
    if output.leak is not None:
        show.echo(f"largest probability of a silent row at the places that were read: {output.leak:.1e}")


@click.command()
@click.argument("snippets", type=click.Path(path_type=Path), metavar="SNIPPETS")
@options.model_option
@options.output_option
@distill_options
@options.seed_option
@options.force_option
@options.trust_remote_code_option
@options.json_option
def distill(
    snippets: Path, model: str, output: Path, force: bool, trust_remote_code: bool, as_json: bool, **settings: object,
) -> None:
    """Make one embedding row for each token of SNIPPETS (from `vocabext collect`).

    Only new rows are trained; the model stays as it is. With --method mean, SNIPPETS may also be the
    candidates of `vocabext mine`.
    """
    from vocabext.api.model import Model

    result = Model(model, trust_remote_code=trust_remote_code, voice=show.voice()).distill(
        snippets, output=output, force=force, **settings).result
    assert result is not None  # it was made just now

    def render() -> None:
        worst = sorted((r for r in result.reports if r.start_error), key=lambda r: -r.ratio)[:10]
        show.table([
            ("rows", f"{len(result.kept):,}"),
            ("left out", f"{len(result.reports) - len(result.kept):,}"),
            ("trained", f"{sum(r.method == 'distill' for r in result.reports):,}"),
            ("kept at their start", f"{sum(r.method != 'distill' for r in result.reports):,}"),
            ("error, relative to the mean of pieces",
             "not measured" if result.relative_error is None else f"{result.relative_error:.1%}"),
            ("taken from base tokens, all rows together",
             "not measured" if result.taken_nats is None else
             f"{result.taken_nats:.4f} nats (mean of pieces {result.taken_nats_start:.4f})"),
        ], ("", str(output)))
        if worst:
            show.echo("\nhardest tokens")
            show.table([(repr(r.token), r.snippets, f"{r.ratio:.0%}") for r in worst],
                       ("token", "snippets", "error, relative to the mean of its pieces"))

        if result.output is not None:
            _show_writing(result.output)
        if left_out := [report for report in result.reports if report.left_out is not None]:
            show.echo("\nleft out: the model cannot represent them as one row")
            show.table([(repr(r.token), r.left_out) for r in left_out[:10]], ("token", "why"))

    show.emit(result.summary(), as_json, render)
