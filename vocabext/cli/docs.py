"""Write the reference of all verbs from their `--help`: `python -m vocabext.cli.docs docs/cli.md`."""

import copy
from collections.abc import Iterator
from pathlib import Path

import click

from vocabext.cli.main import LazyGroup, cli
from vocabext.errors import VocabextError
from vocabext.files.atomic import atomic_file

_WIDTH = 100


def render() -> str:
    """Render the help of the command and of each of its verbs as Markdown."""
    sections = [
        "# The command line",
        "<!-- Written by `make docs` from the commands' own --help. Change it there. -->",
        *(f"## {path}\n\n```text\n{text}\n```" for path, text in _walk(cli, "vocabext", None)),
    ]
    return "\n\n".join(sections) + "\n"


def _walk(command: click.Command, path: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    context = click.Context(command, info_name=path.rpartition(" ")[2], parent=parent, **command.context_settings)
    context.terminal_width = context.max_content_width = _WIDTH
    yield path, _with_help_option(command, context).get_help(context).rstrip()
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = _load(command, context, name)
            if child is not None and not child.hidden:
                yield from _walk(child, f"{path} {name}", context)


def _with_help_option(command: click.Command, context: click.Context) -> click.Command:
    """Copy a command, with the names that its help option has under this context.

    A command keeps the help option of its first call. Called without `vocabext` in front, it knows `--help` only.
    """
    shown = copy.copy(command)
    shown.params, shown.add_help_option = list(command.params), False
    return click.help_option(*command.get_help_option_names(context))(shown)


def _load(group: click.Group, context: click.Context, name: str) -> click.Command | None:
    try:
        return group.get_command(context, name)
    except VocabextError:
        if isinstance(group, LazyGroup):  # a verb that this installation does not have
            return None
        raise


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
def main(output: Path) -> None:
    """Write the reference to OUTPUT."""
    with atomic_file(output) as file:
        file.write(render())


if __name__ == "__main__":
    main()
