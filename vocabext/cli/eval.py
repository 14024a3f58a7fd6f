"""`vocabext eval`: base, mean-of-pieces and distilled rows next to each other, on held-out text."""

from pathlib import Path
from typing import Any

import click

from vocabext.cli import options, show
from vocabext.options import EvalConfig

DEFAULTS = EvalConfig()

evaluate_options = options.together(  # what `eval` and `run` share
    options.field(DEFAULTS, "max_bytes", "Held-out text to read, in bytes."),
    options.field(DEFAULTS, "prompts", "Held-out prompts that both models continue; 0: none."),
)


@click.command("eval")
@click.argument("folder", type=click.Path(path_type=Path), metavar="NEWDIR")
@options.against_option
@options.corpus_option
@options.text_field_option
@evaluate_options
@options.compute_options
@options.trust_remote_code_option
@options.json_option
def evaluate(
    folder: Path, against: str, corpus: tuple[str, ...], text_field: str, trust_remote_code: bool, as_json: bool,
    **settings: Any,
) -> None:
    """Measure how well NEWDIR reads and writes held-out text, and write NEWDIR/eval.json.

    Three rows: the base model, new tokens as the mean of their pieces, and new tokens as NEWDIR has them.
    The corpus must be held out: nothing that was mined or distilled from.
    """
    from vocabext.api.model import Expanded, Model

    expanded = Expanded(folder, Model(against, trust_remote_code=trust_remote_code, voice=show.voice()))
    result = expanded.evaluate(corpus, text_field=text_field, **settings).to_json()
    show.emit(result, as_json, lambda: render_evaluation(result))


def render_evaluation(result: dict[str, Any]) -> None:
    """Write the three rows as a table."""
    shorter = result["shorter"]
    saved = 1 - shorter["expanded_tokens"] / shorter["base_tokens"]
    show.echo(f"{result['documents']} documents, {result['bytes']:,} bytes: {shorter['base_tokens']:,} base tokens, "
               f"{shorter['expanded_tokens']:,} expanded ({saved:.1%} shorter)")
    show.table([
        (row["name"], row["target_nll_nats"], row["bits_per_byte"], row["bits_per_byte_writing"],
         None if row["greedy_same_share"] is None else f"{row['greedy_same_share']:.0%}",
         row["greedy_common_characters"])
        for row in result["rows"]
    ], ("rows", "nats per piece", "bits per byte, reading", "bits per byte, writing", "same greedy text",
        "characters until it differs"))
    if result.get("writing"):
        _render_writing(result["writing"])
    if result["gap_recovered"] is not None:
        low, high = result["gap_recovered_interval"]
        show.echo(f"gap between mean of pieces and base recovered: {result['gap_recovered']:.1%} "
                   f"(95 % interval {low:.1%} to {high:.1%})")


def _render_writing(writing: dict[str, Any]) -> None:
    """Write what output rows buy, and what they cost."""
    base, places = writing["base"], writing["rows"][0]["places"]
    show.echo(f"\nwriting: base goes on with a run at {places['deserved']:,} of {places['places']:,} places; "
               f"after {base['prompts']} prompts it writes {base['characters_per_step']:.2f} characters per step, "
               f"{base['characters_per_step_if_all_adopted']:.2f} if each of them became one step")
    show.table([
        (row["name"], f"{row['greedy']['characters_per_step']:.2f}", _share(row["greedy"]["share_of_possible_gain"]),
         _share(row["places"]["adoption"]), f"{row['places']['false_use']:.2%}",
         f"{row['places']['nll_rise_nats']:.4f}",
         " / ".join(str(row["greedy"][kind]) for kind in ("identical", "similar", "worse")),
         f"{row['sampling']['kl_nats_per_piece']:.4f}")
        for row in writing["rows"]
    ], ("rows", "characters per step", "of the possible gain", "adopted", "written wrongly", "nats lost elsewhere",
        "greedy text identical / similar / worse", "shift of samples, nats per piece"))
    show.echo("")


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"
