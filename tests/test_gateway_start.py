"""Every documented way of starting, with engines that are fakes: it serves, and leaves nothing behind."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_rig import ROOT, fake_engine, gateway, with_fake_vllm
from tiny_expanded import expanded_pair

from vocabext.errors import UsageError
from vocabext.serve.engine import free_port, group_members
from vocabext.serve.gateway.keeper import Place, places_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "guides").glob("*.md"))]
ASK = {"prompt": "hello", "max_tokens": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `expanded`, and the two in a cache of the hub as `org/base` and `org/expanded`."""
    folder = tmp_path_factory.mktemp("models")
    expanded_pair(folder)
    for name in ("base", "expanded"):
        cached = folder / "hub" / f"models--org--{name}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("abc")
        (cached / "snapshots").mkdir()
        (cached / "snapshots" / "abc").symlink_to(folder / name)
    return folder


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    place = tmp_path_factory.mktemp("engines")
    with fake_engine(place, "base") as base, fake_engine(place, "expanded", "--bans") as expanded:
        yield {"BASE_URL": base.url, "EXPANDED_URL": expanded.url}


WAYS = [
    "BASE_URL EXPANDED_URL",
    "BASE_URL/v1 EXPANDED_URL/v1/",
    "BASE EXPANDED -- --max-model-len 128",
    "BASE_URL EXPANDED",
    "org/base org/expanded",
    "BASE EXPANDED --one-engine -- --max-model-len 128",
    "--one-engine org/base EXPANDED@EXPANDED_URL/v1",
]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_gateway_starts_in_every_documented_way(
    way: str, folder: Path, urls: dict[str, str], tmp_path: Path
) -> None:
    names = {**urls, "BASE": str(folder / "base"), "EXPANDED": str(folder / "expanded")}
    words = re.sub(r"\b(BASE|EXPANDED)(_URL)?\b", lambda found: names[found.group()], way).split()
    base, expanded, options = *[word for word in words if not word.startswith("--")][:2], words
    options = [word for word in words if word not in (base, expanded)]
    with gateway(tmp_path, base, expanded, "--unverified", *options, HF_HUB_CACHE=str(folder / "hub")) as running:
        with running.client() as client:
            for arm in ("base", "expanded"):
                answer = client.post("/v1/completions", json=ASK, headers={"x-vocabext-arm": arm})
                assert (answer.status_code, answer.headers["x-vocabext-arm"]) == (200, arm), answer.text
        groups = list(running.document["process_ids"].values())
        assert len(groups) == 2 - way.count("_URL") - ("--one-engine" in way)
    assert not [pid for group in groups for pid in group_members(group)]
    assert "Traceback" not in (tmp_path / "gateway.err").read_text()


def documented() -> list[str]:
    """Every `vocabext serve gateway` and `serve start` of the pages and the help texts."""
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ )?vocabext (serve (?:gateway|start) .+?)(?:\s+#.*)?$", text, re.MULTILINE)
    text = (ROOT / "docs" / "cli.md").read_text()
    lines += re.findall(r"^\s+vocabext (serve (?:gateway|start) .+)$", text, re.MULTILINE)
    # A folder with an adapter is started in test_heal_vllm.py.
    return sorted({line for line in lines if "--adapter" not in line})


@pytest.mark.slow
@pytest.mark.parametrize("line", documented())
def test_every_command_of_the_pages_that_serves_starts(
    line: str, folder: Path, urls: dict[str, str], tmp_path: Path
) -> None:
    names = {"BASE": str(folder / "base"), "EXPANDED": str(folder / "expanded"), "llama-medical": str(
        folder / "expanded"), "MODEL": str(folder / "base"), "http://gpu-1:8000": urls["BASE_URL"],
        "http://gpu-2:8000": urls["EXPANDED_URL"], "http://127.0.0.1:8000": urls["BASE_URL"],
        "http://127.0.0.1:8001": urls["EXPANDED_URL"]}
    text = re.sub("|".join(sorted(map(re.escape, names), key=len, reverse=True)), lambda found: names[found.group()],
                  line)
    words, dashes, flags = text.partition(" -- ")
    words = re.sub(r"--(host|port|admin-port|state|logs) \S+", "", words)
    command = [*shlex.split(words), "--port", str(port := free_port()), "--unverified", "--json",
               *(["--state", str(tmp_path / "state.json")] if "gateway" in line else []), dashes.strip(),
               *shlex.split(flags)]
    command = [word for word in command if word]
    with subprocess.Popen([sys.executable, "-m", "vocabext", *command], cwd=tmp_path, env=with_fake_vllm(),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text = ""
        for said in process.stdout:
            text += said
            if said.rstrip() == "}":
                break
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert text, errors
    assert json.loads(text)["url"].endswith(f":{port}/v1")
    assert process.returncode == 143
    assert "Traceback" not in errors


@pytest.mark.parametrize(("base", "expanded", "one_engine", "expected"), [
    ("http://a:1/v1/", "https://b", False, (Place("", "http://a:1"), Place("", "https://b"))),
    ("org/base", "./new", False, (Place("org/base", ""), Place("./new", ""))),
    ("org/base", "new@http://a:1/v1", True, (Place("org/base", ""), Place("new", "http://a:1"))),
    ("org/base", "org/new@2@http://a:1", True, (Place("org/base", ""), Place("org/new@2", "http://a:1"))),
    ("org/base", "n@w", True, (Place("org/base", ""), Place("n@w", ""))),
])
def test_an_arm_is_a_model_a_url_or_both(
    base: str, expanded: str, one_engine: bool, expected: tuple[Place, Place]
) -> None:
    assert tuple(places_of(base, expanded, one_engine=one_engine).values()) == expected


@pytest.mark.parametrize(("base", "expanded", "one_engine", "message"), [
    ("http://a", "new", True, "BASE is the base model for its tokenizer, not a URL"),
    ("base", "http://a", True, "FOLDER@URL for an engine that runs already; it is http://a"),
    ("base", "new@http://a", False, "EXPANDED is new@http://a; FOLDER@URL is for --one-engine, pass the URL alone"),
    ("base@http://a", "new", True, "BASE is the base model for its tokenizer"),
    ("base", "new@ftp://a", True, "new@ftp://a is no URL of a server; it must be http://HOST:PORT"),
    ("http://a:99999", "new", False, "http://a:99999 is no URL of a server"),
    ("http://", "new", False, "http:// is no URL of a server"),
])
def test_an_arm_that_cannot_be_is_refused(base: str, expanded: str, one_engine: bool, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        places_of(base, expanded, one_engine=one_engine)
