"""`vocabext collect`: snippets of a corpus for every new token."""

from pathlib import Path
from typing import Any

import click

from vocabext.cli import options, show
from vocabext.options import CollectConfig

DEFAULTS = CollectConfig()
NUM_NAMED = 20

collect_options = options.together(  # what `collect` and `run` share
    options.field(DEFAULTS, "snippets", "Snippets per token."),
    options.field(DEFAULTS, "window", "Length of a snippet, in base ids."),
    options.field(DEFAULTS, "min_snippets", "A token with fewer snippets is listed as short of text."),
    click.option("--generate-missing", is_flag=True, help="Let the model write text for tokens short of it."),
)


@click.command()
@click.argument("candidates", type=click.Path(path_type=Path), metavar="CANDIDATES")
@options.corpus_option
@click.option("--model", metavar="MODEL", help="Model folder or hub id.  [default: the one that was mined for]")
@options.output_option
@collect_options
@options.text_field_option
@options.seed_option
@options.force_option
@options.trust_remote_code_option
@options.json_option
def collect(
    candidates: Path, corpus: tuple[str, ...], model: str | None, output: Path, text_field: str, force: bool,
    trust_remote_code: bool, as_json: bool, **settings: Any,
) -> None:
    """Sample snippets of a corpus for each token of CANDIDATES (from `vocabext mine`).

    One pass keeps a uniform sample per token of the places where the expanded tokenizer really produces
    it. A token that is mostly part of longer ones also gets places inside those.
    """
    from vocabext.api.model import Model
    from vocabext.api.results import TokenTable
    from vocabext.errors import UsageError
    from vocabext.files.atomic import check_output

    check_output(output, force=force)
    tokens = TokenTable.load(candidates)
    model = model or tokens.header["base"].get("model")
    if not isinstance(model, str):
        raise UsageError(f"{candidates} does not say which model it was made for; pass --model")
    records = Model(model, trust_remote_code=trust_remote_code, voice=show.voice()).collect(
        tokens, corpus, text_field=text_field, **settings)
    records.save(output, force=True)  # what may be replaced was checked before the work
    written = records.header
    if short := written["short"]:
        names = ", ".join(map(repr, short[:NUM_NAMED]))
        more = f" and {len(short) - NUM_NAMED:,} more" if len(short) > NUM_NAMED else ""
        hint = "" if settings["generate_missing"] else "; give more text, or pass --generate-missing"
        show.note(f"{len(short):,} tokens have fewer than {settings['min_snippets']} snippets: {names}{more}{hint}")

    def render() -> None:
        show.table([
            ("tokens", len(records)),
            ("snippets", written["snippets"]),
            ("inside longer tokens", written["inside"]),
            ("written by the model", written["generated"]),
            (f"tokens with fewer than {settings['min_snippets']}", len(short)),
            ("tokens without any", sum(not record.snippets for record in records)),
        ], ("", str(output)))

    show.emit({"output": output, "tokens": len(records), **written}, as_json, render)
