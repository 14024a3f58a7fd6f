"""swap.json as a part of the report: a piece of HTML that needs nothing else."""

from collections.abc import Mapping
from html import escape
from typing import Any


def render_swap(swap: Mapping[str, Any]) -> str:
    """Return the section of the report about a rehearsal.

    Args:
        swap: The content of swap.json.
    """
    counts: dict[str, int] = {}
    for item in swap["items"]:
        counts[item["verdict"]] = counts.get(item["verdict"], 0) + 1
    rows = "\n".join(_row(item) for item in swap["items"])
    verdict = "The contract holds" if swap["passed"] else "The contract is broken: do not swap"
    summary = ", ".join(f"{count} {escape(name)}" for name, count in counts.items())
    return f"""<section id="swap">
<h2>Swapping the tokenizer under clients</h2>
<p><strong>{verdict}</strong>: {swap['requests']:,} recorded requests were replayed on both arms ({summary}). “Differs”
is not a fault: the numbers differ by nature, and clients should know how.</p>
<table>
<thead><tr><th>what clients rely on</th><th>verdict</th><th>tried</th><th>found</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</section>"""


def _row(item: Mapping[str, Any]) -> str:
    examples = "".join(f"<br><small>{escape(example)}</small>" for example in item["examples"])
    return (f"<tr><td>{escape(item['name'])}</td><td>{escape(item['verdict'])}</td><td>{item['checked']:,}</td>"
            f"<td>{escape(item['detail'])}{examples}</td></tr>")
