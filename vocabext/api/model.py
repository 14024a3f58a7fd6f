"""A base model with a method for each stage, and an expanded model."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vocabext.api.corpus import Corpus, open_corpus
from vocabext.api.results import ChosenTokens, Evaluation, NewRows, Snippets, TokenTable
from vocabext.api.voice import Voice, check_names, python_voice, spelled, takes
from vocabext.errors import UsageError
from vocabext.files.links import AUTO
from vocabext.options import ChooseConfig, CollectConfig, DistillConfig, EvalConfig, HealConfig, MineConfig, pick
from vocabext.tokens import Expansion, NewToken, TokenSnippets

if TYPE_CHECKING:
    from vocabext.checkpoint.manifest import Manifest
    from vocabext.checkpoint.verdicts import Verification
    from vocabext.diff import Difference
    from vocabext.inspect import Inspection
    from vocabext.patch.stage import PatchResult
    from vocabext.revert import RevertResult
    from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer


@spelled
def load(model: str | Path, *, trust_remote_code: bool = False, verbose: bool | None = None) -> "Model":
    """Open a base model: a folder or hub id. No weights are loaded; a hub id is downloaded into the hub cache.

    Args:
        model: The folder or hub id.
        trust_remote_code: Run Python code that comes with the model. Only for models you trust.
        verbose: Show progress bars; None shows them in notebooks only. Remarks go to the logger `vocabext`.

    Raises:
        UsageError: If there is no such model.
        CheckpointError: If the folder is no model folder, or the hub cannot be reached.
    """
    found = Model(model, trust_remote_code=trust_remote_code, voice=python_voice(verbose))
    _ = found.folder
    return found


class Model:
    """A base model, which is never changed: what `vocabext.load` returns.

    Each stage is a method. It takes what the one before it returned, or the path of the file that this was saved to.

    Attributes:
        name: The folder or hub id, as it was given.
        trust_remote_code: Whether code that comes with the model may run.
        voice: Where calls report.

    Example:
        ```python
        import vocabext

        base = vocabext.load("examples/model")
        texts = [vocabext.Document(f"note {i}", f"{i} asynchronous generators") for i in range(20)]
        tokens = base.mine(texts, budget=1)     # or a path: "notes/*.jsonl"
        rows = base.distill(tokens, method="mean")
        new = base.patch(rows, "expanded")
        ```
    """

    def __init__(self, name: str | Path, *, trust_remote_code: bool = False, voice: Voice | None = None) -> None:
        self.name, self.trust_remote_code, self.voice = str(name), trust_remote_code, voice or python_voice()

    def __repr__(self) -> str:
        return f"<vocabext.Model {self.name!r}>"

    @cached_property
    def folder(self) -> Path:
        """The folder of the model."""
        from vocabext.checkpoint.folder import resolve_model

        return resolve_model(self.name)

    @property
    @spelled
    def tokenizer(self) -> "BaseTokenizer":
        """The tokenizer: `encode` a text, `decode` ids, and `new_token` for a word of your own.

        Raises:
            TokenizerError: If there is none that can be extended.
            UsageError: If the model was expanded already.
        """
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> "BaseTokenizer":
        from vocabext.tokenizer import load_base

        return load_base(self.folder, trust_remote_code=self.trust_remote_code)

    @spelled
    def inspect(self) -> "Inspection":
        """Return rows, ids and tokenizer of the model, and what can be done with it.

        Raises:
            UnsupportedError: If no tokens can be added to it.
        """
        from vocabext.inspect import inspect_model

        return inspect_model(self.name, trust_remote_code=self.trust_remote_code)

    @takes(MineConfig)
    @spelled
    def mine(self, corpus: Corpus, *, text_field: str = "text", **options: Any) -> TokenTable:
        """Find the words and phrases of a corpus that are worth a token.

        Args:
            corpus: A file, folder, glob or hub dataset, or a list of these; or texts in memory: any other iterable
                of `str`, of `vocabext.Document`, or of records with a text. A list of `str` is a list of paths.
            text_field: The field that holds the text of a record.
            **options: The fields of `MineConfig`, such as `budget` (None takes the knee of the curve of savings).

        Returns:
            The tokens, best first.

        Raises:
            UsageError: If the corpus yields fewer tokens than the budget, or an option is out of its range.
            CorpusError: If the corpus cannot be read, or holds no text.
            CheckpointError: If tokens cannot be added to this model.
        """
        from vocabext.corpus import left_out_of
        from vocabext.mine.stage import candidates_header, mine
        from vocabext.model.support import check_patchable, holds_weights

        check_names(options, MineConfig)
        config = pick(MineConfig, options)
        documents, sources = open_corpus(corpus, text_field, self.voice)
        base = self._tokenizer
        if holds_weights(self.folder):  # a folder without weights is a tokenizer, of whatever model
            check_patchable(self.folder, base.first_new_id, num_new=config.budget or 1,
                            trust_remote_code=self.trust_remote_code)
        result = mine(documents, base, config, self.voice.progress)
        return TokenTable(result.tokens, candidates_header(
            result, base, model=self.name, config=config, corpus=sources, left_out=left_out_of(documents)), result)

    @takes(CollectConfig)
    @spelled
    def collect(
        self, tokens: TokenTable | str | Path, corpus: Corpus, *, text_field: str = "text", **options: Any
    ) -> Snippets:
        """Sample places of a corpus where new tokens occur.

        Args:
            tokens: What `mine` returned, or its file.
            corpus: As for `mine`; commonly the same.
            text_field: The field that holds the text of a record.
            **options: The fields of `CollectConfig`, such as `snippets` (per token) and `window` (in base ids).

        Returns:
            Snippets of each token, in the order of the tokens. Some may have none; `Snippets.short` names them.

        Raises:
            UsageError: If the tokens were made for another model, or an option is out of its range.
            CorpusError: If the corpus cannot be read, or holds no text.
        """
        from vocabext.collect import collect, generate_missing, short_of_snippets, snippets_header
        from vocabext.corpus import left_out_of
        from vocabext.model.support import check_loads
        from vocabext.tokenizer import check_made_for

        check_names(options, CollectConfig)
        config = pick(CollectConfig, options)
        table = tokens if isinstance(tokens, TokenTable) else TokenTable.load(tokens)
        documents, sources = open_corpus(corpus, text_field, self.voice)
        if config.generate_missing:
            check_loads(self.folder, trust_remote_code=self.trust_remote_code)
        base = self._tokenizer
        check_made_for(table.header, base, "the table" if isinstance(tokens, TokenTable) else tokens)
        records = collect(documents, base, table, config, self.voice.progress)
        if config.generate_missing and short_of_snippets(records, config):
            from vocabext.model.frozen import load_model

            frozen = load_model(self.folder, trust_remote_code=self.trust_remote_code, runs=False)
            records = generate_missing(records, frozen, base, config, self.voice.progress)
        return Snippets(records, snippets_header(records, table.header, config=config, corpus=sources,
                                                 left_out=left_out_of(documents)))

    @takes(DistillConfig)
    @spelled
    def distill(
        self, snippets: Snippets | TokenTable | str | Path, *, output: str | Path | None = None, force: bool = False,
        **options: Any,
    ) -> NewRows:
        """Make the rows of new tokens: input rows, and output rows where the model can have some of their own.

        Args:
            snippets: What `collect` returned, or its file; with `method="mean"`, which reads no text, a table of
                tokens will do.
            output: Write rows.safetensors there as well. An interrupted call with an output goes on where it stopped.
            force: Replace `output` if it is there.
            **options: The fields of `DistillConfig`, such as `method`, `epochs` and `device`.

        Returns:
            One row of width D per token that the model can represent, float32, and a report for each token.

        Raises:
            UsageError: If the snippets were made for another model, or an option is out of its range.
            CheckpointError: If the model cannot be run, or tokens cannot be added to it.
            OutputExistsError: If `output` is there and `force` is false.
        """
        from vocabext.distill import make_rows
        from vocabext.distill.stage import read_records
        from vocabext.files.atomic import check_output

        check_names(options, DistillConfig)
        config = pick(DistillConfig, options)
        target = None if output is None else Path(output)
        if target is not None:
            check_output(target, force=force)
        if isinstance(snippets, str | Path):
            header, records = read_records(Path(snippets), config)
            source: object = snippets
        else:
            records, header, source = _records(snippets, config), snippets.header, "the table"
        result, new_header = make_rows(
            header, records, self.name, config, output=target, source=source,
            trust_remote_code=self.trust_remote_code, progress=self.voice.progress, say=self.voice.say)
        return NewRows([records[i].new_token for i in result.kept], result.rows, new_header, result)

    @takes(ChooseConfig)
    @spelled
    def choose(
        self, rows: NewRows | str | Path, corpus: Corpus, *, budget: int, heldout: Corpus = (),
        text_field: str = "text", **options: Any,
    ) -> ChosenTokens:
        """Choose the tokens that save most for what they cost.

        Args:
            rows: Rows of more tokens than are wanted, distilled cheaply: what `distill` returned, or its file.
            corpus: Text that was kept back: nothing that was mined or distilled from. Costs are measured on it.
            budget: Most tokens to take.
            heldout: Other text; the curve of savings against loss is measured on it. Empty draws none.
            text_field: The field that holds the text of a record.
            **options: The fields of `ChooseConfig`, such as `max_loss`.

        Raises:
            UsageError: If the rows were made for another model, if there are fewer than the budget, or if no set of
                tokens loses as little as `max_loss` allows.
            CorpusError: If there is no text.
            CheckpointError: If the model cannot be run.
        """
        from vocabext.checkpoint.folder import load_rows
        from vocabext.choose.stage import choose
        from vocabext.corpus import left_out_of
        from vocabext.model.frozen import load_model, offloading
        from vocabext.model.support import check_runs
        from vocabext.tokenizer import check_made_for

        check_names(options, ChooseConfig)
        config = pick(ChooseConfig, options)
        if isinstance(rows, NewRows):
            tokens, input_ND, header, source = rows.tokens, rows.input_ND, rows.header, "the rows"
        else:
            (tokens, made, header), source = load_rows(Path(rows)), str(rows)
            input_ND = made.input_ND
        documents, sources = open_corpus(corpus, text_field, self.voice)
        held_out = open_corpus(heldout, text_field, self.voice)[0] if heldout != () else ()
        check_runs(self.folder, trust_remote_code=self.trust_remote_code)
        check_made_for(header, self._tokenizer, source)
        with TemporaryDirectory(prefix="vocabext-") as scratch, offloading(Path(scratch) / "choose") as elsewhere:
            model = load_model(self.folder, device=config.device, dtype=config.dtype, max_memory=config.max_memory,
                               trust_remote_code=self.trust_remote_code, offload_folder=elsewhere)
            unfit = {one["token"]: one["left_out"] for one in header.get("left_out", ())}
            found = choose(tokens, input_ND, model, self._tokenizer, documents, held_out, config, budget=budget,
                           unfit=unfit, progress=self.voice.progress)
        return ChosenTokens(found.tokens, {
            "base": header["base"], "options": {**header.get("options", {}), **asdict(config)}, "corpus": sources,
            "left_out": left_out_of(documents)}, found.document)

    @spelled
    def patch(
        self, rows: NewRows | str | Path, output: str | Path, *, force: bool = False, link: str = AUTO,
        untie: bool = False,
    ) -> "Expanded":
        """Write a new model folder: this model with the new tokens and their rows.

        Plain transformers and plain vLLM load it. Rows that are in memory go through a temporary file.

        Args:
            rows: What `distill` returned, or its file.
            output: The folder to make.
            force: Replace a model folder that is there, once the new one is complete.
            link: How weights that stay as they are come into the new folder: `auto`, `hard` or `copy`.
            untie: Give a tied model an output head of its own, also where the output rows do not need one.

        Raises:
            OutputExistsError: If the folder is there and `force` is false.
            CheckpointError: If the rows were made for another model, or the disk is too full.
        """
        from vocabext.patch.stage import patch

        options: dict[str, Any] = {"force": force, "link": link, "untie": untie, "say": self.voice.say,
                                   "trust_remote_code": self.trust_remote_code, "progress": self.voice.progress}
        if isinstance(rows, NewRows):
            with TemporaryDirectory(prefix="vocabext-") as scratch:
                path = Path(scratch) / "rows.safetensors"
                rows.save(path)
                made = patch(path, self.name, Path(output), **options)
        else:
            made = patch(Path(rows), self.name, Path(output), **options)
        return Expanded(output, self, patched=made)


class Expanded:
    """A model with new tokens, in a folder: what `Model.patch` and `vocabext.expand` return.

    Attributes:
        folder: The folder.
        base: The model that it was made from.
        patched: What `Model.patch` did: sizes, files, ids. None for a folder that was there already.

    Example:
        ```python
        new = vocabext.Expanded.load("expanded")
        new.verify().passed
        new.evaluate("heldout.jsonl")
        ids = new.tokenizer.encode("Dilated cardiomyopathy")
        new.expansion.unmerge(ids)      # what the tokenizer of the base makes of the text
        ```
    """

    def __init__(self, folder: str | Path, base: Model, *, patched: "PatchResult | None" = None) -> None:
        self.folder, self.base, self.voice, self.patched = Path(folder), base, base.voice, patched

    def __repr__(self) -> str:
        return f"<vocabext.Expanded {str(self.folder)!r}, made from {self.base.name!r}>"

    @classmethod
    @spelled
    def load(cls, folder: str | Path, base: "Model | str | Path | None" = None, *, trust_remote_code: bool = False,
             verbose: bool | None = None) -> "Expanded":
        """Open a folder that `patch` has made.

        Args:
            folder: The folder.
            base: The model that it was made from; None takes the one that vocabext.json names. It is looked for when
                it is needed: by `verify`, `evaluate` and `diff`.
            trust_remote_code: As for `vocabext.load`.
            verbose: As for `vocabext.load`.

        Raises:
            UsageError: If there is no such folder.
            CheckpointError: If it is no expanded model.
        """
        from vocabext.checkpoint.manifest import read_manifest

        named = base if base is not None else read_manifest(Path(folder)).base.model
        if not isinstance(named, Model):
            named = Model(named, trust_remote_code=trust_remote_code, voice=python_voice(verbose))
        found = cls(folder, named)
        _ = found._manifest
        if base is None and Path(named.name).is_absolute() and not Path(named.name).is_dir():
            found.voice.say(f"{folder} was made from {named.name}, which is not there; to verify or evaluate it, pass "
                            "the base")
        return found

    @cached_property
    def _manifest(self) -> "Manifest":
        from vocabext.checkpoint.manifest import read_manifest

        return read_manifest(self.folder)

    @cached_property
    def expansion(self) -> Expansion:
        """The arithmetic on ids: `unmerge` turns expanded ids into base ids, `is_new` finds new ones."""
        return Expansion([record.new_token for record in self._manifest.tokens], self._manifest.first_new_id)

    @property
    def tokens(self) -> tuple[NewToken, ...]:
        """The new tokens, in token-id order."""
        return self.expansion.tokens

    @cached_property
    def tokenizer(self) -> "ExpandedTokenizer":
        """The tokenizer of the folder, as transformers loads it: `encode`, `encode_batch`, `decode`."""
        from vocabext.tokenizer import load_expanded

        return load_expanded(self.folder, self.expansion)

    @spelled
    def verify(
        self, corpus: Corpus | None = None, *, text_field: str = "text", full: bool = False,
        skip_weights: bool = False, vllm: bool = False, seed: int = 0,
    ) -> "Verification":
        """Check that the model means what its base meant, and write the verdicts to verify.json in the folder.

        Args:
            corpus: Text to try the invariant on, besides 20,000 generated texts; as for `Model.mine`.
            text_field: The field that holds the text of a record.
            full: Encode the whole corpus. Without it, 64 MB of a larger one, drawn at random.
            skip_weights: Do not load the two models to compare their logits.
            vllm: Load both models in vLLM, too, and compare what they write.
            seed: Seed of the generated texts, and of the sample.

        Returns:
            The verdicts. `passed` is false if anything is wrong; nothing is raised then.

        Raises:
            CorpusError: If a text cannot be read.
            CheckpointError: If the base is damaged.
        """
        from dataclasses import replace

        from vocabext.checkpoint.verdicts import VERIFY_NAME
        from vocabext.files.atomic import write_json
        from vocabext.verify.stage import verify

        documents = None if corpus is None else open_corpus(corpus, text_field, self.voice)[0]
        found = verify(self.folder, self.base.name, documents, trust_remote_code=self.base.trust_remote_code,
                       seed=seed, load_weights=not skip_weights, use_vllm=vllm, full=full, progress=self.voice.progress)
        write_json(self.folder / VERIFY_NAME, found.to_json())
        return replace(found, checks=tuple(replace(c, detail=self.voice.spell(c.detail)) for c in found.checks))

    @takes(EvalConfig)
    @spelled
    def evaluate(self, corpus: Corpus, *, text_field: str = "text", **options: Any) -> Evaluation:
        """Measure how well the model reads and writes held-out text, and write eval.json into the folder.

        Args:
            corpus: Held-out text, as for `Model.mine`: nothing that was mined or distilled from.
            text_field: The field that holds the text of a record.
            **options: The fields of `EvalConfig`, such as `max_bytes` (of text) and `prompts` (to continue).

        Returns:
            Base, mean of pieces and distilled next to each other: nats per piece, bits per byte, and what greedy
            decoding gains.

        Raises:
            CorpusError: If no document is long enough to be measured.
            UsageError: If the base is another model than the one that this was made from, or cannot be run on rows.
        """
        from vocabext.evaluate.stage import evaluate_folder

        check_names(options, EvalConfig)
        config = pick(EvalConfig, options)
        documents, _ = open_corpus(corpus, text_field, self.voice)
        return Evaluation(evaluate_folder(
            self.folder, self.base.name, documents, config, trust_remote_code=self.base.trust_remote_code,
            progress=self.voice.progress))

    @takes(HealConfig)
    @spelled
    def heal(
        self, corpus: Corpus, output: str | Path, *, general: Corpus | None = None, text_field: str = "text",
        merge: bool = False, link: str = AUTO, force: bool = False, **options: Any,
    ) -> "Expanded":
        """Train an adapter that makes the body used to its new tokens, and write a new folder with it.

        The body of the new folder is the base's, bit for bit. Its rows are retrained, and the adapter lies in
        `adapter/`, a plain peft folder that nothing loads by itself. An interrupted call goes on where it stopped.

        Args:
            corpus: Text of the domain, as for `Model.mine`; commonly what was mined.
            output: The folder to make.
            general: Other text, of which the model must not forget anything.
            text_field: The field that holds the text of a record.
            merge: Add the adapter to the weights; the body is not the base's then, and `verify` says so.
            link: As for `Model.patch`.
            force: Replace a model folder that is there, once the new one is complete.
            **options: The fields of `HealConfig`, such as `text` (expanded ids to learn from) and `rank`.

        Raises:
            MissingExtraError: If peft is not installed.
            OutputExistsError: If the folder is there and `force` is false.
            CorpusError: If there is too little text.
            UsageError: If the base is another model than the one that this was made from, or cannot be run on rows.
        """
        import shutil

        from vocabext.files.atomic import check_output, real_path
        from vocabext.heal.merge import merge_adapter
        from vocabext.heal.stage import ROWS_NAME, Text, heal
        from vocabext.patch.stage import check_paths, patch

        check_names(options, HealConfig)
        config = pick(HealConfig, options)
        target = real_path(Path(output))
        check_output(target, force=force, folder=True)
        check_paths(target, self.base.folder, self.folder)
        work = target.with_name(f".{target.name}.heal")
        voice: dict[str, Any] = {"say": self.voice.say, "progress": self.voice.progress}
        heal(self.folder, self.base.name, Text(*open_corpus(corpus, text_field, self.voice)), config, work,
             general=None if general is None else Text(*open_corpus(general, text_field, self.voice)),
             trust_remote_code=self.base.trust_remote_code, **voice)
        made = patch(work / ROWS_NAME, self.base.name, work / "expanded" if merge else target, healed=work,
                     force=force or merge, link=link, untie=self._manifest.untied,
                     trust_remote_code=self.base.trust_remote_code, **voice)
        if merge:
            merge_adapter(work / "expanded", target, force=force, trust_remote_code=self.base.trust_remote_code)
        shutil.rmtree(work)
        return Expanded(output, self.base, patched=made)

    @spelled
    def diff(self, texts: Sequence[str] = ()) -> "Difference":
        """Return what the expansion has changed: files, tensors, rows, tokens.

        Args:
            texts: Texts to show as both tokenizers cut them.
        """
        from vocabext.diff import diff

        return diff(self.base.name, self.folder, texts, trust_remote_code=self.base.trust_remote_code,
                    progress=self.voice.progress)

    @spelled
    def revert(self, output: str | Path, *, link: str = AUTO, force: bool = False) -> "RevertResult":
        """Make the base again, byte for byte; the base itself is not needed.

        Args:
            output: The folder to make.
            link: As for `Model.patch`.
            force: Replace a model folder that is there, once the new one is complete.

        Raises:
            OutputExistsError: If the folder is there and `force` is false.
            CheckpointError: If something in this folder has changed since it was made.
        """
        from vocabext.revert import revert

        return revert(self.folder, Path(output), link=link, force=force, progress=self.voice.progress)


def _records(snippets: Snippets | TokenTable, config: DistillConfig) -> list[TokenSnippets]:
    """Return the records that rows are made from; with `method="mean"`, which reads no text, tokens will do."""
    if isinstance(snippets, Snippets):
        return list(snippets)
    if not isinstance(snippets, TokenTable):
        raise TypeError(f"the snippets are of type {type(snippets).__name__}; pass what collect returned, or its file")
    if config.method != "mean":
        raise UsageError(f"--method is {config.method!r}, which needs snippets, and these are tokens without any; "
                         "collect first, or pass --method mean")
    return [TokenSnippets(token) for token in snippets]
