"""`vocabext inspect`: what a model is, as far as its vocabulary is concerned."""

import click

from vocabext.cli import options, show


@click.command()
@options.model_argument
@options.trust_remote_code_option
@options.json_option
def inspect(model: str, trust_remote_code: bool, as_json: bool) -> None:
    """Show the rows, ids and tokenizer of MODEL, and what can be added to it.

    MODEL is a folder or a hub id. No weights are loaded, and nothing is changed.
    """
    from vocabext.inspect_model import expanded_note, inspect_model

    found = inspect_model(model, trust_remote_code=trust_remote_code)

    def render() -> None:
        used = "unknown" if found.num_used_ids is None else f"{found.num_used_ids:,}"
        free = "unknown" if found.num_free_rows is None else f"{found.num_free_rows:,}"
        show.table([
            ("architecture", found.architecture),
            ("parameters", f"{found.num_parameters:,}"),
            ("weights", f"{found.weight_bytes:,} bytes in {_count(found.num_shards, 'file')}"),
            ("embedding type", found.dtype),
            ("hidden size", f"{found.hidden_size:,}"),
            ("head", "tied to the embedding" if found.tied else "its own (untied)"),
            ("vocabulary tensors", ", ".join(found.vocab_tensors)),
            ("rows", f"{found.num_rows:,}"),
            ("ids in use", used),
            ("free rows", free),
            ("a new row", f"{found.bytes_per_new_row:,} bytes"),
            ("tokenizer", found.tokenizer_kind or "cannot be extended"),
            ("extension", found.extension),
            ("expanded already", expanded_note(found)),
        ], ("", str(found.folder)))

    show.emit(found, as_json, render)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
