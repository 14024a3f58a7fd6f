"""Do everything with every family of models, and write docs/families.md: what works, what is refused, and why.

    python benchmarks/families.py [FAMILY ...]     minutes on one core; with names: these alone, nothing is written
    python benchmarks/families.py --docs           writes the page again from families.json

A family is a tiny random model of a class of transformers, built in code, with a tiny tokenizer. Each is taken from a
corpus to a verified and measured checkpoint by the stages of `vocabext run`, and compared with plain runs of its class.
A thing that neither works nor is refused in one line is a FAULT; the exit code is 1 then.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "support"))  # the tiny models are those of the tests

from tiny_families import FAMILIES, OTHER_KINDS, READERS, UNREADABLE, add_adapter, of_kind, tiny_family  # noqa: E402

from vocabext import __version__  # noqa: E402
from vocabext.checkpoint.architecture import Quiet, loading_class, read_config  # noqa: E402
from vocabext.checkpoint.folder import Rows, load_rows  # noqa: E402
from vocabext.corpus import Document  # noqa: E402
from vocabext.errors import UsageError, VocabextError  # noqa: E402
from vocabext.evaluate.stage import RowSet, evaluate, evaluate_folder  # noqa: E402
from vocabext.files.atomic import atomic_file, write_json  # noqa: E402
from vocabext.inspect import inspect_model  # noqa: E402
from vocabext.model.frozen import FrozenModel, load_model, relative_difference  # noqa: E402
from vocabext.model.support import check_runs  # noqa: E402
from vocabext.options import DistillConfig, EvalConfig, MineConfig  # noqa: E402
from vocabext.run import RunConfig, run  # noqa: E402
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, load_base, load_expanded  # noqa: E402
from vocabext.tokens import Expansion, Ids  # noqa: E402

FOUND, PAGE = ROOT / "benchmarks" / "families.json", ROOT / "docs" / "families.md"
# Column -> what the page says about it.
COLUMNS = {
    "plain text": "on text without new tokens, the largest relative difference between base and expanded in any "
                  "measure of `eval` (nats per piece, bits per byte of reading and, with rows that are never written, "
                  "of writing); lengths are the same. Where logits are bounded every row can be written, and writing "
                  "is not compared",
    "logits": "the largest relative difference between our logits and those of the class in transformers: of the base, "
              "and of the expanded folder on text with new tokens",
    "generate": "of how many prompts our greedy text is that of `generate`: of the base, and of the expanded folder",
    "distill": "rows are trained, and no token is worse on held-out snippets than the mean of its pieces",
    "eval": "held-out text is measured, and the base's nats are the loss of the class",
    "verify": "every check but the one in vLLM is made, and passes",
    "second expansion": "`run` on the expanded folder",
}
YES, FAULT, REFUSED = "yes", "FAULT: ", "refused: "
# float32 sums in another order differ by this at most, relative to all of them together.
ROUNDING = 1e-4
NUM_TOKENS, TEXT_IDS, PROMPT_IDS, WRITTEN = 6, 100, (40, 21, 3), 24
CPU = {"device": "cpu", "dtype": "float32"}
WORDS = "the heart muscle and the heart rate of a muscle are rated so the rest of the heart rates".split()
# What a reader must get right, where the config's own numbers (below) do not say it.
SPECIAL = {
    "gpt2": "learned positions", "opt": "learned positions, narrow embeddings", "xglm": "sinusoids",
    "bloom": "ALiBi", "mpt": "ALiBi", "falcon-alibi": "ALiBi", "phi": "a head with a bias", "lfm2": "convolutions",
    "gpt-neo": "window 16, learned positions", "falcon-h1": "states that run on",
    "recurrent-gemma": "states that run on", "mamba": "states that run on", "rwkv": "states that run on",
    "bert-decoder": "learned positions, more than a head", "minicpm3": "scaled states",
    "modernbert-decoder": "more than a head",
}
NUMBERS = {
    "sliding_window": "window {}", "attention_window_size": "window {}", "attention_chunk_size": "chunks of {}",
    "logits_scaling": "logits / {:g}", "logit_scale": "logits * {:g}", "lm_head_multiplier": "logits * {:g}",
    "final_logit_softcapping": "logits within {:g}", "logits_soft_cap": "logits within {:g}",
    "embedding_multiplier": "embeddings * {:g}", "hidden_size_per_layer_input": "layers look ids up",
}


def main() -> int:
    """Try every family, print its cells, and write the JSON and the page."""
    arguments = _parse()
    if arguments.docs:
        found = json.loads(FOUND.read_text(encoding="utf-8"))
    else:
        names = arguments.families or [*FAMILIES, *READERS, *UNREADABLE]
        found = {"families": {name: _tried(name) for name in names}, "kinds": _kinds(), "machine": describe(
            torch.device("cpu")), "vocabext": __version__, "libraries": {
                name: version(name) for name in ("torch", "transformers", "tokenizers")}}
    if not arguments.families:
        write_json(FOUND, found)
        with atomic_file(PAGE) as file:
            file.write(page(found))
    _say("\n".join(faults(found)) or "no fault")
    return 1 if faults(found) else 0


def faults(found: Mapping[str, Any]) -> list[str]:
    """Return what neither works nor is refused."""
    return [f"{name}: {cell}" for name, cells in [*found["families"].items(), ("kinds", found["kinds"])]
            for cell in cells.values() if cell.startswith(FAULT)]


def _tried(name: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        cells = Family(name, Path(folder)).cells()
    _say(f"{name}: {json.dumps(cells, ensure_ascii=False)}")
    return cells


# -- one family ---------------------------------------------------------------------------------------------------

class Family:
    """A tiny model of a family, what `run` makes of it, and what its own class says."""

    def __init__(self, name: str, folder: Path) -> None:
        """Build the model and a corpus."""
        self.name, self.folder = name, folder
        self.base, self.new = tiny_family(folder / "BASE", name, noise=0.1), folder / "NEW"
        self.corpus = folder / "corpus.jsonl"
        rng = random.Random(0)
        self.documents = [Document(f"d{i}", " ".join(rng.choices(WORDS, k=80)) + f" {i}") for i in range(60)]
        self.corpus.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in self.documents))

    def cells(self) -> dict[str, str]:
        """Do each thing; say of each what came of it."""
        cells = {"what it takes": traits(self.name, read_config(self.base, trust_remote_code=False))}
        cells["distill"] = self._cell(lambda: self.run("distill"))
        if cells["distill"] != YES:  # what is left is extended by means
            self._cell(lambda: self.run("mean"))
        for column, measure in {
            "plain text": self.plain_text, "logits": self.logits, "generate": self.generate, "eval": self.eval,
            "verify": self.verify, "second expansion": self.again,
        }.items():
            cells[column] = self._cell(measure)
        return {key: cells[key] for key in ("what it takes", *COLUMNS)}

    def _cell(self, measure: Callable[[], str]) -> str:
        return attempt(measure, self.folder)

    def run(self, method: str) -> str:
        """Walk all stages."""
        rounds = 1 if method == "distill" else None
        config = DistillConfig(method=method, rounds=rounds, **CPU)
        run(RunConfig(str(self.base), (str(self.corpus),), self.new, mine=MineConfig(NUM_TOKENS, min_count=4),
                      distill=config, evaluate=EvalConfig(**CPU), force=True))
        if method == "mean":
            return YES
        tokens, _, header = load_rows(self.rows_path)
        worse = [report for report in header["per_token"] if not report["end_error"] <= report["start_error"]]
        return f"{FAULT}{len(worse)} of {len(tokens)} tokens are worse than their means" if worse else YES

    @property
    def rows_path(self) -> Path:
        """What `distill` made."""
        return self.folder / "NEW-work" / "rows.safetensors"

    @cached_property
    def model(self) -> FrozenModel:
        """The base as vocabext runs it."""
        check_runs(self.base)
        return load_model(self.base, **CPU)

    @cached_property
    def tokenizer(self) -> BaseTokenizer:
        """The base's tokenizer."""
        return load_base(self.base)

    @cached_property
    def expanded(self) -> ExpandedTokenizer:
        """The tokenizer of the expanded folder."""
        tokens, _, _ = load_rows(self.rows_path)
        return load_expanded(self.new, Expansion(tokens, self.tokenizer.first_new_id))

    @cached_property
    def stored(self) -> Rows:
        """The rows of the new tokens, as a class that loads the folder has them."""
        first = self.tokenizer.first_new_id
        new = slice(first, first + len(self.expanded.expansion.tokens))
        theirs = own_class(self.new)
        head = theirs.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return Rows(theirs.get_input_embeddings().weight.detach()[new], head.weight.detach()[new],
                    None if bias is None else bias.detach()[new])

    def ids(self, size: int, *, expanded: bool) -> Ids:
        """Return text of so many ids."""
        text = " ".join(document.text for document in self.documents)
        found = self.expanded.encode(text) if expanded else self.tokenizer.encode(text)
        return np.asarray(found[:size], np.int64)

    def plain_text(self) -> str:
        """Compare base and expanded on text that holds no new token."""
        rng = random.Random(1)
        documents = [Document(f"p{i}", "".join(rng.choices("bcdfghjklmnpqrstvwxyz .", k=500))) for i in range(4)]
        own = evaluate_folder(self.new, str(self.base), documents, EvalConfig(**CPU))
        tokens = self.expanded.expansion.tokens
        rows = torch.zeros(len(tokens), self.model.embedding_VD.shape[1])
        never = RowSet("never", self.stored.input_ND, rows, torch.full((len(tokens),), -1e4))
        silent = evaluate(documents, self.model, self.tokenizer, self.expanded, [never], EvalConfig(prompts=0))
        measures = ("target_nll_nats", "bits_per_byte", "bits_per_byte_writing")
        found = [difference(own, measures[:2]),
                 difference(silent, measures[: 3 if self.model.logit_map.cap is None else 2])]
        return rounding(max(found))

    @torch.no_grad()
    def logits(self) -> str:
        """Compare our logits with the class's."""
        first = self.tokenizer.first_new_id
        plain, merged = (torch.from_numpy(self.ids(TEXT_IDS, expanded=kind))[None] for kind in (False, True))
        assert bool((merged >= first).any())
        found = []
        for ids, folder, rows in ((plain, self.base, None), (merged, self.new, self.stored)):
            hidden_TD = self.model.hidden(self.model.embed(ids, None if rows is None else rows.input_ND, first))[0]
            output_ND, bias_N = (None, None) if rows is None else (rows.output_ND, rows.bias_N)
            ours = self.model.logits(hidden_TD, first_new_id=first, new_rows_ND=output_ND, new_bias_N=bias_N)
            theirs = own_class(folder)(input_ids=ids, use_cache=False).logits[0, :, : ours.shape[1]]
            found.append(relative_difference(ours, theirs))
        return rounding(max(found))

    @torch.no_grad()
    def generate(self) -> str:
        """Compare our greedy text with the class's."""
        from vocabext.evaluate.decode import write_on

        first, same, of = self.tokenizer.first_new_id, 0, 0
        for folder, rows in ((self.base, None), (self.new, self.stored)):
            theirs = own_class(folder)
            last = first + (0 if rows is None else len(rows.input_ND))
            unused = [*range(last, theirs.get_output_embeddings().weight.shape[0])] or None
            prompts = [self.ids(size, expanded=rows is not None) for size in PROMPT_IDS]
            ours = write_on(self.model, prompts, self.expanded.expansion, rows, num_pieces=WRITTEN)
            for prompt, written in zip(prompts, ours, strict=True):
                ids = torch.from_numpy(prompt)[None]
                own = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                      max_new_tokens=len(written.ids), suppress_tokens=unused, pad_token_id=0)
                same += written.ids == own[0, len(prompt) :].tolist()
                of += 1
        return f"{same} of {of}" if same == of else f"{FAULT}{same} of {of} prompts"

    @torch.no_grad()
    def eval(self) -> str:
        """Measure held-out text, and compare the base's nats with the class's loss."""
        path = self.new / "eval.json"
        if not path.is_file():  # `run` says why; so does the verb
            evaluate_folder(self.new, str(self.base), self.documents, EvalConfig(**CPU))
        document = Document("d", self.tokenizer.decode(self.ids(TEXT_IDS, expanded=False).tolist()))
        found = evaluate_folder(self.new, str(self.base), [document], EvalConfig(**CPU))
        rows: Any = {row["name"]: row for row in found["rows"]}  # type: ignore[attr-defined]
        ids = torch.tensor([[*self.tokenizer.prefix_ids, *self.tokenizer.encode(document.text)]])
        skipped = max(1, len(self.tokenizer.prefix_ids))
        logits = own_class(self.base)(input_ids=ids, use_cache=False).logits[0, skipped - 1 : -1]
        logits = logits[:, : self.tokenizer.first_new_id]
        loss = float(torch.nn.functional.cross_entropy(logits.double(), ids[0, skipped:]))
        wrong = abs(rows["base"]["target_nll_nats"] - loss) > ROUNDING * loss
        bad = [name for name, row in rows.items() if not math.isfinite(row["bits_per_byte"])]
        return f"{FAULT}nats of base are {rows['base']['target_nll_nats']}, its loss {loss}" if wrong else \
            f"{FAULT}{', '.join(bad)} cannot be measured" if bad else YES

    def verify(self) -> str:
        """Say which checks did not pass."""
        found = json.loads((self.new / "verify.json").read_text())
        said = [f"{check['name']}: {check['detail']}" for check in found["checks"]
                if check["verdict"] != "pass" and "vLLM" not in check["name"]]
        return FAULT + "; ".join(said) if said or not found["passed"] else YES

    def again(self) -> str:
        """Expand the expanded folder."""
        run(RunConfig(str(self.new), (str(self.corpus),), self.folder / "AGAIN", mine=MineConfig(2, min_count=4),
                      distill=DistillConfig(method="mean")))
        return YES


