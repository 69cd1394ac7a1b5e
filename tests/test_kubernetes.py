"""The manifests in deploy/ against their schemas, and against what they start: ports, paths, options, settings."""

import json
from importlib.util import find_spec
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from kubernetes_validate import ValidationError, validate  # type: ignore[import-untyped]
from typer.testing import CliRunner

from cascade.cli import main
from tests.conftest import need
from tests.helpers.paths import DATA, ROOT

KUBERNETES = "1.33"


def documents(name: str) -> dict[str, Any]:
    """The documents of a file in deploy/ by their kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((ROOT / "deploy" / name).read_text())}


PLAIN = documents("kubernetes/deployment.yaml")
MONITOR = documents("kubernetes/servicemonitor.yaml")["ServiceMonitor"]
RAY = documents("kubernetes/rayservice.yaml")["RayService"]
POLICIES = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/networkpolicy.yaml").read_text()))


def schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / "schemas" / f"{name}.json").read_text())
    return found


def templates(service: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a RayService, the head's first."""
    config = service["spec"]["rayClusterConfig"]
    return [config["headGroupSpec"]["template"], *(group["template"] for group in config["workerGroupSpecs"])]


def pod(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template.get("metadata", {})}, **template}


def pods() -> list[dict[str, Any]]:
    return [PLAIN["Deployment"]["spec"]["template"]["spec"], *(each["spec"] for each in templates(RAY))]


@pytest.mark.parametrize("kind", PLAIN)
def test_kubernetes_takes_the_plain_deployment(kind: str) -> None:
    validate(PLAIN[kind], KUBERNETES, strict=True)


def test_kubernetes_would_see_a_mistake() -> None:
    wrong = json.loads(json.dumps(PLAIN["Deployment"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(ValidationError):
        validate(wrong, KUBERNETES, strict=True)


def test_custom_resources_fit_their_schemas() -> None:
    jsonschema.validate(MONITOR, schema("servicemonitor"))
    jsonschema.validate(RAY, schema("rayservice"))
    for template in templates(RAY):
        validate(pod(template), KUBERNETES, strict=True)


@pytest.mark.parametrize(
    "path, value",
    [
        (("spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "maxReplica"), 3),
        (("spec", "serveConfig"), ""),
    ],
)
def test_the_schema_would_see_a_mistake(path: tuple[Any, ...], value: object) -> None:
    wrong = json.loads(json.dumps(RAY))
    at = wrong
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema("rayservice"))


@pytest.mark.parametrize("spec", pods(), ids=["plain", "head", "worker"])
def test_pods_are_bounded_and_may_do_little(spec: dict[str, Any]) -> None:
    assert spec["enableServiceLinks"] is False, "variables of Services are not ours"
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"]
    for container in spec["containers"]:
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= container["resources"][kind].keys()
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert writable <= {"/tmp", "/dev/shm"}
        assert container["readinessProbe"] and container["livenessProbe"]


def test_closed_by_default() -> None:
    """Every pod has a network policy, and every front end wants keys."""
    labels = [PLAIN["Deployment"]["spec"]["template"]["metadata"]["labels"]]
    labels += [template["metadata"]["labels"] for template in templates(RAY)]
    for policy in POLICIES:
        validate(policy, KUBERNETES, strict=True)
        assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        assert all(rule.get("from") for rule in policy["spec"]["ingress"]), "an empty `from` lets everybody in"
    for pod in labels:
        selectors = [policy["spec"]["podSelector"]["matchLabels"] for policy in POLICIES]
        assert [selector for selector in selectors if selector.items() <= pod.items()], pod
    arguments = PLAIN["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"]
    (application,) = yaml.safe_load(RAY["spec"]["serveConfigV2"])["applications"]
    keys = {arguments[arguments.index("--api-keys") + 1], application["args"]["api_keys"]}
    for spec in pods():
        (path,) = (mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "keys")
        (volume,) = (volume["secret"] for volume in spec["volumes"] if volume["name"] == "keys")
        assert keys == {f"{path}/{item['path']}" for item in volume["items"]}
    assert RAY["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}, "the dashboard runs code"


def test_services_find_their_pods_and_ports() -> None:
    labels = PLAIN["Deployment"]["spec"]["template"]["metadata"]["labels"]
    (container,) = PLAIN["Deployment"]["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for selector in (
        PLAIN["Deployment"]["spec"]["selector"]["matchLabels"],
        PLAIN["Service"]["spec"]["selector"],
        PLAIN["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    (port,) = PLAIN["Service"]["spec"]["ports"]
    assert port["targetPort"] in ports
    assert MONITOR["spec"]["selector"]["matchLabels"].items() <= PLAIN["Service"]["metadata"]["labels"].items()
    assert MONITOR["spec"]["endpoints"][0]["port"] == port["name"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in ports


def test_the_front_end_takes_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """And has its port and its time to drain where the pod has them."""
    from handlers.asgi import supervisor

    asked: dict[str, Any] = {}
    monkeypatch.setattr(supervisor, "serve", lambda settings: asked.update(settings.options()))
    spec = PLAIN["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    done = CliRunner().invoke(main.app, ["serve", *container["args"]])
    assert done.exit_code == 0, done.output
    assert asked["port"] == container["ports"][0]["containerPort"]
    assert asked["model_store"] in [mount["mountPath"] for mount in container["volumeMounts"]]
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert asked["drain_timeout"] + sleep < spec["terminationGracePeriodSeconds"]


def test_probes_and_scrapes_are_routes_of_the_application() -> None:
    from handlers.asgi.app import create_app
    from handlers.asgi.middleware import LIMITS

    class Nothing:
        limits = LIMITS

    routes = {route.path for route in create_app(Nothing()).app.routes}  # type: ignore[arg-type, attr-defined]
    (container,) = PLAIN["Deployment"]["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in routes
    assert MONITOR["spec"]["endpoints"][0]["path"] in routes


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
@pytest.mark.parametrize("where", ["ray", "kubernetes"])
def test_ray_serve_takes_its_configuration(where: str) -> None:
    need(find_spec("ray"), "Ray is not installed")
    from importlib import import_module

    from ray.serve.schema import ServeDeploySchema

    from handlers.ray.replica import DEPLOYMENT, Settings

    text = (ROOT / "deploy/ray/serve.yaml").read_text() if where == "ray" else RAY["spec"]["serveConfigV2"]
    config = ServeDeploySchema(**yaml.safe_load(text))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(import_module(module), name))
    settings = Settings(**application.args)
    assert settings.api_keys or settings.hosts, "a web page can give its own name the address of loopback"
    assert {each.name for each in application.deployments} == {DEPLOYMENT.name}
    if where == "kubernetes":
        for template in templates(RAY):
            (container,) = template["spec"]["containers"]
            assert settings.model_store in [mount["mountPath"] for mount in container["volumeMounts"]]
            assert config.http_options.port in [port["containerPort"] for port in container["ports"]]
