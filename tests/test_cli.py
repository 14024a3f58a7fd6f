import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

import vocabext
from vocabext import errors
from vocabext.cli import docs, options, show
from vocabext.cli.main import VERBS, LazyGroup, Verb, cli, one_line
from vocabext.progress import Progress, no_progress

ROOT = Path(__file__).parent.parent
LARGER = "raise the limit (see `ulimit -f`), or choose an output on another file system"
MORE = "free some, raise the limit (see `ulimit -v`), or use a machine or device with more"


# ---- verbs made for these tests ------------------------------------------------------------------


@click.command()
@click.argument("name")
def fail(name: str) -> None:
    """Raise an error."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/rows.safetensors")
    raised: dict[str, BaseException] = {
        "output": errors.OutputExistsError(Path("out.jsonl")),
        "extra": errors.MissingExtraError("vllm", "serve"),
        "server": errors.ServerError("the server died\n  log line 1\n  log line 2"),
        "lines": errors.CheckpointError("a message\n  in two lines"),
        "full": full,
        "wrapped": RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "large": OSError(errno.EFBIG, os.strerror(errno.EFBIG), "/out/model.safetensors"),
        "rust": RuntimeError("I/O error: File too large (os error 27)"),
        "device": OSError(errno.EIO, os.strerror(errno.EIO), "/usb/x"),
        "readonly": OSError(errno.EROFS, os.strerror(errno.EROFS), "/cdrom/x"),
        "quota": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/home/x"),
        "gone": FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "corpus/a.txt"),
        "library": OSError("Can't load it\nfrom 'here'"),
        "memory": MemoryError(),
        "mmap": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "model.safetensors"),
        "linker": ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        "log": errors.ServerError("the server died\n  CUDA out of memory"),
        "permission": PermissionError(errno.EACCES, "Permission denied", "/root/x"),
        "bug": KeyError("a bug"),
        "interrupt": KeyboardInterrupt(),
        "pipe": BrokenPipeError(errno.EPIPE, "Broken pipe"),
    }
    if name == "cause":
        try:
            raise full
        except OSError as error:
            raise RuntimeError("saving failed") from error
    if name == "tensor":
        import torch

        torch.empty(1 << 56, dtype=torch.uint8)
    if name == "array":
        np.empty(1 << 56, np.uint8)
    if name == "blamed":
        try:
            raise MemoryError
        except MemoryError as error:
            raise errors.CheckpointError("transformers cannot load the model") from error
    if name in raised:
        raise raised[name]
    raise getattr(errors, name)("what is wrong; what to do")


@click.command()
@options.json_option
def result(as_json: bool) -> None:
    """Show a result."""
    show.note("a remark")
    with show.progress("working", 3, "things") as task:
        task.advance(3)
    document = {"path": Path("a/b"), "mean": np.float32(0.5), "rows": np.arange(2), "nothing": float("nan")}
    show.emit(document, as_json, lambda: show.table([["a", 1], ["bb", 22]], ["token", "count"]))


broken = "not a command"

GROUP = LazyGroup(
    "vocabext",
    verbs={
        "fail": Verb("test_cli:fail", "Fail."),
        "result": Verb("test_cli:result", "Show."),
        "absent": Verb("test_cli_absent:absent", "Nobody wrote it yet."),
        "broken": Verb("test_cli:broken", "A mistake of ours."),
    },
)


def run(*args: str) -> tuple[int, str, str]:
    outcome = CliRunner().invoke(GROUP, args, prog_name="vocabext")
    if outcome.exception and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, outcome.stdout, outcome.stderr


def run_process(*args: str, code: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *args] if code else [sys.executable, "-m", "vocabext", *args]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60, check=False, **options)  # type: ignore[call-overload,no-any-return]


def all_errors() -> Iterator[type[errors.VocabextError]]:
    classes = [errors.VocabextError]
    for error in classes:
        yield error
        classes += error.__subclasses__()


# ---- how a command ends --------------------------------------------------------------------------


@pytest.mark.parametrize("error", [e for e in all_errors() if "__init__" not in vars(e)], ids=lambda e: e.__name__)
def test_every_error_is_one_line_and_its_exit_code(error: type[errors.VocabextError]) -> None:
    expected = {"UsageError": 2, "BadCheckpointError": 3}.get(error.__name__, 1)
    assert run("fail", error.__name__) == (expected, "", "error: what is wrong; what to do\n")


@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("output", 2, "error: out.jsonl exists already; choose another output, or pass --force to replace it"),
        ("extra", 1, "error: vllm is not installed; run: pip install 'vocabext[serve]'"),
        ("lines", 1, "error: a message in two lines"),
        ("full", 1, "error: no space left on the device at /full/rows.safetensors; free some, or choose an output "
                    "elsewhere"),
        ("wrapped", 1, "error: no space left on the device; free some, or choose an output elsewhere"),
        ("cause", 1, "error: no space left on the device at /full/rows.safetensors; free some, or choose an output "
                     "elsewhere"),
        ("permission", 1, "error: no permission at /root/x: permission denied"),
        ("large", 1, f"error: a file would become larger than it may be at /out/model.safetensors; {LARGER}"),
        ("rust", 1, f"error: a file would become larger than it may be; {LARGER}"),
        ("device", 1, "error: the device failed at /usb/x: input/output error; check the disk, or use another one"),
        ("readonly", 1, "error: no permission at /cdrom/x: read-only file system"),
        ("quota", 1, "error: no space left on the device at /home/x; free some, or choose an output elsewhere"),
        ("gone", 1, "error: no such file or directory: corpus/a.txt"),
        ("library", 1, "error: Can't load it from 'here'"),
        ("memory", 1, f"error: not enough memory; {MORE}"),
        ("mmap", 1, f"error: not enough memory; {MORE}"),
        ("linker", 1, f"error: not enough memory; {MORE}"),
        ("tensor", 1, f"error: not enough memory: 72057594037927936 bytes were asked for; {MORE}"),
        ("array", 1, f"error: not enough memory: 64.0 PiB were asked for; {MORE}"),
        ("blamed", 1, f"error: not enough memory; {MORE}"),
        ("log", 1, "error: the server died\n  CUDA out of memory"),
        ("interrupt", 130, "interrupted"),
    ],
)
def test_what_else_ends_a_command_is_one_line(name: str, code: int, line: str) -> None:
    assert run("fail", name) == (code, "", line + "\n")


def test_the_end_of_a_servers_log_stays_in_lines() -> None:
    assert run("fail", "server") == (1, "", "error: the server died\n  log line 1\n  log line 2\n")


def test_a_reader_that_went_away_is_no_error_message() -> None:
    assert run("fail", "pipe") == (1, "", "")


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(KeyError, match="a bug"):
        run("fail", "bug")
    with pytest.raises(AssertionError, match="test_cli:broken is no click command"):
        run("broken")


def test_an_error_is_looked_at_once_only() -> None:
    assert one_line(ValueError("x")) is None
    bug = KeyError("a bug")
    bug.__context__ = FileNotFoundError(errno.ENOENT, "No such file", "x")  # which was handled, but for the bug
    assert one_line(bug) is None


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("resutl",), "error: there is no verb 'resutl'; did you mean result? (see 'vocabext --help')"),
        (("xyz",), "error: there is no verb 'xyz'; choose from fail, result, absent, broken (see 'vocabext --help')"),
        (("fail",), "error: Missing argument 'NAME' (see 'vocabext fail --help')"),
        (("result", "--jsno"), "error: No such option '--jsno'. Did you mean '--json'? (see 'vocabext result --help')"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(args: tuple[str, ...], line: str) -> None:
    assert run(*args) == (2, "", line + "\n")


def test_a_verb_that_is_not_there_says_so() -> None:
    assert run("absent") == (
        1, "", "error: absent is not part of this installation (test_cli_absent is missing)\n"
    )


def test_a_module_missing_inside_a_verb_is_a_bug(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "verb_with_a_bug.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    group = LazyGroup("x", verbs={"verb": Verb("verb_with_a_bug:verb", "")})
    outcome = CliRunner().invoke(group, ["verb"])
    assert isinstance(outcome.exception, ModuleNotFoundError)


@pytest.mark.parametrize(("number", "code", "line"), [
    (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"),
])
def test_a_signal_ends_a_running_verb_and_leaves_nothing_behind(
    tmp_path: Path, number: int, code: int, line: str
) -> None:
    (tmp_path / "slow_verb.py").write_text(textwrap.dedent("""
        import time
        from pathlib import Path
        import click
        from vocabext.files.atomic import atomic_file

        @click.command()
        @click.argument("output", type=click.Path(path_type=Path))
        def slow(output):
            with atomic_file(output) as file:
                file.write("half")
                click.echo("started")
                try:
                    time.sleep(60)
                except Exception:
                    time.sleep(60)  # a verb that survives errors still has to stop
    """))
    source = "import vocabext.cli.main as m; m.cli._verbs = {'slow': m.Verb('slow_verb:slow', '')}; m.main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    process = subprocess.Popen(
        [sys.executable, "-c", source, "slow", str(tmp_path / "out.jsonl")],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        assert process.wait(30) == code
        assert process.stderr.read() == line + "\n"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["slow_verb.py"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vocabext", "--help"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (
        1, "error: no space left on the device; free some, or choose an output elsewhere\n"
    )


def test_a_pipe_nobody_reads_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "vocabext", "--help"], cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE, text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "")


# ---- help ----------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from vocabext.cli.main import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "tokenizers", "vllm", "numpy", "datasets", "rich", "vocabext.serve"}
    print("imported:", sorted(heavy & set(sys.modules)))
"""
    done = run_process("--help", code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("imported: []\n")
    for name, verb in VERBS.items():
        assert re.search(rf"^  {name} +{verb.short_help.split()[0]}", done.stdout, re.MULTILINE)


def test_without_a_verb_the_help_is_shown() -> None:
    done = run_process()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: vocabext")


def test_the_version_is_the_changelogs() -> None:
    headings = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == vocabext.__version__
    assert run_process("--version").stdout == f"vocabext, version {vocabext.__version__}\n"


def test_short_help_is_one_line() -> None:
    for verb in VERBS.values():
        assert verb.short_help.endswith(".")
        assert len(verb.short_help) <= 70


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help(name: str) -> None:
    outcome = CliRunner().invoke(cli, [name, "--help"], prog_name="vocabext")
    if "is not part of this installation" in outcome.stderr:
        pytest.skip(f"{name} is not written yet")
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stdout.startswith(f"Usage: vocabext {name} ")


@pytest.mark.parametrize("called_alone_before", [False, True])
def test_the_command_reference_is_current(called_alone_before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for verb in VERBS if called_alone_before else ():
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        monkeypatch.setattr(command, "_help_option", None)  # as it is before its first call
        assert "-h," not in CliRunner().invoke(command, ["--help"]).output
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == docs.render(), "docs/cli.md is out of date; run: make docs"


# ---- results and progress ------------------------------------------------------------------------


def test_json_is_exactly_one_document() -> None:
    code, stdout, stderr = run("result", "--json")
    assert code == 0
    assert json.loads(stdout) == {"path": "a/b", "mean": 0.5, "rows": [0, 1], "nothing": None}
    assert stderr == "a remark\nworking: 3 things in 0.0 s\n"


def test_a_table_is_aligned() -> None:
    _, stdout, _ = run("result")
    assert stdout == "token  count\n-----  -----\na          1\nbb        22\n"


def test_cells_of_every_kind() -> None:
    lines = show.format_table([["度x", 1234567, 0.123456, None], ["a", 5, 98765.4, "-3 %"]], ["t", "n", "f", "p"])
    assert lines.splitlines() == [
        "t            n       f     p",
        "---  ---------  ------  ----",
        "度x  1,234,567  0.1235",
        "a            5  98,765  -3 %",
    ]
    assert show.format_table([], ["a", "b"]) == "a  b\n-  -"


@dataclasses.dataclass
class Inner:
    values: tuple[float, ...]
    by_id: dict[int, str]


def test_dataclasses_become_objects() -> None:
    assert show.to_plain([Inner((1.0, float("inf")), {7: "x"})]) == [{"values": [1.0, None], "by_id": {"7": "x"}}]


SHOW_WAITING = "import os, vocabext; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(("own", "shown"), [
    ({}, "PASSIVE None"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"), ({"GOMP_SPINCOUNT": "7"}, "None 7")])
def test_threads_do_not_spin_beside_a_busy_neighbour_unless_the_user_says_so(own: dict[str, str], shown: str) -> None:
    """The setting is there before torch is loaded; it is for this process, and no server that it starts has it."""
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
    servers = "; from vocabext.serve.engine import server_environment as e; print(e('cpu').get('OMP_WAIT_POLICY'))"
    lines = run_process(code=SHOW_WAITING + servers, env={**clean, **own}).stdout.splitlines()
    assert lines == [shown, own.get("OMP_WAIT_POLICY", "None")]


def test_torch_that_is_loaded_already_is_left_alone() -> None:
    code = "import sys, os; sys.modules['torch'] = sys; import vocabext; print(os.environ.get('OMP_WAIT_POLICY'))"
    clean = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    assert run_process(code=code, env=clean).stdout == "None\n"


def test_plain_progress_is_a_line_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    task = show.PlainTask("training", 2000, "tokens", clock=lambda: now)
    for _ in range(3):
        now += 3
        task.advance(100)
    task.note("loss 0.25")
    now += 191
    task.advance(1700)
    task.close()
    assert capsys.readouterr().err.splitlines() == [
        "training: 200 of 2,000 tokens (10%), 33 tokens/s, 54.0 s left",
        "training: 2,000 tokens, 8.9 tokens/s, loss 0.25",
        "training: 2,000 tokens in 3 min 20 s, loss 0.25",
    ]


def test_progress_without_a_total(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    task = show.PlainTask("reading", None, "", clock=lambda: now)
    now = 8000.0
    task.advance(4)
    task.close()
    assert capsys.readouterr().err.splitlines() == ["reading: 4, 0.0005/s", "reading: 4 in 2 h 13 min"]


def test_a_task_that_failed_writes_no_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(errors.CorpusError), show.progress("reading"):
        raise errors.CorpusError("bad line")
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with show.progress("reading [all]", 1000, "documents") as task:
        task.advance(1000)
        task.note("loss [0.5]")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "reading [all]" in shown
    assert "1,000/1,000 documents" in shown
    assert "loss [0.5]" in shown


def test_both_kinds_of_progress_fit_the_protocol() -> None:
    kinds: list[Progress] = [show.progress, no_progress]
    for kind in kinds:
        with kind("counting", 2, "things") as task:
            task.advance()
            task.note("half")
            task.advance(1)


def test_control_characters_of_a_model_or_corpus_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]0;x\x07\x9b31m\r\u202e"
    show.note(f"made from {hostile}")
    show.echo(f"a\n{hostile}")
    show.table([(hostile, "b\nc")], ("base", "said"))
    show.emit({"base": hostile}, True, lambda: None)
    captured = capsys.readouterr()
    assert not set(hostile) & {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & set(captured.out + captured.err)
    assert "made from \\u001b]0;x\\u0007\\u009b31m\\u000d\\u202e" in captured.err
    assert json.loads(captured.out[captured.out.index("{"):]) == {"base": hostile}


def test_an_error_that_names_control_characters_shows_them() -> None:
    line = "import sys; from vocabext.cli.main import cli; cli.main(['inspect', chr(27) + '[31mnowhere'])"
    done = run_process(code=line)
    assert "\x1b" not in done.stderr
    assert "\\u001b[31mnowhere" in done.stderr


def test_all_output_of_the_verbs_goes_through_one_place() -> None:
    """`click.echo` is called where control characters are made visible, and nowhere else."""
    found = {path.name for path in (ROOT / "vocabext" / "cli").glob("*.py") if "click.echo(" in path.read_text()}
    assert found <= {"show.py", "main.py", "docs.py"}
