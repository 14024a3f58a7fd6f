"""`vocabext serve predict`."""

from pathlib import Path
from typing import Any

import click

from vocabext.cli import options, show


@click.command(short_help="Predict speed and memory on a device, before it is rented.")
@click.argument("base", metavar="BASE")
@click.argument("expanded", required=False, metavar="[EXPANDED]")
@click.option("--device", metavar="NAME", help="h200, h100, h100-pcie, a100, l40s, l4, a10, mi300x; or any name with "
                                               "--flops and --bandwidth.")
@click.option("--flops", type=float, metavar="FLOP/S", help="Dense 16-bit matrix products per second, such as 989e12.")
@click.option("--bandwidth", type=float, metavar="BYTES/S", help="Memory bandwidth, such as 3.35e12.")
@click.option("--memory", type=float, metavar="BYTES", help="Memory of the device, such as 80e9.")
@click.option("--lengths", type=click.Path(path_type=Path), metavar="PATH", help="From `serve lengths`.")
@click.option("--saved-share", type=click.FloatRange(0, 1, max_open=True),
              help="Without --lengths: the share of tokens that is expected to be saved, such as 0.2.")
@click.option("--tokens-per-1000-characters", type=click.FloatRange(min=0, min_open=True), default=250.0,
              show_default=True, help="Without --lengths: how the base cuts the text.")
@click.option("--new-tokens", type=click.IntRange(min=0), help="Without EXPANDED: how many tokens will be added.")
@click.option("--bench", "benches", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
              help="From `serve bench`: shows what was measured next to the prediction. Repeatable.")
@click.option("--prompt-characters", default=8000, show_default=True, help="Length of a long prompt.")
@click.option("--short-prompt-characters", default=200, show_default=True, help="Length of a short prompt.")
@click.option("--output-characters", default=1000, show_default=True, help="Length of an answer.")
@click.option("--concurrency", default=1, show_default=True, help="Requests that are decoded together.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="PATH", help="Write the result there, too.")
@options.force_option
@options.json_option
def predict(
    base: str, expanded: str | None, device: str | None, flops: float | None, bandwidth: float | None,
    memory: float | None, lengths: Path | None, saved_share: float | None, tokens_per_1000_characters: float,
    new_tokens: int | None, benches: tuple[Path, ...], output: Path | None, force: bool, as_json: bool, **load: int,
) -> None:
    """Predict what an expansion brings on a device: a roofline from the configs and from text lengths.

    BASE and EXPANDED are folders or hub ids; only their configs are read. EXPANDED may be left out: then say
    with --new-tokens how many are planned, and with --saved-share what they should save.
    """
    from vocabext.errors import UsageError
    from vocabext.files.atomic import check_output, write_json
    from vocabext.serve.predict import Lengths, PredictConfig, find_device, run_predict
    from vocabext.serve.report.page import read_result

    if output is not None:
        check_output(output, force=force)
    config = PredictConfig(**load)
    target = find_device(device, flops_per_second=flops, bytes_per_second=bandwidth, memory_bytes=memory)
    if lengths is not None:
        found = Lengths.from_json(read_result(lengths, "lengths"))
    elif saved_share is not None:
        found = Lengths(tokens_per_1000_characters / 1000, tokens_per_1000_characters / 1000 * (1 - saved_share))
    else:
        raise UsageError("nothing says how much shorter text becomes; pass --lengths (from `serve lengths`) or "
                         "--saved-share")
    result = run_predict(base, expanded, found, target, config=config, new_tokens=new_tokens,
                         benches=[read_result(path, "bench") for path in benches])
    if output is not None:
        write_json(output, show.to_plain(result))
    show.emit(result, as_json, lambda: _show(result))


def _show(result: dict[str, Any]) -> None:
    from vocabext.serve.report.page import milliseconds

    device, lengths, memory = result["device"], result["lengths"], result["memory"]
    show.echo(f"{device['name']}: {device['flops_per_second']:.3g} FLOP/s, {device['bytes_per_second']:.3g} bytes/s "
               f"({device['source']}); text is {lengths['length_ratio']:.3f} times shorter")
    show.echo("")
    show.table([(row["scenario"], row["note"], milliseconds(row["base_seconds"]),
                 milliseconds(row["expanded_seconds"]), f"{row['speedup']:.3f}", row["expanded_limited_by"])
                for row in result["loads"]],
               ("load", "if", "base", "expanded", "speed-up", "limited by"))
    show.echo("")
    rows = [("weights", "weight_bytes", "bytes"), ("head", "head_bytes", "bytes"),
            ("cache per request", "cache_bytes_per_request", "bytes"), ("requests that fit", "requests_that_fit", ""),
            ("characters in the context", "context_characters", "")]
    show.table([(name, *(None if memory[role][key] is None else f"{memory[role][key]:,.0f} {unit}".rstrip()
                         for role in ("base", "expanded"))) for name, key, unit in rows],
               ("memory", "base", "expanded"))
    if result["measured"]:
        show.echo("")
        show.table([(row["machine"], row["point"], f"{row['length_ratio']:.3f}",
                     None if row["predicted_speedup"] is None else f"{row['predicted_speedup']:.3f}",
                     f"{row['speedup']:.3f} ({row['speedup_interval'][0]:.3f} to {row['speedup_interval'][1]:.3f})",
                     f"{row['share_of_length_ratio']:.2f}",
                     None if row["prediction_error"] is None else f"{row['prediction_error']:+.1%}", row["verdict"])
                    for row in result["measured"]],
                   ("measured on", "point", "by length alone", "predicted", "measured (95 %)", "measured / by length",
                    "prediction is off by", "expanded is"))
    for line in result["notes"]:
        show.note(line)
