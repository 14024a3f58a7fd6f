"""`vocabext run`: all stages in order."""

from pathlib import Path

import click

from vocabext.cli import options, show
from vocabext.cli.choose import choose_options
from vocabext.cli.collect import collect_options
from vocabext.cli.distill import distill_options
from vocabext.cli.eval import evaluate_options, render_evaluation
from vocabext.cli.mine import mine_options


@click.command()
@options.corpus_argument
@options.model_option
@options.output_option
@click.option("--heldout", multiple=True, metavar="CORPUS",
              help="Text to measure on. [default: one document in 20 is kept from mining]")
@click.option("--work", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Where the stages keep their artifacts. [default: the output's name with -work]")
@options.text_field_option
@mine_options
@collect_options
@distill_options
@choose_options
@evaluate_options
@options.seed_option
@options.force_option
@options.trust_remote_code_option
@options.json_option
def run(
    corpus: tuple[str, ...], model: str, output: Path, heldout: tuple[str, ...], work: Path | None, text_field: str,
    force: bool, trust_remote_code: bool, as_json: bool, **settings: object,
) -> None:
    """Walk from CORPUS to a verified and measured model folder: mine, collect, distill, patch, verify, eval.

    Stages whose inputs have not changed are skipped, so an interrupted run goes on where it stopped. With
    --method mean nothing is trained, and a valid folder is there within a minute.

    With --max-loss or --candidates, more tokens are mined than --budget, distilled in one quick round, and measured on
    one document in 20, which is kept from mining; the budget is filled with what saves most for what it costs. The
    working folder gets choice.json, which says of each token what it saves and costs, and why it was left out.
    """
    from vocabext.evaluate.stage import EVAL_NAME
    from vocabext.files.atomic import read_object
    from vocabext.run import RunConfig
    from vocabext.run import run as run_stages

    config = RunConfig.from_options(
        settings, model=model, corpus=corpus, output=output, heldout=heldout, text_field=text_field, work=work,
        force=force, trust_remote_code=trust_remote_code)
    outcomes = run_stages(config, show.progress, show.note)
    evaluation = read_object(output / EVAL_NAME)

    def render() -> None:
        show.table([(o.name, o.state, f"{o.seconds:.1f} s", o.output) for o in outcomes],
                   ("stage", "", "time", "artifact"))
        if evaluation:
            show.echo("")
            render_evaluation(evaluation)

    show.emit({"stages": outcomes, "eval": evaluation}, as_json, render)
