"""`vocabext serve report`."""

from pathlib import Path

import click

from vocabext.cli import options, show


@click.command(short_help="Put all results on one page: report.html.")
@click.argument("expanded", type=click.Path(path_type=Path), metavar="EXPANDED")
@options.output_option
@options.force_option
@click.option("--lengths", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
              help="From `serve lengths`. Repeatable, one per corpus; the first is shown in full.")
@click.option("--bench", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
              help="From `serve bench`, also one that was stopped. Repeatable, one per machine.")
@click.option("--predict", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
              help="From `serve predict`. Repeatable, one per device.")
@click.option("--eval", "evaluation", type=click.Path(path_type=Path), metavar="PATH", help="From `vocabext eval`.")
@click.option("--verify", "verification", type=click.Path(path_type=Path), metavar="PATH",
              help="From `vocabext verify`.")
@click.option("--swap", type=click.Path(path_type=Path), metavar="PATH", help="From `serve swap-test`.")
@click.option("--choice", type=click.Path(path_type=Path), metavar="PATH",
              help="choice.json, from `vocabext choose` or `run --max-loss`.")
@click.option("--price-per-hour", type=click.FloatRange(min=0, min_open=True), metavar="AMOUNT",
              help="What the machine costs; shows the cost of a million characters.")
def report(
    expanded: Path, output: Path, force: bool, lengths: tuple[Path, ...], bench: tuple[Path, ...],
    predict: tuple[Path, ...], evaluation: Path | None, verification: Path | None, swap: Path | None,
    choice: Path | None, price_per_hour: float | None,
) -> None:
    """Put all results about EXPANDED on one page: report.html, which needs nothing else. Never measures.

    Results that are not named are looked for in EXPANDED, then beside the output, then in the working folder of `run`:
    lengths.json, bench.json, predict.json, eval.json, verify.json, swap.json, choice.json. The page names what was not
    measured. The same content goes beside the page: as .md, to paste, and as .json, for programs.
    """
    from vocabext.errors import UsageError
    from vocabext.files.atomic import atomic_file, check_output, write_json
    from vocabext.serve.report.page import gather, render_report

    markdown, document = output.with_suffix(".md"), output.with_suffix(".json")
    if output in (markdown, document):
        raise UsageError(f"{output} is the page itself, and .md and .json go beside it; choose a name such "
                         "as report.html")
    for path in (output, markdown, document):
        check_output(path, force=force)
    one_each = {"eval": evaluation, "verify": verification, "swap": swap, "choice": choice}
    named = {"lengths": lengths, "bench": bench, "predict": predict,
             **{name: (path,) for name, path in one_each.items() if path}}
    page = render_report(expanded, gather(expanded, output.absolute().parent, named), price_per_hour=price_per_hour)
    for path, text in ((output, page.html), (markdown, page.markdown)):
        with atomic_file(path) as file:
            file.write(text)
    write_json(document, show.to_plain(page.document))
    show.echo(page.headline)
    for name in page.missing:
        show.note(f"{name} was not measured; the report says how to")
    show.note(f"wrote {output}, {markdown.name} and {document.name}")
