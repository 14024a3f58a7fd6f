"""`vocabext distill`: train the rows of the new tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vocabext.cli import options, show
from vocabext.config import METHODS, DistillConfig

DEFAULTS = DistillConfig()
Command = Callable[..., Any]


def distill_options(command: Command) -> Command:
    """Add the options that `distill` and `run` share."""
    for option in (
        click.option("--learning-rate", type=float, default=DEFAULTS.learning_rate, show_default=True,
                     help="Peak step size, in units of the root mean square of the base embedding."),
        click.option("--batch-snippets", type=int, default=DEFAULTS.batch_snippets, show_default=True,
                     help="Snippets of each token per step."),
        click.option("--silence", type=float, default=DEFAULTS.silence, show_default=True,
                     help="Tied models: weight of not being written where the base would write something else."),
        click.option("--epochs", type=int, default=DEFAULTS.epochs, show_default=True,
                     help="Passes over the snippets."),
        click.option("--target-layer", default=DEFAULTS.target_layer, show_default=True, metavar="LAYER",
                     help="Layer whose hidden states are matched: 'last', a number, or a fraction of the depth."),
        click.option("--method", type=click.Choice(METHODS), default=DEFAULTS.method, show_default=True,
                     help="'distill' trains; 'mean' writes the mean of the pieces, in seconds."),
    ):  # fmt: skip
        command = option(command)
    return compute_options(command)


def compute_options(command: Command) -> Command:
    """Add the options of everything that runs a model."""
    command = click.option("--dtype", default="auto", show_default=True, metavar="TYPE",
                           help="auto, bfloat16, float16 or float32.")(command)  # fmt: skip
    return click.option("--device", default="auto", show_default=True, metavar="DEVICE",
                        help="auto, cpu, cuda or cuda:N.")(command)  # fmt: skip


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
    snippets: Path, model: str, output: Path, seed: int, force: bool, trust_remote_code: bool, as_json: bool,
    **settings: object,
) -> None:  # fmt: skip
    """Make one embedding row for each token of SNIPPETS (from `vocabext collect`).

    Only new rows are trained; the model stays as it is. With --method mean, SNIPPETS may also be the
    candidates of `vocabext mine`.
    """
    from vocabext.distill import distill_file

    config = DistillConfig(seed=seed, **settings)  # type: ignore[arg-type]
    result = distill_file(snippets, model, output, config, force=force, trust_remote_code=trust_remote_code,
                          progress=show.progress)

    def render() -> None:
        worst = sorted((r for r in result.reports if r.start_error), key=lambda r: -r.ratio)[:10]
        show.table([
            ("rows", f"{len(result.reports):,}"),
            ("trained", f"{sum(r.method == 'distill' for r in result.reports):,}"),
            ("kept at the mean of their pieces", f"{sum(r.method == 'mean' for r in result.reports):,}"),
            ("error, relative to the mean of pieces",
             "not measured" if result.relative_error is None else f"{result.relative_error:.1%}"),
            ("taken from base tokens, all rows together",
             "not measured" if result.taken_nats is None else
             f"{result.taken_nats:.4f} nats (mean of pieces {result.taken_nats_start:.4f})"),
        ], ("", str(output)))
        if worst:
            click.echo("\nhardest tokens")
            show.table([(repr(r.token), r.snippets, f"{r.ratio:.0%}") for r in worst],
                       ("token", "snippets", "error, relative to the mean of its pieces"))  # fmt: skip

    show.emit(result.summary(), as_json, render)
