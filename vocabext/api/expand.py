"""All stages in one call."""

from pathlib import Path
from typing import Any

from vocabext.api.corpus import Corpus, paths_of
from vocabext.api.model import Expanded, Model
from vocabext.api.voice import LOGGER, check_names, python_names, python_voice, spelled, takes
from vocabext.options import STAGES


@takes(*STAGES)
@spelled
def expand(
    model: str | Path, corpus: Corpus, *, output: str | Path, heldout: Corpus = (), work: str | Path | None = None,
    text_field: str = "text", force: bool = False, trust_remote_code: bool = False, verbose: bool | None = None,
    **options: Any,
) -> Expanded:
    """Walk from a corpus to a verified and measured model: mine, collect, distill, patch, verify, evaluate.

    With `max_loss` or `candidates`, more tokens are mined than are shipped, and chosen by what they cost.
    Stages whose inputs have not changed are skipped, so that an interrupted call goes on where it stopped.

    Args:
        model: The base model: a folder or hub id.
        corpus: A file, folder, glob or hub dataset, or a list of these. It is read several times, so texts in memory
            must be written to a file.
        output: The folder to make.
        heldout: Text to measure on; empty keeps one document in 20 of the corpus from mining.
        work: Where the stages keep their files; None is the name of the output with `-work` behind it.
        text_field: The field that holds the text of a record.
        force: Replace a model folder that is there.
        trust_remote_code: As for `load`.
        verbose: As for `load`.
        **options: The fields of `MineConfig`, `CollectConfig`, `DistillConfig`, `ChooseConfig` and `EvalConfig`. An
            option that several stages have, such as `seed` or `device`, goes to all of them.

    Returns:
        The expanded model; its folder holds verify.json and eval.json.

    Raises:
        OutputExistsError: If the output is there and was not made by this very call.
        BadCheckpointError: If `verify` finds a fault; the folder is kept for inspection.
        UsageError: If a path or an option is wrong.

    Example:
        ```python
        vocabext.expand("examples/model", "notes/*.jsonl", budget=100, output="expanded", method="mean")
        ```
    """
    from vocabext.run import RunConfig, run

    check_names(options, *STAGES)
    voice = python_voice(verbose)
    config = RunConfig.from_options(
        options, model=str(model), corpus=paths_of(corpus), output=Path(output), heldout=paths_of(heldout),
        work=None if work is None else Path(work), text_field=text_field, force=force,
        trust_remote_code=trust_remote_code)
    run(config, voice.progress, voice.say, lambda line: LOGGER.info(python_names(line)))
    return Expanded(output, Model(model, trust_remote_code=trust_remote_code, voice=voice))
