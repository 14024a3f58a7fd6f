"""`vocabext mine`: the words and phrases of a corpus that are worth a token."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vocabext.cli import options, show
from vocabext.options import MineConfig

if TYPE_CHECKING:
    from vocabext.mine.stage import MineResult

DEFAULTS = MineConfig()
NUM_BEST = 20

mine_options = options.together(  # what `mine` and `run` share
    click.option("--budget", callback=options.number_or("auto"), default=str(DEFAULTS.budget), show_default=True,
                 metavar="N|auto", help="How many new tokens; 'auto' takes the knee of the curve of savings."),
    options.field(DEFAULTS, "min_count", "A token must occur this often in the corpus."),
    options.field(DEFAULTS, "max_units", "Longest phrase, in words or runs of punctuation."),
    options.field(DEFAULTS, "max_characters", "Longest token, in characters."),
    click.option("--words-only", is_flag=True, help="Take words only, no phrases."),
    click.option("--dedup/--no-dedup", default=DEFAULTS.dedup, show_default=True,
                 help="Count near-duplicate documents and repeated passages, such as templates, once."),
)


@click.command()
@options.corpus_argument
@options.model_option
@options.output_option
@mine_options
@options.text_field_option
@options.force_option
@options.trust_remote_code_option
@options.json_option
def mine(
    corpus: tuple[str, ...], model: str, output: Path, text_field: str, force: bool, trust_remote_code: bool,
    as_json: bool, **settings: Any,
) -> None:
    """Find the words and phrases of CORPUS that are worth a token in MODEL.

    CORPUS is a file, folder, glob or hub dataset. Tokens are chosen by what they still save once those
    before them are chosen; the curve shows how much shorter the corpus gets for which budget.
    """
    from vocabext.api.model import Model
    from vocabext.files.atomic import check_output

    check_output(output, force=force)
    tokens = Model(model, trust_remote_code=trust_remote_code, voice=show.voice()).mine(
        corpus, text_field=text_field, **settings)
    tokens.save(output, force=True)  # what may be replaced was checked before the work
    result = tokens.result
    assert result is not None  # it was mined just now
    if line := result.repeats.describe():
        show.note(f"counted once: {line}; --no-dedup counts them as often as they occur")
    if result.rejected:
        reasons = "; ".join(f"{count:,}: {why}" for why, count in result.rejected_by_reason().items())
        show.note(f"{len(result.rejected):,} good candidates cannot be tokens ({reasons}); "
                  f"the header of {output} has examples")
    if result.parts:
        show.note(f"{result.parts:,} of {len(result.tokens):,} tokens occur fewer than {settings['min_count']} times "
                  "by themselves; they are there because longer tokens are merged from them")
    if result.searched:
        show.note(f"{result.searched:,} tokens cannot be merges (they hold a line break that is a byte, or the like); "
                  "the tokenizer will search for them")
    best = [token.to_json() for token in result.tokens[:NUM_BEST]]
    document = {"output": output, "tokens": len(result.tokens), "shorter_share": result.shorter_share, **tokens.header,
                "best": best}
    show.emit(document, as_json, lambda: _render(result, output))


def _render(result: "MineResult", output: Path) -> None:
    show.table([(point.budget, point.saved_tokens, f"{point.shorter_share:.1%}") for point in result.curve],
               ("budget", "saved tokens", "shorter"))
    show.echo(f"\nbest {min(NUM_BEST, len(result.tokens))} of {len(result.tokens):,} tokens")
    show.table([(repr(t.token), len(t.run), t.count, t.sections, t.saved) for t in result.tokens[:NUM_BEST]],
               ("token", "pieces", "count", "sections", "saved"))
    once = ", counted once," if result.repeats.any else ""
    show.echo(f"\n{output}: {len(result.tokens):,} tokens; they make this corpus{once} {result.shorter_share:.1%} "
              f"shorter ({result.base_tokens:,} to {result.expanded_tokens:,} tokens, measured)")
