"""`vocabext serve bench`."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import click

from vocabext.cli import options, show


@click.command(short_help="Measure base and expanded in turn, under vLLM.")
@click.argument("base", metavar="BASE")
@click.argument("expanded", metavar="EXPANDED")
@click.argument("vllm_flags", nargs=-1, metavar="[-- VLLM FLAGS...]")
@options.corpus_option
@options.text_field_option
@options.output_option
@options.force_option
@click.option("--pairs", default=5, show_default=True,
              help="Rounds of base, expanded, base again. Fewer than five give no verdict.")
@click.option("--scenario", multiple=True, type=click.Choice(("prefill", "decode", "mixed")),
              help="What is measured; repeatable. [default: all three]")
@click.option("--concurrency", multiple=True, type=int, metavar="N",
              help="Requests in flight at once; repeatable, one point each. [default: 1, or none with --rate]")
@click.option("--rate", multiple=True, type=float, metavar="PER_SECOND",
              help="Requests arriving per second at random moments; repeatable, one point each.")
@click.option("--target-ttft-seconds", type=float, metavar="SECONDS",
              help="Goodput counts requests whose first token comes within this time.")
@click.option("--target-request-seconds", type=float, metavar="SECONDS",
              help="Goodput counts requests that are done within this time.")
@click.option("--texts", default=6, show_default=True, help="Prompts per run, more where the load needs more.")
@click.option("--prompt-tokens", type=int,
              help="Length of a prefill prompt in base tokens. [default: 2032, or less if the context is smaller]")
@click.option("--prompt-characters", default=200, show_default=True, help="Length of a decode prompt.")
@click.option("--passage-characters", default=1500, show_default=True,
              help="Length of the passages in front of it in a mixed prompt.")
@click.option("--output-characters", default=256, show_default=True,
              help="Length of an answer: the same characters for both models, not the same tokens.")
@click.option("--one-at-a-time", is_flag=True,
              help="Restart between base and expanded, where memory does not hold both. Takes much longer. `bench` "
                   "does it by itself if both do not start together.")
@click.option("--start-timeout-seconds", type=click.FloatRange(min=1), default=900.0, show_default=True,
              help="Give up if a server is not ready by then.")
@click.option("--logs", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Where the servers' logs go.  [default: a folder beside the output]")
@options.unverified_option
@options.check_digests_option
@options.seed_option
@options.trust_remote_code_option
@options.json_option
def bench(
    base: str, expanded: str, vllm_flags: tuple[str, ...], corpus: tuple[str, ...], text_field: str, output: Path,
    force: bool, logs: Path | None, as_json: bool, scenario: tuple[str, ...], concurrency: tuple[int, ...],
    rate: tuple[float, ...], unverified: bool, check_digests: bool, **settings: Any,
) -> None:
    """Measure BASE and EXPANDED on the same held-out texts, in turn, each under its own vLLM server.

    An expanded folder must have passed `vocabext verify` as it is now.

    Three scenarios: prefill (long prompts, one output token), decode (short prompts, long answers) and
    mixed (passages, a short prompt, a long answer). The unit is seconds per text and per output character,
    never per token. `faster` or `slower` is said only if the whole interval is outside the noise floor,
    which is the base measured against itself. The output is written after every run; if something stops
    the measurement, the same command goes on from there. Flags of vLLM's server go after --, for both.
    """
    from vocabext.errors import UsageError
    from vocabext.files.atomic import check_output, read_object
    from vocabext.serve.bench.journal import is_partial
    from vocabext.serve.bench.scenarios import SCENARIOS
    from vocabext.serve.bench.stage import BenchConfig, run_bench

    partial = is_partial(read_object(output))
    check_output(output, force=force or partial)
    config = BenchConfig(scenario=scenario or SCENARIOS, concurrency=concurrency or (() if rate else (1,)), rate=rate,
                         vllm_flags=vllm_flags, **settings)
    folder = logs or output.with_name(f"{output.stem}.logs")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, but the logs need a folder; choose another with --logs")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = run_bench(base, expanded, corpus, config=config, output=output, force=force, text_field=text_field,
                           unverified=unverified, check_digests=check_digests, log_folder=folder,
                           progress=show.progress, say=show.note)
    except BaseException as error:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty
        if not isinstance(error, Exception) and is_partial(read_object(output)):
            show.note(f"what was measured is kept in {output}; the same command goes on from there")
        raise
    if logs is None:
        shutil.rmtree(folder)  # nothing failed: what is worth keeping is in the output
    show.emit(result, as_json, lambda: _show(result))


def _show(result: dict[str, Any]) -> None:
    from vocabext.serve.report.speed import speed_rows

    shown = ("point", "measure", "base", "expanded", "speedup", "noise", "left_out", "verdict")
    show.table([[row[name].replace("×", "") for name in shown] for row in speed_rows(result)],
               ("point", "measure", "base", "expanded", "speed-up (95 %)", "noise floor", "left out", "expanded is"))
    for line in remarks(result):
        show.echo(line)


def remarks(result: dict[str, Any]) -> list[str]:
    """Say what was counted beside the times: failures, disturbances, what was measured twice."""
    totals = [point[role] for point in result["points"] for role in ("base", "expanded")]
    failed, held_up = (sum(t[name] for t in totals) for name in ("failed_requests", "held_up_runs"))
    lines = [f"requests: {sum(t['requests'] for t in totals):,}, failed: {failed:,}; runs: "
             f"{sum(t['runs'] for t in totals):,}, held up by something else: {held_up:,}"]
    if result["resumed"]:
        lines.append(f"taken up again {result['resumed']} time(s); runs dropped and measured again: "
                     f"{result['dropped_runs']}")
    for role, found in result["tokenize_agreement"].items():
        if found["agreeing"] != found["prompts"]:
            lines.append(f"warning: the {role} server tokenizes {found['prompts'] - found['agreeing']} of "
                         f"{found['prompts']} prompts differently than the folder's tokenizer")
    for role, count in result["answers_below_wanted"].items():
        if count:
            lines.append(f"warning: {count} answers of the {role} model stay below the wanted characters")
    return lines
