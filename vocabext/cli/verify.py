"""`vocabext verify`: prove that an expanded checkpoint still means what its base meant."""

from pathlib import Path

import click

from vocabext.cli import options, show


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="NEWDIR")
@options.against_option
@options.optional_corpus_option
@options.text_field_option
@click.option("--skip-weights", is_flag=True, help="Do not load the two models to compare their logits.")
@click.option("--vllm", "use_vllm", is_flag=True, help="Load both models in vLLM, too, and compare what they write.")
@options.seed_option
@options.trust_remote_code_option
@options.json_option
def verify(
    folder: Path, against: str, corpus: tuple[str, ...], text_field: str, skip_weights: bool,
    use_vllm: bool, seed: int, trust_remote_code: bool, as_json: bool,
) -> None:
    """Check NEWDIR against its base, and write the verdicts to NEWDIR/verify.json.

    Text without new tokens must keep its ids, rows and logits; text with them must turn back into the base's ids.
    Exit code 3 if anything is wrong.
    """
    from vocabext.checkpoint.verdicts import FAIL, VERIFY_NAME
    from vocabext.corpus import read_documents
    from vocabext.errors import BadCheckpointError
    from vocabext.files.atomic import write_json
    from vocabext.verify.stage import verify as run_verify

    documents = read_documents(corpus, text_field=text_field, say=show.note) if corpus else None
    result = run_verify(folder, against, documents, trust_remote_code=trust_remote_code, seed=seed,
                        load_weights=not skip_weights, use_vllm=use_vllm, progress=show.progress)
    write_json(folder / VERIFY_NAME, result.to_json())

    def render() -> None:
        show.table([(c.verdict, c.name, c.detail) for c in result.checks], ("", "check", "found"))

    show.emit(result.to_json(), as_json, render)
    if not result.passed:
        failed = [check.name for check in result.checks if check.verdict == FAIL]
        raise BadCheckpointError(f"{folder} failed {len(failed)} of {len(result.checks)} checks: {', '.join(failed)}")
