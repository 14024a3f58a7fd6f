"""`vocabext verify`: prove that an expanded checkpoint still means what its base meant."""

from pathlib import Path

import click

from vocabext.cli import options, show


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="NEWDIR")
@options.against_option
@options.optional_corpus_option
@options.text_field_option
@click.option("--full", is_flag=True, help="Encode all of the corpus; else 64 MB of a larger one, drawn at random.")
@click.option("--skip-weights", is_flag=True, help="Do not load the two models to compare their logits.")
@click.option("--vllm", "use_vllm", is_flag=True, help="Load both models in vLLM, too, and compare what they write.")
@options.seed_option
@options.trust_remote_code_option
@options.json_option
def verify(
    folder: Path, against: str, corpus: tuple[str, ...], text_field: str, full: bool,
    skip_weights: bool, use_vllm: bool, seed: int, trust_remote_code: bool, as_json: bool,
) -> None:
    """Check NEWDIR against its base, and write the verdicts to NEWDIR/verify.json.

    Text without new tokens must keep its ids, rows and logits; text with them must turn back into the base's ids.
    Exit code 3 if anything is wrong.
    """
    from vocabext.api.model import Expanded, Model
    from vocabext.checkpoint.verdicts import FAIL
    from vocabext.errors import BadCheckpointError

    expanded = Expanded(folder, Model(against, trust_remote_code=trust_remote_code, voice=show.voice()))
    result = expanded.verify(corpus or None, text_field=text_field, full=full, skip_weights=skip_weights, vllm=use_vllm,
                             seed=seed)

    def render() -> None:
        show.table([(c.verdict, c.name, c.detail) for c in result.checks], ("", "check", "found"))

    show.emit(result.to_json(), as_json, render)
    if not result.passed:
        failed = [check.name for check in result.checks if check.verdict == FAIL]
        raise BadCheckpointError(f"{folder} failed {len(failed)} of {len(result.checks)} checks: {', '.join(failed)}")
