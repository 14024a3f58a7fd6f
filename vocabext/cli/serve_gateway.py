"""`vocabext serve gateway`, `swap` and `swap-test`: an expanded model under live traffic, and back in one step."""

import importlib.util
import os
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from vocabext.cli import options, show

_STATE = Path("gateway-state.json")
_KEY = "VOCABEXT_API_KEY"
_PERCENT = click.FloatRange(0, 100)
_state_option = click.option("--state", "state_path", type=click.Path(path_type=Path), default=_STATE,
                             show_default=True, metavar="PATH", help="The gateway's state, which survives a restart.")


def _require_extra() -> None:
    """Check that what `serve` brings is installed, before anything imports it.

    Raises:
        MissingExtraError: If a part is missing.
    """
    from vocabext.errors import MissingExtraError

    for name in ("aiohttp", "httptools", "prometheus_client", "starlette", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(name, "serve")


@click.command(short_help="Serve base and expanded behind one endpoint, and switch between them.")
@click.argument("base", metavar="BASE")
@click.argument("expanded", metavar="EXPANDED")
@click.argument("vllm_flags", nargs=-1, metavar="[-- VLLM FLAGS...]")
@click.option("--one-engine", is_flag=True, help="Serve both arms with the expanded engine: half of the memory.")
@_state_option
@click.option("--percent", type=_PERCENT, default=0.0, show_default=True,
              help="Share of requests to the expanded arm, where there is no state yet.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 picks a free one.")
@click.option("--admin-port", type=click.IntRange(0, 65535), default=0,
              help="Port of the admin endpoint, on loopback only. [default: a free one]")
@click.option("--model-name", "model", default="", help="What clients call the model. [default: the base arm's name]")
@click.option("--canary/--no-canary", default=True, show_default=True, help="Roll back if the expanded arm is worse.")
@click.option("--max-failures", "failure_share", type=click.FloatRange(0, 1), default=0.02, show_default=True,
              help="Canary: share of failed answers above the base arm's.")
@click.option("--max-pace", "pace_ratio", type=click.FloatRange(min=1), default=1.25, show_default=True,
              help="Canary: seconds per character, times the base arm's.")
@click.option("--max-first", "first_ratio", type=click.FloatRange(min=1), default=1.5, show_default=True,
              help="Canary: seconds to the first character, times the base arm's.")
@click.option("--max-length", "length_ratio", type=click.FloatRange(min=1), default=2.0, show_default=True,
              help="Canary: how many times as long, or as short, answers may be.")
@click.option("--min-agreement", type=click.FloatRange(0, 1), default=0.1, show_default=True,
              help="Canary: share of a mirrored greedy answer that is the base's, from its beginning.")
@click.option("--max-reading-loss", "reading_nats", type=click.FloatRange(min=0), default=0.03, show_default=True,
              metavar="NATS", help="Canary: how much less likely, per character, mirrored base answers may be behind "
                                   "prompts as the expanded arm reads them.")
@click.option("--alpha", type=click.FloatRange(1e-9, 0.5), default=0.01, show_default=True,
              help="Canary: probability of rolling back without reason, however long it runs.")
@click.option("--pin/--no-pin", "allow_pin", default=True, show_default=True,
              help="Let the header x-vocabext-arm choose the arm.")
@click.option("--api-key-file", type=click.Path(path_type=Path), metavar="PATH",
              help="Clients' keys, one per line; read again when it changes. [default: the one in VOCABEXT_API_KEY]")
@click.option("--allow-origin", "allowed_origins", multiple=True, metavar="ORIGIN",
              help="Let web pages of this origin use the gateway, such as https://chat.example.org; may be repeated.")
@click.option("--metrics-port", type=click.IntRange(0, 65535),
              help="Show /metrics on this port, too, to everybody. [default: behind the key alone]")
@click.option("--max-body-bytes", "body_bytes", type=click.IntRange(min=1), default=2**20, show_default=True,
              help="Longest request body.")
@click.option("--max-all-bodies-bytes", "all_bodies_bytes", type=click.IntRange(min=1), default=128 * 2**20,
              show_default=True, help="Bytes that all bodies may hold beyond the first 64 KiB of each; more get 503.")
@click.option("--max-prompts", "prompts", type=click.IntRange(min=1), default=128, show_default=True,
              help="Prompts that one request may have.")
@click.option("--max-connections", "connections", type=click.IntRange(min=1), default=1024, show_default=True,
              help="Connections of clients; beyond that, those without a request give way.")
@click.option("--header-seconds", type=click.FloatRange(min=0.1), default=10.0, show_default=True,
              help="How long a request's header may take.")
@click.option("--body-seconds", type=click.FloatRange(min=0.1), default=30.0, show_default=True,
              help="How long a request's body may take.")
@click.option("--write-seconds", type=click.FloatRange(min=0.1), default=30.0, show_default=True,
              help="How long a client may leave its answer unread.")
@click.option("--total-seconds", type=click.FloatRange(min=0.1), default=1800.0, show_default=True,
              help="How long a request may take from its arrival to the end of its answer.")
@click.option("--max-header-bytes", "header_bytes", type=click.IntRange(min=256), default=32 * 2**10, show_default=True,
              help="Longest request line and headers together.")
@click.option("--max-in-flight", "in_flight", type=click.IntRange(min=1), default=256, show_default=True,
              help="Requests that one arm may have at once; more get status 503.")
@click.option("--idle-seconds", type=click.FloatRange(min=0.1), default=600.0, show_default=True,
              help="An engine that sends nothing for so long counts as hanging: status 504.")
@click.option("--drain-seconds", type=click.FloatRange(min=0), default=30.0, show_default=True,
              help="How long requests in flight may take once the gateway is told to stop.")
@click.option("--record", "record_path", type=click.Path(path_type=Path), metavar="PATH",
              help="Write requests there, with their text, for swap-test. [default: nothing is written down]")
@click.option("--record-limit", type=click.IntRange(min=1), default=1000, show_default=True,
              help="Write down so many requests at most.")
@click.option("--logs", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Where the logs of started engines go. [default: a new folder, removed at the end]")
@click.option("--restart/--no-restart", default=True, show_default=True,
              help="Start an engine again that was started here and dies; else the gateway ends.")
@click.option("--start-timeout-seconds", type=click.FloatRange(min=1), default=900.0, show_default=True,
              help="Give up if an engine is not ready by then.")
@options.unverified_option
@options.check_digests_option
@options.trust_remote_code_option
@options.json_option
def gateway(
    base: str, expanded: str, one_engine: bool, state_path: Path, percent: float, canary: bool, logs: Path | None,
    as_json: bool, **settings: Any,
) -> None:
    """Serve BASE and EXPANDED behind one OpenAI-compatible endpoint, until Ctrl-C.

    Each is the URL of a vLLM server that runs already, or a folder or hub id, for which one is started.
    With --one-engine, only the expanded engine runs (EXPANDED is a folder, or FOLDER@URL), and BASE is the
    base model, for its tokenizer. An expanded folder must have passed `vocabext verify` as it is now.

    `serve swap` changes which arm answers, while requests are in flight. An API key in the environment
    variable VOCABEXT_API_KEY is asked of clients and passed on to the engines. Flags of vLLM's server go after
    --, for the engines that are started.
    """
    _require_extra()
    from vocabext.serve.gateway.canary import Bounds
    from vocabext.serve.gateway.guard import Limits
    from vocabext.serve.gateway.policy import Policy
    from vocabext.serve.gateway.run import GatewayConfig, run_gateway

    def taken(kind: Any) -> dict[str, Any]:
        return {field.name: settings.pop(field.name) for field in fields(kind) if field.name in settings}

    bounds, limits = Bounds(**taken(Bounds)), Limits(**taken(Limits))
    config = GatewayConfig(base, expanded, one_engine, state_path, Policy(percent), limits=limits,
                           bounds=bounds if canary else None, api_key=os.environ.get(_KEY) or None, log_folder=logs,
                           **settings)

    def ready(document: dict[str, Any]) -> None:
        show.emit(document, as_json, lambda: show.table(
            [("URL", document["url"]), ("model name", document["model"]), ("policy", document["policy"]),
             ("state", document["state"]), *((f"{name} log", log) for name, log in document["logs"].items())],
            ("", "serving")))
        show.note("ready; Ctrl-C stops it, `vocabext serve swap` switches")
        sys.stdout.flush()

    signal.raise_signal(run_gateway(config, on_ready=ready, note=show.note, progress=show.progress))


@click.command(short_help="Switch a running gateway: to an arm, to a share, or back.")
@click.option("--to", "arm", type=click.Choice(["base", "expanded"]), help="The arm that gets the share.")
@click.option("--percent", type=_PERCENT, help="Its share of requests; the rest goes to the other. [default: 100]")
@click.option("--mirror", type=_PERCENT, help="Share of requests to send to both arms, to compare them; one answers. "
                                                   "[default: 0 with --to]")
@click.option("--rollback", is_flag=True, help="All requests to the base arm, nothing mirrored.")
@click.option("--reason", default="", help="Why; kept with the change.")
@_state_option
@options.json_option
def swap(
    arm: str | None, percent: float | None, mirror: float | None, rollback: bool, reason: str, state_path: Path,
    as_json: bool,
) -> None:
    """Switch a running gateway; without options, show where it stands.

    Requests in flight end on the arm that they began on. The new policy is on disk before this returns; a rollback
    that cannot be written is in force all the same, and this says so.
    """
    from vocabext.errors import UsageError
    _require_extra()
    from vocabext.serve.gateway.admin import send_order
    from vocabext.serve.gateway.state import read_state

    if rollback and (arm or percent is not None or mirror is not None):
        raise UsageError("--rollback goes without --to, --percent and --mirror")
    if percent is not None and arm is None:
        raise UsageError("--percent needs --to: whose share is it?")
    order: dict[str, Any] | None = {"reason": reason}
    if rollback:
        order = {"rollback": True, "reason": reason}
    elif arm is not None or mirror is not None:
        order = {"to": arm, "percent": percent, "mirror_percent": mirror, "reason": reason}
    else:
        order = None
    status = send_order(read_state(state_path), order)
    show.emit(status, as_json, lambda: _show_status(status))
    if status.get("unsaved"):
        show.note(f"{status['unsaved']}: what is in force is not saved, and a restart would not know of it")


def _show_status(status: dict[str, Any]) -> None:
    rows: list[tuple[str, object]] = [("policy", status["policy"])]
    rows += [(f"{name} engine", f"{health}, {status['in_flight'][name]} in flight")
             for name, health in status["arms"].items()]
    if status["changes"]:
        last = status["changes"][-1]
        why = f": {last['reason']}" if last["reason"] else ""
        rows.append(("last change", f"{last['time']} by {last['by']}{why}"))
    show.table(rows, ("", "gateway"))
    if status["canary"] is None:
        return
    show.table([(f["measure"], _number(f["base"]), _number(f["expanded"]),
                 f"{_number(f['low'])} to {_number(f['high'])}", f"{f['bound']:g}",
                 f"{f['values']['base']} / {f['values']['expanded']}", "WORSE" if f["worse"] else "")
                for f in status["canary"]["findings"]],
               ("canary", "base", "expanded", "always-valid limits", "bound", "values", ""))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


@click.command("swap-test", short_help="Rehearse a swap with recorded requests: exit code 3 if clients would notice.")
@click.argument("requests", type=click.Path(path_type=Path), metavar="REQUESTS.jsonl")
@click.argument("expanded", type=click.Path(path_type=Path), metavar="EXPANDED")
@click.option("--url", default="http://127.0.0.1:8080", show_default=True, help="A gateway that runs.")
@options.output_option
@options.force_option
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Replay so many at most.")
@click.option("--timeout-seconds", type=click.FloatRange(min=1), default=300.0, show_default=True,
              help="How long one request may take.")
@options.json_option
def swap_test(
    requests: Path, expanded: Path, url: str, output: Path, force: bool, limit: int, timeout_seconds: float,
    as_json: bool,
) -> None:
    """Replay REQUESTS.jsonl on both arms of a gateway, and check the contract that clients rely on.

    REQUESTS.jsonl is what `serve gateway --record` wrote, or one request body per line. EXPANDED is the expanded
    model's folder. The gateway's policy does not change, and its users are not touched. `FAIL` means that the
    expanded arm breaks what the base arm keeps; the exit code is then 3. `differs` means that numbers change by
    nature, and says how.
    """
    from vocabext.errors import BadCheckpointError
    from vocabext.files.atomic import check_output, write_json
    from vocabext.serve.gateway.rehearsal import swap_test as rehearse

    check_output(output, force=force)
    result = rehearse(requests, url, expanded, limit=limit, timeout_seconds=timeout_seconds,
                      api_key=os.environ.get(_KEY) or None, progress=show.progress)
    write_json(output, result)
    show.emit(result, as_json, lambda: _show_swap(result))
    if failed := [item["name"] for item in result["items"] if item["verdict"] == "FAIL"]:
        raise BadCheckpointError(f"the contract is broken: {', '.join(failed)}; {output} says how")


def _show_swap(result: dict[str, Any]) -> None:
    show.table([(item["name"], item["verdict"], item["checked"]) for item in result["items"]],
               ("contract", "verdict", "tried"))
    for item in result["items"]:
        show.echo(f"{item['name']}: {item['detail']}")
        for example in item["examples"]:
            show.echo(f"    {example}")
