"""The files under ``deploy/``: they name metrics, flags, routes, ports and paths that exist."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from minivllm_kernels.cpu import instruction_sets

from minivllm.config import EngineConfig, ServerConfig
from minivllm.flags import Parser
from minivllm.request import EngineInfo, EngineStats
from minivllm.server.app import create_app
from minivllm.server.auth import PUBLIC_PATHS
from minivllm.server.context import ServerState
from minivllm.server.keys import ENVIRONMENT_VARIABLE
from minivllm.server.metrics import ServerMetrics
from tests.server.fakes import FakeEngine, make_tokenizer

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
# What Prometheus adds to a series.
TARGET_LABELS = {"job", "instance", "namespace"}
SLOW_READERS = 5  # seconds that uvicorn waits for them once the answers are complete


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def series() -> dict[str, set[str]]:
    """The labels of each series that /metrics can have."""
    metrics = ServerMetrics("minivllm", "m", EngineInfo(4096, 10), EngineStats(0, 0, 0, 1, 0, 0, 0))
    found: dict[str, set[str]] = {}
    for instrument in metrics.instruments:
        labels = {"model_name", "engine", *instrument.label_names}
        base = f"minivllm:{instrument.name}"
        if instrument.kind == "histogram":
            found |= {base + "_bucket": labels | {"le"}, base + "_sum": labels, base + "_count": labels}
        else:
            found[base + ("_total" if instrument.kind == "counter" else "")] = labels
    return found


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    return content


def dashboard_expressions() -> list[str]:
    panels = dashboard()["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL): every expression in the files."""
    for group in load(DEPLOY / "prometheus" / "alerts.yml")["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]
    for expression in dashboard_expressions():
        yield "dashboard", expression
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield "dashboard's variables", variable["definition"]
    for trigger in load(KUBERNETES / "base" / "keda.yaml")["spec"]["triggers"]:
        yield "keda", trigger["metadata"]["query"]


def test_expressions_name_series_and_labels_that_exist() -> None:
    known = series()
    used: set[str] = set()
    for where, expression in expressions():
        names = re.findall(r"minivllm:\w+", expression)
        assert names or expression.startswith("up{"), f"{where}: {expression}"
        for name, matchers in re.findall(r"(minivllm:\w+)(?:\{([^}]*)\})?", expression):
            assert name in known, f"{where}: {name}"
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
            assert labels <= known[name] | TARGET_LABELS, f"{where}: {name} with {labels}"
            used.add(name)
        for grouping in re.findall(r"(?:by|on) \(([^)]*)\)", expression):
            labels = {label.strip() for label in grouping.split(",")}
            assert labels <= set().union(*(known[name] for name in names)) | TARGET_LABELS, (
                f"{where}: {labels}"
            )
    assert len(used) > 20


class TestPrometheus:
    def test_the_rules_and_their_own_tests(self) -> None:
        alerts = {rule["alert"] for rule in load(DEPLOY / "prometheus" / "alerts.yml")["groups"][0]["rules"]}
        tested = [test["name"] for test in load(DEPLOY / "prometheus" / "alerts_test.yml")["tests"]]
        assert sorted(tested) == sorted(f"{alert} {how}" for alert in alerts for how in ("fires", "is quiet"))
        promtool("test", "rules", "alerts_test.yml")
        promtool("check", "config", "prometheus.yml")

    def test_the_dashboard_s_expressions(self, tmp_path: Path) -> None:
        rules = [
            {"record": f"panel:{number}", "expr": re.sub(r"\$\w+", "5m", expression)}
            for number, expression in enumerate(dashboard_expressions())
        ]
        path = tmp_path / "rules.yml"
        path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
        promtool("check", "rules", str(path))

    def test_it_scrapes_what_compose_starts(self) -> None:
        config = load(DEPLOY / "prometheus" / "prometheus.yml")
        (job,) = config["scrape_configs"]
        assert job["metrics_path"] in routes()
        assert job["static_configs"] == [{"targets": ["minivllm:8000"]}]
        assert config["rule_files"] == ["alerts.yml"]


def promtool(*arguments: str) -> None:
    """Prometheus's own checks, where it is installed."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool isn't installed")
    done = subprocess.run(
        [found, *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


class TestDashboard:
    def test_panels_have_places_ids_and_data(self) -> None:
        panels = dashboard()["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        taken: set[tuple[int, int]] = set()
        for panel in panels:
            place = panel["gridPos"]
            cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
            assert place["x"] + place["w"] <= 24
            assert not cells & taken, panel["title"]
            taken |= cells
            if panel["type"] != "row":
                sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
                assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
        titles = [panel["title"] for panel in panels if panel["type"] != "row"]
        assert "Waiting, by what for" in titles

    def test_variables_are_defined(self) -> None:
        content = dashboard()
        defined = {variable["name"] for variable in content["templating"]["list"]}
        used = set(re.findall(r"\$\{?([a-z]\w*)\}?", json.dumps(content)))
        assert used <= defined | {"__all"}


def routes() -> set[str]:
    tokenizer = make_tokenizer()
    app = create_app(FakeEngine(tokenizer), tokenizer, ServerConfig(), "m", ServerState())
    found: set[str] = set()

    def walk(items: Any) -> None:
        for route in items:
            if inner := getattr(route, "original_router", None) or getattr(route, "app", None):
                walk(getattr(inner, "routes", ()))
            if path := getattr(route, "path", None):
                found.add(path)

    walk(app.routes)
    return found


def served_by(arguments: list[str]) -> tuple[EngineConfig, ServerConfig]:
    """The configuration that ``minivllm serve`` makes of these; the test ends for a wrong flag."""
    parser = Parser("minivllm serve", "")
    parser.add_config(EngineConfig, "engine")
    parser.add_config(ServerConfig, "server")
    parsed = parser.parse(arguments)
    return parser.make_config(EngineConfig, parsed), parser.make_config(ServerConfig, parsed)


class Dockerfile:
    """Its instructions, continued lines joined."""

    def __init__(self) -> None:
        text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        self.instructions = [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]

    def all(self, name: str) -> list[str]:
        return [rest for instruction, rest in self.instructions if instruction == name]

    @property
    def entrypoint(self) -> list[str]:
        (entry,) = self.all("ENTRYPOINT")
        arguments: list[str] = json.loads(entry)
        assert arguments[:2] == ["minivllm", "serve"]
        return arguments[2:]


class TestDockerfile:
    def test_it_serves_on_the_port_that_it_exposes(self) -> None:
        _, server = served_by(Dockerfile().entrypoint)
        assert (server.host, [str(server.port)]) == ("0.0.0.0", Dockerfile().all("EXPOSE"))

    def test_it_copies_what_is_there_and_not_ignored(self) -> None:
        ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        let_in = {line[1:] for line in ignored if line.startswith("!")}
        copied: set[str] = set()
        for line in Dockerfile().all("COPY"):
            if not line.startswith("--from"):
                copied |= set(shlex.split(line)[:-1])
        assert copied == let_in
        assert all((ROOT / path).exists() for path in copied)
        # The packages that an installation has: what setuptools looks for must be in the image.
        assert {"minivllm", "kernels", "benchmarks/src", "pyproject.toml", "setup.py"} <= copied

    def test_it_pins_torch_as_the_makefile_does(self) -> None:
        (pin,) = re.findall(r"^TORCH \?= (\S+)", (ROOT / "Makefile").read_text(), flags=re.M)
        assert f"TORCH={pin}" in Dockerfile().all("ARG")

    def test_every_device_has_a_stage(self) -> None:
        stages = re.findall(r"AS (\S+)", "\n".join(Dockerfile().all("FROM")))
        assert {"build", "runtime-cpu", "runtime-cuda"} == set(stages)

    @pytest.mark.skipif(not instruction_sets(), reason="the C++ kernels aren't built")
    def test_it_sees_that_the_kernels_were_built(self) -> None:
        (command,) = (line for line in Dockerfile().all("RUN") if "minivllm_kernels" in line)
        arguments = shlex.split(command.rpartition("&&")[2])
        assert arguments[:2] == ["python", "-c"]
        assert subprocess.run([sys.executable, *arguments[1:]]).returncode == 0

    def test_its_health_check_needs_no_key(self) -> None:
        (check,) = Dockerfile().all("HEALTHCHECK")
        (path,) = re.findall(r"127\.0\.0\.1:8000(/\w+)", check)
        assert path.encode() in PUBLIC_PATHS
        assert path in routes()


class TestCompose:
    @pytest.fixture
    def compose(self) -> Any:
        return load(DEPLOY / "docker-compose.yml")

    @pytest.mark.parametrize("name", ["docker-compose.yml", "docker-compose.gpu.yml"])
    def test_flags_and_time_to_stop(self, compose: Any, name: str) -> None:
        service = compose["services"]["minivllm"] | load(DEPLOY / name)["services"]["minivllm"]
        _, server = served_by(Dockerfile().entrypoint + service["command"])
        assert int(service["stop_grace_period"].removesuffix("s")) > server.shutdown_timeout + SLOW_READERS

    def test_files_are_there(self, compose: Any) -> None:
        named = {"models", "prometheus"}
        assert set(compose["volumes"]) == named
        for service in compose["services"].values():
            for volume in service.get("volumes", ()):
                source = volume.split(":")[0]
                assert source in named or (DEPLOY / source).exists(), volume
        build = compose["services"]["minivllm"]["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).exists()

    def test_nothing_is_open_to_the_network(self, compose: Any) -> None:
        ports = itertools.chain(*(service["ports"] for service in compose["services"].values()))
        assert all(port.startswith("127.0.0.1:") for port in ports)

    def test_grafana_finds_prometheus_and_the_dashboard(self, compose: Any) -> None:
        provisioning = DEPLOY / "grafana" / "provisioning"
        (source,) = load(provisioning / "datasources" / "prometheus.yml")["datasources"]
        assert source["url"] == "http://prometheus:9090"
        assert "prometheus" in compose["services"]
        (provider,) = load(provisioning / "dashboards" / "minivllm.yml")["providers"]
        volumes = compose["services"]["grafana"]["volumes"]
        target = f"{provider['options']['path']}/dashboard.json"
        assert f"./grafana/dashboard.json:{target}:ro" in volumes
        environment = compose["services"]["grafana"]["environment"]
        assert environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == target


class TestKubernetes:
    @pytest.fixture
    def deployment(self) -> Any:
        return load(KUBERNETES / "base" / "deployment.yaml")

    @pytest.fixture
    def pod(self, deployment: Any) -> Any:
        return deployment["spec"]["template"]["spec"]

    def test_resources_are_there(self) -> None:
        base = load(KUBERNETES / "base" / "kustomization.yaml")["resources"]
        optional = ["podmonitor.yaml", "keda.yaml", "kustomization.yaml"]
        assert sorted(base + optional) == sorted(path.name for path in (KUBERNETES / "base").iterdir())
        for path in (KUBERNETES / "base").iterdir():
            assert load(path).keys() >= {"apiVersion", "kind"}

    def test_they_select_the_pods(self, deployment: Any) -> None:
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        base = KUBERNETES / "base"
        assert deployment["spec"]["selector"]["matchLabels"] == labels
        assert load(base / "service.yaml")["spec"]["selector"] == labels
        assert load(base / "pdb.yaml")["spec"]["selector"]["matchLabels"] == labels
        assert load(base / "podmonitor.yaml")["spec"]["selector"]["matchLabels"] == labels
        assert load(base / "keda.yaml")["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]

    def test_probes_ask_routes_that_need_no_key(self, pod: Any) -> None:
        (container,) = pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert [str(port) for port in ports.values()] == Dockerfile().all("EXPOSE")
        paths = {}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            request = container[probe]["httpGet"]
            assert request["port"] in ports
            assert request["path"] in routes()
            assert request["path"].encode() in PUBLIC_PATHS
            paths[probe] = request["path"]
        assert paths == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}
        assert load(KUBERNETES / "base" / "service.yaml")["spec"]["ports"][0]["targetPort"] in ports
        (endpoint,) = load(KUBERNETES / "base" / "podmonitor.yaml")["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] in ports
        assert endpoint["path"] in routes()

    def test_there_is_time_to_drain(self, pod: Any) -> None:
        (container,) = pod["containers"]
        _, server = served_by(Dockerfile().entrypoint + container["args"])
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command[0] == "sleep"
        needed = int(command[1]) + server.shutdown_timeout + SLOW_READERS
        assert needed + 5 <= pod["terminationGracePeriodSeconds"] <= needed + 30

    def test_a_gpu_is_asked_for_and_given(self, pod: Any) -> None:
        resources = pod["containers"][0]["resources"]
        assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "1"

    def test_keys_come_from_one_secret(self, pod: Any) -> None:
        environment = {
            entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in pod["containers"][0]["env"]
        }
        (endpoint,) = load(KUBERNETES / "base" / "podmonitor.yaml")["spec"]["podMetricsEndpoints"]
        credentials = endpoint["authorization"]["credentials"]
        assert environment[ENVIRONMENT_VARIABLE]["name"] == credentials["name"]
        told = (KUBERNETES / "base" / "kustomization.yaml").read_text()
        for key in (environment[ENVIRONMENT_VARIABLE]["key"], credentials["key"]):
            assert f"--from-literal={key}=" in told

    def test_what_is_written_to_is_mounted(self, pod: Any) -> None:
        (container,) = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        (environment,) = (line for line in Dockerfile().all("ENV") if "HF_HOME" in line)
        written = dict(re.findall(r"(HF_HOME|TRITON_CACHE_DIR)=(\S+)", environment))
        assert len(written) == 2
        assert all(any(path.startswith(mount) for mount in mounts.values()) for path in written.values())
        users = re.findall(r"^USER (\d+):(\d+)$", (DEPLOY / "Dockerfile").read_text(), flags=re.M)
        assert users == [(str(pod["securityContext"]["runAsUser"]), str(pod["securityContext"]["fsGroup"]))]

    def test_the_cpu_variant_changes_what_is_there(self, deployment: Any) -> None:
        variant = load(KUBERNETES / "cpu" / "kustomization.yaml")
        assert [(KUBERNETES / "cpu" / path).resolve() for path in variant["resources"]] == [
            KUBERNETES / "base"
        ]
        (patch,) = variant["patches"]
        for operation in yaml.safe_load(patch["patch"]):
            place, *path = deployment, *operation["path"].split("/")[1:]
            for step in path:
                place = place[int(step)] if isinstance(place, list) else place[step]
            if path[-1] == "args":
                engine, server = served_by(Dockerfile().entrypoint + operation["value"])
                assert engine.model is None
                assert server.shutdown_timeout == 120
            if path[-1] == "resources":
                assert "nvidia" not in str(operation["value"])

    def test_keda_scales_on_what_waits(self) -> None:
        spec = load(KUBERNETES / "base" / "keda.yaml")["spec"]
        queries = {trigger["name"]: trigger["metadata"]["query"] for trigger in spec["triggers"]}
        assert "minivllm:num_requests_waiting{" in queries["queue"]
        running = next(trigger for trigger in spec["triggers"] if trigger["name"] == "running")
        assert int(running["metadata"]["threshold"]) < EngineConfig().max_num_seqs
