"""`vocabext inspect`: what a model is, as far as its vocabulary is concerned."""

from typing import TYPE_CHECKING

import click

from vocabext.cli import options, show

if TYPE_CHECKING:
    from vocabext.inspect import Inspection
    from vocabext.model.support import Support


@click.command()
@options.model_argument
@options.trust_remote_code_option
@options.json_option
def inspect(model: str, trust_remote_code: bool, as_json: bool) -> None:
    """Show the rows, ids and tokenizer of MODEL, what can be added to it, and what can be done with it.

    MODEL is a folder or a hub id. No weights are loaded, and nothing is changed.
    """
    from vocabext.checkpoint.named_ids import listed
    from vocabext.errors import UnsupportedError
    from vocabext.inspect import expanded_note, inspect_model
    from vocabext.model.support import Support

    try:
        found = inspect_model(model, trust_remote_code=trust_remote_code)
    except UnsupportedError as refusal:  # what others refuse is what this verb is asked about
        none = Support(str(refusal), str(refusal))
        show.emit({"folder": model, "support": none}, as_json, lambda: show.table(_support(none), ("", model)))
        return

    def render() -> None:
        show.table([
            ("architecture", _architecture(found)),
            ("parameters", f"{found.num_parameters:,}"),
            ("weights", f"{found.weight_bytes:,} bytes in {found.num_shards:,} file{'s' * (found.num_shards != 1)}"),
            ("quantised", f"{found.quantisation}; not embedding and head" if found.quantisation else "no"),
            ("embedding type", found.dtype),
            ("hidden size", f"{found.hidden_size:,}"),
            ("head", "tied to the embedding" if found.tied else "its own (untied)"),
            *((row.role, f"{row.name}: {row.num_rows:,} rows of {row.row_bytes:,} bytes ({row.dtype})")
              for row in found.row_tensors),
            ("rows", f"{found.num_rows:,}"),
            ("ids in use", "unknown" if found.num_used_ids is None else f"{found.num_used_ids:,}"),
            ("free rows", "unknown" if found.num_free_rows is None else f"{found.num_free_rows:,}"),
            *((what, listed(ids)) for what, ids in (
                ("ids named by files", found.reserved), ("ids without a row", found.given_rows),
                ("named, out of reach", found.out_of_reach)) if ids),
            ("grows by", f"multiples of {found.row_step} rows" if found.row_step > 1 else "any number of rows"),
            *([("reserved ids", f"from {found.first_reserved_id:,} on, for images or sounds")]
              if found.first_reserved_id is not None else []),
            ("a new row", f"{found.bytes_per_new_row:,} bytes"),
            ("tokenizer", _tokenizer(found)),
            ("extension", found.extension),
            ("expanded already", expanded_note(found)),
            *_support(found.support),
        ], ("", str(found.folder)))

    show.emit(found, as_json, render)
    if found.tokenizer_warning:
        show.note(f"warning: {found.tokenizer_warning}")


def _support(found: "Support") -> list[tuple[str, str]]:
    return [("mine and patch", f"no: {found.patch}" if found.patch else "yes"),
            ("distill and eval", f"no: {found.run}" if found.run else "yes")]


def _architecture(found: "Inspection") -> str:
    inner = f" around a language model of type {found.text_model_type}" if found.text_model_type else ""
    return f"{found.architecture} (type {found.model_type}{inner})"


def _tokenizer(found: "Inspection") -> str:
    if found.tokenizer_kind is None:
        return "cannot be extended"
    return f"{found.tokenizer_kind} ({found.tokenizer_class})"
