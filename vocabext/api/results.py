"""What the stages return: tables that can be saved, loaded and shown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from vocabext.api.voice import spelled
from vocabext.errors import MissingExtraError, UsageError
from vocabext.files.atomic import check_output, read_object
from vocabext.tables import Shown, Table
from vocabext.tokens import NewToken, TokenSnippets

if TYPE_CHECKING:
    import pandas

    from vocabext.checkpoint.folder import Rows
    from vocabext.distill import DistillResult
    from vocabext.mine.stage import MineResult

Item = TypeVar("Item")


class _Saved(Shown):
    """A result with a header, which its command writes to a file of one kind.

    Attributes:
        header: What the result was made from and how; the header of the file.
    """

    header: dict[str, Any]

    @spelled
    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the file that the command of the same stage writes.

        Args:
            path: The file.
            force: Replace it if it is there.

        Raises:
            OutputExistsError: If the file is there and `force` is false.
        """
        for target in self._files(Path(path)):
            check_output(target, force=force)
        self._write(Path(path))

    @classmethod
    @spelled
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save`, or the command of the same stage, has written.

        Raises:
            UsageError: If the file is missing, damaged or another artifact.
            CheckpointError: If it holds rows and is damaged.
        """
        found = cls._read(Path(path))
        # What a file says about its own format is no part of the header; `save` writes it again.
        found.header = {key: value for key, value in found.header.items() if key not in ("artifact", "version")}
        return found

    def _files(self, path: Path) -> tuple[Path, ...]:
        """Return the files that `_write` writes."""
        return (path,)

    def _write(self, path: Path) -> None:
        raise NotImplementedError

    @classmethod
    def _read(cls, path: Path) -> Self:
        raise NotImplementedError


class _Records(_Saved, Sequence[Item]):
    """A sequence of records with a header."""

    _items: tuple[Item, ...]

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        return self._items[index]


class TokenTable(_Records[NewToken]):
    """New tokens, best first: what `Model.mine` returns and `vocabext mine` writes.

    A sequence of `NewToken`, each with `token` (its text), `run` (the base ids it stands for), `count` (how often the
    expanded tokenizer makes it in the corpus), `sections` (in how many documents, or parts of long ones) and `saved`
    (tokens saved there, given those before it). The first one gets the first free token id. A slice is a `TokenTable`
    as well.

    Attributes:
        header: What the tokens were mined from and how: the first line of candidates.jsonl.
        result: What was mined, with the curve of savings and what was rejected; None if the table was loaded or cut.

    Example:
        ```python
        tokens = vocabext.load("examples/model").mine("notes.jsonl", budget=100)
        tokens.save("candidates.jsonl")
        tokens[0].token, tokens[0].run
        tokens[:50].to_pandas()
        ```
    """

    def __init__(self, tokens: Iterable[NewToken], header: dict[str, Any], result: "MineResult | None" = None) -> None:
        self._items, self.header, self.result = tuple(tokens), header, result

    @overload
    def __getitem__(self, index: int) -> NewToken: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenTable": ...
    def __getitem__(self, index: int | slice) -> "NewToken | TokenTable":
        if isinstance(index, int):
            return self._items[index]
        # The other keys were measured with all tokens together.
        kept = ("base", "options", "corpus", "left_out", "documents", "base_tokens")
        return TokenTable(self._items[index], {key: self.header[key] for key in kept if key in self.header})

    def _write(self, path: Path) -> None:
        from vocabext.mine.stage import save_candidates

        save_candidates(path, self._items, self.header)

    @classmethod
    def _read(cls, path: Path) -> Self:
        from vocabext.mine.stage import read_candidates

        header, tokens = read_candidates(path)
        return cls(tokens, header)

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with the columns token, run, count, sections and saved, a line per token in token-id order.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        return _frame([{"token": t.token, "run": t.run, "count": t.count, "sections": t.sections, "saved": t.saved}
                       for t in self])

    def _table(self) -> Table:
        title = f"{len(self):,} new tokens for {self.header['base'].get('model')}"
        if "expanded_tokens" in self.header:
            shorter = 1 - self.header["expanded_tokens"] / self.header["base_tokens"]
            title += f"; they make the mined text {shorter:.1%} shorter"
        return Table(title, ("token", "pieces", "count", "sections", "saved"),
                     [(repr(t.token), len(t.run), t.count, t.sections, t.saved) for t in self])


class ChosenTokens(TokenTable):
    """Tokens that save most for what they cost: what `Model.choose` returns and `vocabext choose` writes.

    A `TokenTable` of the chosen tokens, for `Model.collect`.

    Attributes:
        document: The content of choice.json: what every candidate saves and costs, and the curve.

    Example:
        ```python
        chosen = base.choose(rows, "kept.jsonl", budget=500, max_loss=0.05)
        chosen.save("chosen.jsonl")     # and choice.json beside it
        rows = base.distill(base.collect(chosen, "notes.jsonl"))
        ```
    """

    def __init__(self, tokens: Iterable[NewToken], header: dict[str, Any], document: dict[str, Any]) -> None:
        super().__init__(tokens, header)
        self.document = document

    def _files(self, path: Path) -> tuple[Path, ...]:
        from vocabext.choose.stage import CHOICE_NAME

        return path, path.with_name(CHOICE_NAME)

    def _write(self, path: Path) -> None:
        from vocabext.choose.stage import ChosenSet, write_choice

        write_choice(path, ChosenSet(self._items, self.document), self.header)

    @classmethod
    def _read(cls, path: Path) -> Self:
        from vocabext.choose.stage import CHOICE_NAME

        tokens, beside = TokenTable._read(path), path.with_name(CHOICE_NAME)
        if (document := read_object(beside)) is None:
            raise UsageError(f"{beside} is missing or damaged, and it says what the tokens of {path} cost; read the "
                             "tokens alone with TokenTable.load")
        return cls(tokens, tokens.header, document)

    def to_json(self) -> dict[str, Any]:
        """Return the content of choice.json."""
        return self.document

    def _table(self) -> Table:
        found = self.document["chosen"]
        title = (f"{len(self):,} of {self.document['candidates']:,} candidates; they save {found['saved_share']:.1%} "
                 f"and lose {found['loss_bits_per_byte']:.4f} bits per byte")
        return Table(title, ("token", "uses", "saved", "nats per use"), [
            (repr(row["token"]), row["uses"], row["saved"], row["loss_nats_per_use"])
            for row in self.document["tokens"] if row["kept"]])


class Snippets(_Records[TokenSnippets]):
    """Places of a corpus where new tokens occur: what `Model.collect` returns and `vocabext collect` writes.

    A sequence with one `TokenSnippets` per token, in token-id order: `new_token`, `snippets` (windows of expanded
    token ids) and `positions` (where in each the token is).

    Attributes:
        header: What the snippets were collected from and how: the first line of snippets.jsonl.

    Example:
        ```python
        snippets = base.collect(tokens, "notes.jsonl", snippets=25)
        snippets.short        # tokens that the corpus hardly holds
        snippets.save("snippets.jsonl")
        ```
    """

    def __init__(self, records: Iterable[TokenSnippets], header: dict[str, Any]) -> None:
        self._items, self.header = tuple(records), header

    @property
    def short(self) -> list[str]:
        """The tokens with fewer snippets than the option `min_snippets` asks for."""
        return list(self.header.get("short", ()))

    def _write(self, path: Path) -> None:
        from vocabext.collect import save_snippets

        save_snippets(path, self._items, self.header)

    @classmethod
    def _read(cls, path: Path) -> Self:
        from vocabext.collect import read_snippets

        header, records = read_snippets(path)
        return cls(records, header)

    def _table(self) -> Table:
        number = sum(len(record.snippets) for record in self)
        title = f"{number:,} snippets for {len(self):,} tokens, {len(self.short):,} of them short of text"
        return Table(title, ("token", "snippets", "occurrences", "inside longer tokens", "written by the model"), [
            (repr(r.new_token.token), len(r.snippets), r.occurrences, r.num_inside, r.num_generated) for r in self])


class NewRows(_Saved):
    """Rows of the new tokens: what `Model.distill` returns and `vocabext distill` writes.

    Attributes:
        tokens: The tokens that have rows (N), in token-id order; those that were left out are not among them.
        input_ND: The rows for the embedding, a float32 tensor of shape (N, D).
        output_ND: The rows for the head, a float32 tensor of shape (N, D); None if `Model.patch` chooses them.
        header: What the rows were made from and how: the header in rows.safetensors.
        result: Everything that was measured on the way; None if the rows were loaded.

    Example:
        ```python
        rows = base.distill(snippets, epochs=2)
        rows.input_ND.shape, rows.left_out
        rows.save("rows.safetensors")
        base.patch(rows, "expanded")
        ```
    """

    def __init__(self, tokens: Iterable[NewToken], rows: "Rows", header: dict[str, Any],
                 result: "DistillResult | None" = None) -> None:
        self.tokens, self.header, self.result = tuple(tokens), header, result
        self.input_ND, self.output_ND = rows.input_ND, rows.output_ND

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def reports(self) -> list[dict[str, Any]]:
        """What became of each token: snippets, errors (mean squared, held out), and whether the model writes it."""
        return list(self.header.get("per_token", ()))

    @property
    def left_out(self) -> list[dict[str, Any]]:
        """The tokens that the model cannot represent as one row, with the reason."""
        return list(self.header.get("left_out", ()))

    def _write(self, path: Path) -> None:
        from vocabext.checkpoint.folder import Rows, save_rows

        save_rows(path, self.tokens, Rows(self.input_ND, self.output_ND), self.header)

    @classmethod
    def _read(cls, path: Path) -> Self:
        from vocabext.checkpoint.folder import load_rows

        return cls(*load_rows(path))

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the reports as a table, one line per token in token-id order.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        return _frame(self.reports)

    def _table(self) -> Table:
        error = self.header.get("relative_error")
        title = (f"{len(self):,} rows of width {self.input_ND.shape[1]:,} by {self.header.get('method')}, "
                 f"{len(self.left_out):,} tokens left out")
        if error is not None:
            title += f"; error {error:.1%} of that of the mean of pieces"
        return Table(title, ("token", "snippets", "error at start", "error", "written"), [
            (repr(r["token"]), r.get("snippets"), r.get("start_error"), r.get("end_error"), r.get("writes"))
            for r in self.reports])


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """How well a model reads and writes held-out text with its new tokens: what `Expanded.evaluate` returns.

    Attributes:
        document: The content of eval.json.

    Example:
        ```python
        found = new.evaluate("heldout.jsonl")
        found.passed, found.shorter_share, found.gap_recovered
        found.to_json()["rows"]     # bits per byte of base, mean of pieces and distilled
        ```
    """

    document: dict[str, Any]

    @property
    def passed(self) -> bool | None:
        """Whether the rows read better than the mean of pieces: the 95 % interval of the gap recovered is above 0.

        None if the rows are the mean of their pieces, or if that loses nothing.
        """
        interval = self.document["gap_recovered_interval"]
        return None if interval is None else interval[0] > 0

    @property
    def gap_recovered(self) -> float | None:
        """The share of what the mean of pieces loses that the rows get back; None as for `passed`."""
        found: float | None = self.document["gap_recovered"]
        return found

    @property
    def shorter_share(self) -> float:
        """By which share the text has fewer tokens."""
        lengths = self.document["shorter"]
        return 1 - float(lengths["expanded_tokens"]) / float(lengths["base_tokens"])

    def to_json(self) -> dict[str, Any]:
        """Return the content of eval.json."""
        return self.document

    def _table(self) -> Table:
        gap = "" if self.gap_recovered is None else f"; {self.gap_recovered:.1%} of the gap recovered"
        number = self.document["documents"]
        title = (f"{number:,} document{'' if number == 1 else 's'}, {self.document['bytes']:,} bytes: "
                 f"{self.shorter_share:.1%} shorter{gap}")
        return Table(title, ("rows", "nats per piece", "bits per byte, reading", "bits per byte, writing"), [
            (row["name"], row["target_nll_nats"], row["bits_per_byte"], row["bits_per_byte_writing"])
            for row in self.document["rows"]])


def _frame(rows: list[dict[str, Any]]) -> "pandas.DataFrame":
    try:
        import pandas
    except ModuleNotFoundError:
        raise MissingExtraError("pandas", "pandas") from None
    return pandas.DataFrame(rows)
