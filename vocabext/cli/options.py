"""The options that several verbs share, so that one thing has one name everywhere.

Each is a decorator for a click command; the comment behind it names the parameter it fills.
"""

from pathlib import Path

import click

_MODEL_HELP = "Model folder or hub id."
_CORPUS_HELP = (
    "File, folder, glob or hub dataset (OWNER/NAME[:SPLIT]) of .txt, .jsonl, .parquet, .csv or .tsv, plain, .gz, "
    ".bz2, .xz or .zst. Repeatable."
)

model_argument = click.argument("model", metavar="MODEL")  # model: str
model_option = click.option("--model", required=True, metavar="MODEL", help=_MODEL_HELP)  # model: str
against_option = click.option(  # against: str
    "--against", required=True, metavar="MODEL", help="The base model it was made from: folder or hub id."
)

corpus_argument = click.argument(  # corpus: tuple[str, ...], at least one
    "corpus", nargs=-1, required=True, metavar="CORPUS..."
)
corpus_option = click.option(  # corpus: tuple[str, ...], at least one
    "--corpus", required=True, multiple=True, metavar="CORPUS", help=_CORPUS_HELP
)
optional_corpus_option = click.option(  # corpus: tuple[str, ...], may be empty
    "--corpus", multiple=True, metavar="CORPUS", help=_CORPUS_HELP
)
text_field_option = click.option(  # text_field: str
    "--text-field",
    default="text",
    show_default=True,
    metavar="NAME",
    help="The field of a .jsonl, .parquet, .csv or .tsv record, or of a hub dataset, that holds the text.",
)

output_option = click.option(  # output: Path
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="PATH", help="Where the result goes."
)
force_option = click.option("--force", is_flag=True, help="Replace the output if it is there already.")  # force: bool
json_option = click.option(  # as_json: bool
    "--json", "as_json", is_flag=True, help="Write the result to stdout as one JSON document."
)
trust_remote_code_option = click.option(  # trust_remote_code: bool
    "--trust-remote-code", is_flag=True, help="Run Python code that comes with the model. Only for models you trust."
)
seed_option = click.option(  # seed: int
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of every random choice."
)
unverified_option = click.option(  # unverified: bool
    "--unverified", is_flag=True, help="Serve an expanded folder that `verify` has not passed as it is now."
)
check_digests_option = click.option(  # check_digests: bool
    "--check-digests", is_flag=True, help="Compare the weights' digests with verify.json, too, not only their sizes."
)
