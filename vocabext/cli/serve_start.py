"""`vocabext serve start`."""

import sys
from contextlib import ExitStack
from pathlib import Path

import click

from vocabext.cli import options, show

HEALED = "healed"  # what requests call a model with its adapter


@click.command(short_help="Serve a model with vLLM in the foreground.")
@click.argument("model", metavar="MODEL")
@click.argument("vllm_flags", nargs=-1, metavar="[-- VLLM FLAGS...]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free one.")
@click.option("--log", type=click.Path(path_type=Path), metavar="PATH",
              help="The server's log. [default: a new file, removed at the end]")
@click.option("--start-timeout-seconds", type=click.FloatRange(min=1), default=900.0, show_default=True,
              help="Give up if the server is not ready by then.")
@options.unverified_option
@options.check_digests_option
@click.option("--adapter", is_flag=True,
              help="Serve the adapter of a folder that `heal` has made, too: requests for the model 'healed' get it, "
                   "requests for MODEL do not.")
@options.json_option
def start(
    model: str, vllm_flags: tuple[str, ...], host: str, port: int, log: Path | None, start_timeout_seconds: float,
    unverified: bool, check_digests: bool, adapter: bool, as_json: bool,
) -> None:
    """Serve MODEL with vLLM in the foreground; Ctrl-C stops it.

    MODEL is a folder or a hub id, base or expanded: plain vLLM serves both. An expanded folder must have
    passed `vocabext verify` as it is now. Flags of vLLM's server go after --, such as:
    vocabext serve start MODEL -- --max-model-len 4096
    """
    from vocabext.checkpoint.folder import resolve_model
    from vocabext.files.atomic import check_output
    from vocabext.files.scratch import scratch_folder
    from vocabext.serve.engine import require_vllm, vllm_server, wait_until_ready
    from vocabext.serve.model import adapter_flags, card_of, require_verified

    require_vllm()
    if log is not None:
        check_output(log, force=True)
    folder = resolve_model(model)
    if not unverified:
        require_verified(folder, check_digests=check_digests)
    card = card_of(folder)
    vllm_flags = (*(adapter_flags(folder, HEALED) if adapter else ()), *vllm_flags)
    with ExitStack() as stack:
        log = log or stack.enter_context(scratch_folder("vocabext-serve-")) / "server.log"
        show.note(f"starting vLLM for {model}; its log is {log}")
        server = stack.enter_context(
            vllm_server(folder, log, host=host, port=port, served_name=model, flags=vllm_flags))
        wait_until_ready([server], timeout_seconds=start_timeout_seconds, progress=show.progress)
        document = {"url": f"{server.url}/v1", "model": model, "process_id": server.process.pid, "log": log,
                    "card": dict(card), **({"adapter": HEALED} if adapter else {})}
        show.emit(document, as_json, lambda: show.table(
            [("URL", document["url"]), ("model name", model), *[("with its adapter", HEALED)] * adapter, *card,
             ("log", log)], ("", "serving")))
        show.note("ready; Ctrl-C stops it")
        sys.stdout.flush()
        server.process.wait()
        server.check_alive()