def attempt(measure: Callable[[], str], folder: Path) -> str:
    """Return what a measure says, or with which line the user is refused; anything else is a fault."""
    try:
        with Quiet():
            return measure()
    except VocabextError as error:
        said = str(error).replace(f"{folder}/", "")
        return f"{FAULT}several lines: {said!r}" if "\n" in said else REFUSED + said
    except Exception as error:
        traceback.print_exc()
        return f"{FAULT}{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"


def own_class(folder: Path) -> Any:
    """Load a folder as any user of transformers does."""
    loader = loading_class(read_config(folder, trust_remote_code=False))
    return loader.from_pretrained(folder, dtype=torch.float32).eval()


def difference(found: Mapping[str, Any], measures: Sequence[str]) -> float:
    """Return by how much any row of an eval.json differs from base, relative to base."""
    base, *others = found["rows"]
    assert base["name"] == "base"
    if found["shorter"]["new_token_share"] or any(row["tokens"] != base["tokens"] for row in others):
        raise UsageError("text without new tokens has some")
    return max(abs(row[name] - base[name]) / abs(base[name]) for row in others for name in measures)


def rounding(value: float) -> str:
    """Return a difference; more than rounding is a fault."""
    shown = f"{value:.0e}".replace("e-0", "e-") if value else "0"
    return shown if value <= ROUNDING else f"{FAULT}{shown}"


