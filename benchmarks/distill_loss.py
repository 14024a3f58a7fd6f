"""What rows of new tokens still lose, and which setting of `distill` wins how much of it back.

    python benchmarks/distill_loss.py --model DIR --take 100 [--ours snippets=12,epochs=1 ...] [--keep DIR] -o FILE.json

Tokens are mined as in distill_reference.py; the first `--take` of them, which save most, are distilled once for each
setting, and the others are read as pieces. Then every set of rows reads the same held-out text, all its tokens merged
(lost.py): rise of the negative log likelihood and divergence from the base, by distance behind the last new token.

`--capacity N` takes N of the tokens and as many snippets as the corpus has of them, up to 200: the last 40 judge, and
the row is trained on 10, 40 and all of the others. What is left then is left whatever one trains on.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distill_reference import (
    DEFAULTS,
    Task,
    capped,
    distill_task,
    heldout_documents,
    machine_facts,
    note,
    options_of,
    parser_of_tasks,
    prepare,
    read_tasks,
    time_ours,
    write,
)
from distill_tables import render
from kept import Kept, Run
from lost import BOUNDS, measure_lost
from machine import describe

from vocabext.checkpoint.rows import mean_rows
from vocabext.collect import collect
from vocabext.corpus import read_documents
from vocabext.distill.input_rows.engine import Objective, Taught, held_out_errors
from vocabext.distill.input_rows.examples import build_examples
from vocabext.evaluate.stage import RowSet
from vocabext.files.atomic import write_json
from vocabext.model.frozen import FrozenModel, pick_device
from vocabext.options import CollectConfig, DistillConfig
from vocabext.tokenizer import BaseTokenizer, extend, load_tokenizer
from vocabext.tokens import Expansion, TokenSnippets

CAPACITY_SNIPPETS, JUDGES = 200, 40
# Snippets trained on, and passes over them.
CAPACITY = ((10, 1), (10, 4), (40, 4), (CAPACITY_SNIPPETS, 4))


def main(argv: Sequence[str] | None = None) -> None:
    """Distill with every setting, measure all, write the table."""
    parser = parser_of_tasks(__doc__)
    parser.add_argument("--take", type=int, default=100, help="how many of the mined tokens are distilled")
    parser.add_argument("--dtype", default="auto", help="in which numbers held-out text is read")
    parser.add_argument("--capacity", type=int, default=0, metavar="N", help="train N tokens to their end instead")
    arguments = read_tasks(parser, argv)
    if arguments.corpus is None:
        parser.error("MedQuAD is not there; give --corpus, or set VOCABEXT_ASSETS")
    device, base = pick_device(arguments.device), load_tokenizer(arguments.model)
    # How much is read afterwards, and in which numbers, changes no row.
    afterwards = ("max_bytes", "dtype", "ours")
    trained_by = {key: value for key, value in options_of(arguments).items() if key not in afterwards}
    kept = Kept(arguments.keep, {**trained_by, **machine_facts(device)})
    with note("mining and collecting"):
        records = first_tokens(kept.records(lambda: prepare(arguments, base, arguments.tokens)), arguments.take,
                               base.first_new_id)
    expanded = extend(base, [record.new_token for record in records])
    task = Task(arguments.model, records, expanded.expansion, tuple(base.prefix_ids), device)
    if arguments.capacity:
        found = kept.value("capacity", lambda: capacity(arguments, task, base))
    else:
        runs = []
        for setting in arguments.ours or [""]:
            with note(setting or DEFAULTS):
                runs += kept.runs(setting or DEFAULTS, lambda setting=setting: [time_ours(task, setting)])
        model = task.load(arguments.dtype)
        mean = mean_rows(model.embedding_VD, expanded.expansion.tokens)
        sets = [RowSet("mean", mean, mean), *(RowSet(run.name, run.input_ND, run.input_ND) for run in runs)]
        lost = measure_lost(heldout_documents(arguments), model, base, expanded, sets, arguments.max_bytes)
        found = {"bounds": BOUNDS, "tokens": len(records),
                 "rows": [{"name": name, **vars(some), "nll": some.nll, "divergence": some.divergence,
                           "gap_recovered": 1 - some.nll / lost["mean"].nll,
                           "divergence_recovered": 1 - some.divergence / lost["mean"].divergence,
                           **_costs(name, runs)} for name, some in lost.items()]}
        for row in found["rows"]:
            del row["token_nats"]
    whole = {"options": options_of(arguments), "machine": describe(device), **found}
    write(render(whole))
    if arguments.output:
        write_json(arguments.output, whole)


def _costs(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    run = next((run for run in runs if run.name == name), None)
    if run is None or run.made is None:
        return {}
    return {"cpu_seconds": run.cpu_seconds, "dtype": run.dtype, "layer": run.made.layer,
            "shown_per_token": sum(run.made.shown) / len(run.made.shown),
            "relative_error": run.made.relative_error}


def first_tokens(records: Sequence[TokenSnippets], take: int, first_new_id: int) -> list[TokenSnippets]:
    """Keep the first tokens; in their snippets, the others are taken apart."""
    expansion = Expansion([record.new_token for record in records], first_new_id)
    keep, found = list(range(first_new_id, first_new_id + min(take, len(records)))), []
    for own, record in zip(keep, records, strict=False):
        snippets = tuple(tuple(ids.tolist()) for ids in expansion.unmerge_batch(record.snippets, keep=keep))
        found.append(replace(record, snippets=snippets, positions=tuple(ids.index(own) for ids in snippets)))
    return found


# -- one row on plenty of text ----------------------------------------------------------------------------------------


def capacity(arguments: argparse.Namespace, task: Task, base: BaseTokenizer) -> dict[str, Any]:
    """Train some tokens on more and more snippets, and judge them on snippets that stay the same."""
    every = max(1, len(task.records) // arguments.capacity)
    chosen = [record.new_token for record in task.records[::every][: arguments.capacity]]
    documents = list(read_documents([str(arguments.corpus)]))
    records = collect(documents, base, chosen, CollectConfig(snippets=CAPACITY_SNIPPETS))
    expansion = extend(base, chosen).expansion
    few = replace(task, records=records, expansion=expansion)
    model = task.load("auto")
    judges = [_cut(record, -JUDGES, None) for record in records]
    start_ND = mean_rows(model.embedding_VD, chosen)
    start = _judge(model, judges, expansion, task.prefix_ids, start_ND)
    rows = []
    for snippets, epochs in CAPACITY:
        train = [capped(_cut(record, 0, -JUDGES), snippets) for record in records]
        config = DistillConfig(silence=0.0, epochs=epochs)
        with note(f"{snippets} snippets, {epochs} epochs"):
            result = distill_task(few, train, model, config)
        end = _judge(model, judges, expansion, task.prefix_ids, result.input_ND)
        rows.append({"snippets": snippets, "epochs": epochs, "relative_error": sum(end) / sum(start),
                     "per_token": [after / before for after, before in zip(end, start, strict=True)],
                     "shown_per_token": sum(r.shown for r in result.reports) / len(records)})
    return {"tokens": [token.token for token in chosen], "judges": JUDGES,
            "snippets": [len(record.snippets) - JUDGES for record in records], "rows": rows}


def _cut(record: TokenSnippets, low: int, high: int | None) -> TokenSnippets:
    return replace(record, snippets=record.snippets[low:high], positions=record.positions[low:high])


def _judge(model: FrozenModel, records: Sequence[TokenSnippets], expansion: Expansion, prefix_ids: Sequence[int],
           rows_ND: Any) -> list[float]:
    config = DistillConfig()
    objective = Objective(model.layer_number(config.target_layer), (), 0.0, positions=2_000, keep_past=False)
    judged = Taught()
    judged.add(model, build_examples(records, expansion, range(len(records)), prefix_ids=prefix_ids,
                                     reach=config.reach), objective)
    found: list[float] = held_out_errors(model, judged, rows_ND.to(model.device), objective).tolist()
    return found


if __name__ == "__main__":
    main()
