"""The operator's page: its unit, container file, YAML and dashboard parse, and name what exists."""

import configparser
import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from vocabext.cli.serve_gateway import gateway
from vocabext.serve.gateway.metrics import Metrics

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (GUIDES / "operate.md").read_text(), re.MULTILINE | re.DOTALL)
DASHBOARD: dict[str, Any] = json.loads((GUIDES / "grafana.json").read_text())


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def documents() -> list[dict[str, Any]]:
    return [dict(yaml.safe_load(text)) for text in blocks("yaml")]


def samples() -> dict[str, set[str]]:
    """The names that Prometheus stores for the gateway, each with its labels."""
    found: dict[str, set[str]] = {}
    for metric in vars(Metrics()).values():
        if not hasattr(metric, "_labelnames"):
            continue
        suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}[metric._type]
        for suffix in suffixes:
            labels = {*metric._labelnames, *(["le"] if suffix == "_bucket" else [])}
            found[metric._name + suffix] = labels
    return found


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (annotation["expr"] for annotation in DASHBOARD["annotations"]["list"])
    for document in documents():
        yield from (rule["expr"] for group in document.get("groups", ()) for rule in group["rules"])


@pytest.mark.parametrize("expression", list(expressions()))
def test_every_expression_asks_for_metrics_and_labels_that_exist(expression: str) -> None:
    known = samples()
    names = re.findall(r"\bvocabext_\w+", expression)
    assert names
    assert not set(names) - known.keys()
    labels = set[str]().union(*(known[name] for name in names))
    asked = {label.strip() for by in re.findall(r"\bby \(([^)]*)\)", expression) for label in by.split(",")}
    asked |= {label for inner in re.findall(r"\{([^}]*)\}", expression) for label in re.findall(r"(\w+)=", inner)}
    assert not asked - labels
    for name in re.findall(r"(?:rate|increase)\((vocabext_\w+)", expression):
        assert name.endswith(("_total", "_bucket", "_sum")), f"{name} is no counter"
    for name in re.findall(r"histogram_quantile\([^v]*(vocabext_\w+)", expression):
        assert name.endswith("_bucket")
    assert expression.count("(") == expression.count(")")


def test_the_page_names_metrics_that_exist() -> None:
    named = set(re.findall(r"\bvocabext_gateway_\w+", (GUIDES / "operate.md").read_text()))
    assert not named - samples().keys() - {"vocabext_gateway"}  # nginx's name for the gateway


def test_the_dashboard_shows_every_metric_of_the_engines_and_clients_without_overlaps() -> None:
    shown = {name for expression in expressions() for name in re.findall(r"vocabext_\w+", expression)}
    assert len(shown) >= 12
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = sorted((p["gridPos"]["y"], p["gridPos"]["x"], p["gridPos"]["w"]) for p in panels)
    assert all(one[0] != other[0] or one[1] + one[2] <= other[1] for one, other in pairwise(places))
    for panel in panels:
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        assert panel["datasource"]["uid"] == f"${{{DASHBOARD['templating']['list'][0]['name']}}}"


def parsed(words: list[str]) -> dict[str, Any]:
    """Parse the words behind `vocabext serve gateway`; raises what click raises."""
    context = click.Context(gateway)
    gateway.parse_args(context, list(words))
    return context.params


def test_the_unit_starts_a_gateway_that_may_write_its_state_and_finish_its_requests() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    (text,) = blocks("ini")
    unit.read_string(text)
    assert unit.sections() == ["Unit", "Service", "Install"]
    service = unit["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert (Path(program).name, words[:2]) == ("vocabext", ["serve", "gateway"])
    found = parsed(words[2:])
    assert str(found["state_path"].parent) == f"/var/lib/{service['StateDirectory']}"
    assert str(found["logs"]) == f"/var/log/{service['LogsDirectory']}"
    assert service["KillMode"] == "mixed"  # else systemd ends the engines under the requests in flight
    assert float(service["TimeoutStopSec"]) > found["drain_seconds"] + 20 * (1 if found["one_engine"] else 2)


def test_the_container_starts_a_gateway_that_can_be_reached_and_keeps_its_state() -> None:
    (text,) = blocks("dockerfile")
    lines = dict(line.split(" ", 1) for line in text.splitlines() if line.startswith(("ENTRYPOINT", "CMD", "VOLUME")))
    assert json.loads(lines["ENTRYPOINT"]) == ["vocabext", "serve", "gateway"]
    found = parsed(json.loads(lines["CMD"]))
    assert found["host"] == "0.0.0.0"
    assert str(found["state_path"].parent) in json.loads(lines["VOLUME"])
    assert f"EXPOSE {found['port']}\n" in text
    compile(json.loads(text.partition(" CMD ")[2].splitlines()[0])[2], "HEALTHCHECK", "exec")


def test_nginx_lets_streams_through_and_keeps_our_headers_from_clients() -> None:
    (text,) = blocks("nginx")
    assert text.count("{") == text.count("}")
    assert not [line for line in map(str.strip, text.splitlines()) if line and not line.endswith((";", "{", "}"))]
    directives = {words[0]: words[1:] for line in text.splitlines() if (words := shlex.split(line.strip().rstrip(";")))}
    found = parsed(["a", "b"])
    assert directives["proxy_buffering"] == ["off"]
    assert f"127.0.0.1:{found['port']}" in text
    assert float(directives["proxy_read_timeout"][0].rstrip("s")) > found["idle_seconds"]
    for header in ("x-vocabext-arm", "x-vocabext-user"):
        assert f'proxy_set_header {header} "";' in text


def test_yaml_of_other_routers_divides_all_traffic_between_the_arms() -> None:
    by_kind = {document.get("kind"): document for document in documents()}
    (rule,) = by_kind["HTTPRoute"]["spec"]["rules"]
    assert sum(backend["weight"] for backend in rule["backendRefs"]) == 100
    assert 0 < by_kind["InferenceService"]["spec"]["predictor"]["canaryTrafficPercent"] < 100
    (scrape,) = (document["scrape_configs"] for document in documents() if "scrape_configs" in document)
    assert scrape[0]["metrics_path"] == "/metrics"