def traits(name: str, config: Any) -> str:
    """Say what must be got right with a model."""
    text = config.get_text_config()
    windows = any("sliding" in kind for kind in getattr(text, "layer_types", None) or ["sliding"])
    found = [SPECIAL[name]] if name in SPECIAL else []
    for key, form in NUMBERS.items():
        value = getattr(text, key, None)
        if value and value != 1 and (key != "sliding_window" or windows):
            found.append(form.format(value))
    experts = any(getattr(text, key, None) for key in ("num_local_experts", "num_experts"))
    found += ["experts"] * bool(experts) + ["images"] * (text is not config)
    return ", ".join(dict.fromkeys(found))


# -- what is refused as a whole -----------------------------------------------------------------------------------

def _kinds() -> dict[str, str]:
    """Return what `inspect` says of models of other kinds."""
    found = {}
    for name in (*OTHER_KINDS, "an adapter"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "MODEL"
            add_adapter(path) if name == "an adapter" else of_kind(path, name)
            found[name] = attempt(lambda path=path: f"{FAULT}not refused: {inspect_model(str(path)).support}",
                                  Path(folder))
        _say(f"{name}: {found[name]}")
    return found


# -- the page -----------------------------------------------------------------------------------------------------

@dataclass
class Notes:
    """Numbers the lines with which users are refused, in the order in which they first come."""

    said: list[str]

    def of(self, cell: str) -> str:
        """Return a cell as the table shows it."""
        if not cell.startswith(REFUSED):
            return cell
        line = cell.removeprefix(REFUSED)
        if line not in self.said:
            self.said.append(line)
        return f"refused ({self.said.index(line) + 1})"


def page(found: Mapping[str, Any]) -> str:
    """Render docs/families.md."""
    notes, libraries = Notes([]), found["libraries"]
    families = [f"| {name} | {cells['what it takes']} | " + " | ".join(notes.of(cells[column]) for column in COLUMNS)
                + " |" for name, cells in found["families"].items()]
    kinds = [f"| {name} | {cell.removeprefix(REFUSED)} |" for name, cell in found["kinds"].items()]
    said = [f"{number}. {line}" for number, line in enumerate(notes.said, 1)]
    return "\n".join([
        "# Which models can be extended", "",
        "<!-- Written by benchmarks/families.py from families.json beside it. -->", "",
        "Tokens can be added to causal language models with safetensors and a [tokenizer that can grow](tokenizers.md)."
        " `vocabext inspect MODEL` says what can be done with yours. How a class computes is asked of the class itself,"
        " on a short text, whenever a model is loaded; a class that does something unknown is refused by name.",
        "", "## Tried", "",
        "Each is a tiny random model of a class of transformers, in float32, on texts longer than its windows. It went "
        "from a corpus to a measured checkpoint by `vocabext run`. The columns:", "",
        *(f"- *{column}*: {what}." for column, what in COLUMNS.items()), "",
        "| family | what it takes | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|", *families, "",
        "What is refused, and with which line. That a class computes otherwise (its logits differ from its own) is seen"
        " when its weights are loaded, which `run` does before mining; everything else before any work.", "", *said, "",
        "## Refused as a whole", "",
        "| model | `inspect` and every verb say |", "|---|---|", *kinds, "",
        f"Made by `python benchmarks/families.py` on {found['machine']['date']}, with vocabext {found['vocabext']}, "
        f"torch {libraries['torch']}, transformers {libraries['transformers']} and tokenizers "
        f"{libraries['tokenizers']}.", ""])


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--docs", action="store_true", help="write the page again from what is committed")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
