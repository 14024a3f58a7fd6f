"""`vocabext serve lengths`."""

from pathlib import Path
from typing import Any

import click

from vocabext.cli import options, show


@click.command(short_help="Count how much shorter a corpus becomes.")
@click.argument("base", metavar="BASE")
@click.argument("expanded", metavar="EXPANDED")
@options.corpus_option
@options.text_field_option
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="PATH", help="Write the result there, too.")
@options.force_option
@options.seed_option
@options.trust_remote_code_option
@options.json_option
def lengths(
    base: str, expanded: str, corpus: tuple[str, ...], text_field: str, output: Path | None, force: bool, seed: int,
    trust_remote_code: bool, as_json: bool,
) -> None:
    """Count how much shorter a corpus becomes: tokens per document under BASE and under EXPANDED.

    Use documents that `mine` has not seen. BASE and EXPANDED are folders or hub ids.
    """
    from vocabext.files.atomic import check_output, write_json
    from vocabext.serve.lengths import measure_lengths

    if output is not None:
        check_output(output, force=force)
    result = measure_lengths(base, expanded, corpus, text_field=text_field, trust_remote_code=trust_remote_code,
                             seed=seed, progress=show.progress, say=show.note)
    if output is not None:
        write_json(output, show.to_plain(result))
    show.emit(result, as_json, lambda: _show(result))


def _show(result: dict[str, Any]) -> None:
    new, low_high = result["new_tokens"], result["saved_share_interval"]
    saved, per_1000 = result["saved_share_percentiles"], result["tokens_per_1000_characters_percentiles"]
    invariant = result["invariant"]
    rows: list[tuple[str, object]] = [
        ("documents", result["documents"]),
        ("tokens per document, base", f"{result['base_tokens_per_document']:,.1f}"),
        ("tokens per document, expanded", f"{result['expanded_tokens_per_document']:,.1f}"),
        ("tokens per 1000 characters", f"{result['base_tokens_per_1000_characters']:,.1f} -> "
                                       f"{result['expanded_tokens_per_1000_characters']:,.1f}"),
        ("  by document, 5 / 50 / 95 %", " / ".join(
            f"{per_1000['base'][p]:,.0f} -> {per_1000['expanded'][p]:,.0f}" for p in ("5", "50", "95"))),
        ("fewer tokens", f"{result['saved_share']:.1%} (95 % interval {low_high[0]:.1%} to {low_high[1]:.1%})"),
        ("  by document, 5 / 50 / 95 %", " / ".join(f"{saved[p]:.1%}" for p in ("5", "50", "95"))),
        ("new tokens used", f"{new['used']:,} of {new['total']:,}, covering {new['share_of_characters']:.1%} "
                            "of the characters"),
        ("earn most", ", ".join(f"{row['token']!r} ({row['saved_tokens']:,})" for row in new["most_saving"][:5])
         or "none"),
        ("never fire", f"{new['never_used_count']:,}" + (
            f": {', '.join(map(repr, new['never_used'][:5]))}, ..." if new["never_used"] else "")),
        ("pure merges", f"all {invariant['documents']:,} documents" if not invariant["differing"] else
         f"NO: {invariant['differing']:,} documents differ, the first is {invariant['first']}"),
    ]
    if cache := result["cache"]:
        rows.append(("cache per document", f"{cache['base_bytes_per_document']:,.0f} -> "
                                           f"{cache['expanded_bytes_per_document']:,.0f} bytes"))
        if cache["context_tokens"]:
            rows.append(("characters in the context", f"{cache['base_context_characters']:,.0f} -> "
                                                      f"{cache['expanded_context_characters']:,.0f}"))
    rows.append(("encoding speed", f"{result['megabytes_per_second']:.1f} MB/s"))
    show.table(rows, ("", "held-out text"))
