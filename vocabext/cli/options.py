"""The options that several verbs share, so that one thing has one name everywhere.

Each is a decorator for a click command; the comment behind it names the parameter it fills.
"""

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_CORPUS_HELP = (
    "File, folder, glob or hub dataset (OWNER/NAME[:SPLIT]) of .txt, .jsonl, .parquet, .csv or .tsv, plain, .gz, "
    ".bz2, .xz or .zst. Repeatable."
)


def together(*options: Decorator) -> Decorator:
    """Join options into one decorator; `--help` lists them in the order given."""
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


def field(config: object, name: str, description: str, **settings: Any) -> Decorator:
    """Make the option for a field of a stage's options, with the field's name, type and default.

    Args:
        config: The options of the stage, with their defaults.
        name: The field.
        description: What `--help` says of it.
        settings: What else `click.option` should know, or know otherwise.
    """
    default = getattr(config, name)
    return click.option(f"--{name.replace('_', '-')}", help=description, default=default,
                        **{"type": type(default), "show_default": True, **settings})


def number_or(word: str) -> Callable[[click.Context, click.Parameter, str], int | None]:
    """Make the callback of an option that takes a number, or a word that stands for None."""
    def read(context: click.Context, parameter: click.Parameter, value: str) -> int | None:
        try:
            return None if value == word else int(value)
        except ValueError:
            raise click.BadParameter(f"{value!r} is neither a number nor {word!r}") from None

    return read


model_argument = click.argument("model", metavar="MODEL")  # model: str
model_option = click.option(  # model: str
    "--model", required=True, metavar="MODEL", help="Model folder or hub id."
)
against_option = click.option(  # against: str
    "--against", required=True, metavar="MODEL", help="The base model it was made from: folder or hub id."
)

corpus_argument = click.argument("corpus", nargs=-1, required=True, metavar="CORPUS...")  # corpus: tuple[str, ...]
corpus_option = click.option(  # corpus: tuple[str, ...], at least one
    "--corpus", required=True, multiple=True, metavar="CORPUS", help=_CORPUS_HELP
)
optional_corpus_option = click.option(  # corpus: tuple[str, ...], may be empty
    "--corpus", multiple=True, metavar="CORPUS", help=_CORPUS_HELP
)
text_field_option = click.option(  # text_field: str
    "--text-field", default="text", show_default=True, metavar="NAME",
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
compute_options = together(  # device, dtype: str, max_memory: str | None
    click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda or cuda:N."),
    click.option("--dtype", default="auto", show_default=True, metavar="TYPE",
                 help="auto, bfloat16, float16 or float32."),
    click.option("--max-memory", metavar="LIMITS",
                 help="Spread the model over devices, such as '0=20GiB,cpu=60GiB'; the rest stays on disk."),
)
