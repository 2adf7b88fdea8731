"""deploy/: container files, compose.yaml and the Helm chart start what exists, without rights and without secrets."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from isthmus.cloud.settings import ENVIRONMENT, CloudSettings
from isthmus.command_line import option_fields
from tests.rigs.project.system import missing

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "isthmus"
CONTAINERS = sorted((DEPLOY / "containers").glob("*.Containerfile"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SETTINGS = {f"{ENVIRONMENT}{field.name.upper()}" for field in option_fields(CloudSettings)}
FLAGS = json.loads((ROOT / "tests/golden/cli_flags.json").read_text())


PATHS = {"state", "release", "signing_key_file", "tls_cert", "tls_key", "tls_client_ca", "enrolment_key_file"}


def tool(name: str) -> str:
    """Return the path of a tool of this environment; without it the test is skipped (see ``missing``)."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        missing(f"{name} is not installed: make install")
    return found


def checked(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_container_files_are_clean_and_run_as_nobody() -> None:
    for path in CONTAINERS:
        text = path.read_text()
        assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "10001:10001", path.name
        assert re.search(r"^STOPSIGNAL SIGTERM$", text, re.MULTILINE)
        words = [
            word
            for line in re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", text, re.MULTILINE)
            for word in json.loads(line)
        ]
        assert " ".join(words[:3]) in FLAGS, words
        assert {word for word in words if word.startswith("--")} <= {
            each for names in FLAGS[" ".join(words[:3])] for each in names.split(", ")
        }
    checked(tool("hadolint"), *map(str, CONTAINERS))


@pytest.mark.parametrize("script", sorted(DEPLOY.rglob("*.sh")), ids=lambda script: script.name)
def test_a_script_can_be_read_by_sh(script: Path) -> None:
    """Those that need root, buildah or debootstrap are not run by tests: deploy/README.md says where they were."""
    assert script.stat().st_mode & 0o100 and script.read_text().startswith("#!/bin/sh\n")
    checked("sh", "-n", str(script))


def test_a_build_gets_the_listed_files_and_no_secret() -> None:
    """compose-secrets.sh writes to deploy/secrets, which is inside the folder that images are built from."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    given = {line[1:] for line in lines if line.startswith("!")}
    assert lines[0] == "*", "nothing that is not listed"
    assert all((ROOT / name).exists() for name in given)
    assert not given & {"deploy", ".git", "tests", "docs"} and not any(name.startswith(".venv") for name in given)
    rooms = {"cloud", "data", "distill", "edge", "isthmus", "proto"}
    assert rooms | {"pyproject.toml", "setup.py", "constraints.txt", "README.md", "LICENSE"} <= given


def test_the_compose_file_fits_its_schema_and_starts_what_exists() -> None:
    checked(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml"))
    for name in ("cloud", "worker"):
        service = COMPOSE["services"][name]
        assert (service["user"], service["read_only"], service["cap_drop"]) == ("10001:10001", True, ["ALL"])
        assert f"isthmus {' '.join(service['command'])}" in FLAGS
        assert {each for each in service["environment"] if each.startswith(ENVIRONMENT)} <= SETTINGS
    assert (DEPLOY / COMPOSE["services"]["cloud"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / COMPOSE["services"]["cloud"]["build"]["dockerfile"]).is_file()
    for service in COMPOSE["services"].values():
        assert not service.get("privileged") and "docker.sock" not in str(service)
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
        mounted = [each.split(":")[0] for each in service.get("volumes", ()) if each.startswith("./observability")]
        assert all((DEPLOY / each).exists() for each in mounted)
    # Only the cloud can be reached from other machines.
    published = {name: each["ports"] for name, each in COMPOSE["services"].items() if "ports" in each}
    assert published == {"cloud": ["50051:50051"], "grafana": ["127.0.0.1:3000:3000"]}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_scripts_make_every_secret_that_the_compose_file_names(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    script = str(DEPLOY / "compose-secrets.sh")
    assert subprocess.run([script, str(folder)], capture_output=True, check=False).returncode == 2
    checked(str(DEPLOY / "private-ca.sh"), str(folder), "cloud", "localhost")
    checked(script, str(folder))
    wanted = {Path(each["file"]).name for each in COMPOSE["secrets"].values()} | {"cloud.env"}
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert wanted <= set(made) and all(made.values())
    assert len(made["signing.key"]) == 32, "an Ed25519 key"
    assert made["postgres.password"].decode() in made["cloud.env"].decode()
    for name in ("signing.key", "tls.key", "enrolment.key", "cloud.env"):
        assert (folder / name).stat().st_mode & 0o077 == 0, name
    checked(script, str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made, "a second run keeps all"


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the chart's manifests as Helm renders them."""
    helm: Any = pytest.importorskip("helm_python")
    with helm.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name="isthmus", namespace="clouds")
    return [each for text in files.values() for each in yaml.safe_load_all(text) if each]


RAY: dict[str, Any] = {"ray": {"enabled": True, "autoscaling": {"enabled": True}, "executors": {"maxReplicas": 3}}}
RAY_FIELDS = {
    "": {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"},
    "head": {"serviceType", "rayStartParams", "template"},
    "group": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
    "scaling": {"idleTimeoutSeconds", "upscalingMode", "resources", "env", "securityContext"},
}
"""The fields of KubeRay's RayCluster (ray.io/v1) that the chart may use."""


def pods(manifests: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for manifest in manifests:
        if manifest["kind"] in ("Deployment", "Job"):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]
        if manifest["kind"] == "RayCluster":
            spec = manifest["spec"]
            for name, group in (("head", spec["headGroupSpec"]), ("executors", spec["workerGroupSpecs"][0])):
                yield f"ray-{name}", group["template"]["spec"]


MORE: dict[str, Any] = {
    "secrets": {"clientCa": "clients"},
    "metrics": {"enabled": True},
    "fronts": {"autoscaling": {"enabled": True}, "settings": {"MAX_DEVICES": "5"}, "nodeSelector": {"kind": "front"}},
    "image": {"digest": "sha256:" + "0" * 64},
}


@pytest.mark.parametrize("values", [{}, MORE, RAY], ids=["defaults", "all", "ray"])
def test_the_chart_renders_to_sound_manifests_without_rights_and_secrets(values: dict[str, Any]) -> None:
    validate: Any = pytest.importorskip("kubernetes_validate")
    manifests = rendered(values)
    for manifest in manifests:
        if manifest["kind"] != "RayCluster":  # a custom resource, see below
            validate.validate(manifest, "1.33", strict=True)
        assert manifest["kind"] != "Secret" and manifest["metadata"]["namespace"] == "clouds"
    kinds = [manifest["kind"] for manifest in manifests]
    assert kinds.count("PodDisruptionBudget") == 2 and "Job" in kinds
    assert kinds.count("NetworkPolicy") == (4 if values is RAY else 3)
    assert ("HorizontalPodAutoscaler" in kinds) == (values is MORE), "off unless asked for"
    assert ("RayCluster" in kinds) == (values is RAY), "off unless asked for"
    for name, pod in pods(manifests):
        # The operator gives the head an account of its own, to add and remove pods.
        assert pod["securityContext"]["runAsNonRoot"]
        assert name == "ray-head" or not pod["automountServiceAccountToken"], name
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] and security["capabilities"] == {"drop": ["ALL"]}
            assert not security["allowPrivilegeEscalation"] and "memory" in container["resources"]["limits"]
            if "args" in container:
                assert f"isthmus {' '.join(container['args'])}" in FLAGS
            for variable in container.get("env", ()):
                known = ("AWS_", "RAY_", "HOME", "TMPDIR")
                assert variable["name"] in SETTINGS or variable["name"].startswith(known), variable
                if variable["name"] in ("ISTHMUS_CLOUD_DATABASE", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"):
                    assert "secretKeyRef" in variable["valueFrom"] and "value" not in variable
    front = dict(pods(manifests))["isthmus-front"]["containers"][0]
    assert front["readinessProbe"]["grpc"]["port"] == 50052
    environment = {each["name"]: each.get("value") for each in front["env"]}
    assert environment["ISTHMUS_CLOUD_HEALTH_LISTEN"] == "0.0.0.0:50052"
    # What the pod's variables say is accepted by the server.
    given = {
        name.removeprefix(ENVIRONMENT).lower(): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT) and value is not None and "SETTINGS" not in name
    }
    whole = ("workers", "max_devices")
    CloudSettings(
        **{
            name: int(value) if name in whole else Path(value) if name in PATHS else value
            for name, value in given.items()
        }
    )


# In a process of its own: once imported here, Ray would keep that there is no token, for all tests of this process.
_READ_BY_RAY = """
import json, sys
import ray
from ray.autoscaler._private.kuberay import autoscaling_config as reader
print(json.dumps((ray.__version__, reader._derive_autoscaling_config_from_ray_cr(json.load(sys.stdin)))))
"""


def test_the_ray_cluster_is_one_that_operator_and_autoscaler_read() -> None:
    """Kubernetes's own schemas know no RayCluster. Its pods are checked as pods, and the rest by Ray's own reader."""
    validate: Any = pytest.importorskip("kubernetes_validate")
    manifests = rendered(RAY)
    (cluster,) = [manifest for manifest in manifests if manifest["kind"] == "RayCluster"]
    assert cluster["apiVersion"] == "ray.io/v1"
    spec, (group,) = cluster["spec"], cluster["spec"]["workerGroupSpecs"]
    assert spec.keys() == RAY_FIELDS[""] and spec["headGroupSpec"].keys() == RAY_FIELDS["head"]
    assert group.keys() == RAY_FIELDS["group"] and spec["autoscalerOptions"].keys() <= RAY_FIELDS["scaling"]
    for part in (spec["headGroupSpec"], group):
        template = part["template"]
        metadata = {"name": "pod", **template["metadata"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        validate.validate(pod, "1.33", strict=True)
        assert all(isinstance(value, str) for value in part["rayStartParams"].values())
    assert spec["headGroupSpec"]["rayStartParams"]["include-dashboard"] == "false"
    # Ray's autoscaler reads the cluster as it is in Kubernetes.
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    done = subprocess.run(
        [sys.executable, "-c", _READ_BY_RAY], input=json.dumps(cluster), capture_output=True, text=True, check=True
    )
    version, read = json.loads(done.stdout.splitlines()[-1])
    kinds = read["available_node_types"]
    head, executors = kinds[read["head_node_type"]], kinds["executors"]
    assert (executors["min_workers"], executors["max_workers"], read["max_workers"]) == (1, 3, 3)
    assert executors["resources"]["CPU"] == 2 and head["resources"]["CPU"] == 0, "the head runs no work"
    assert read["idle_timeout_minutes"] == 1
    # What connects has the token, and the port is the one of Ray Client.
    for name in ("isthmus-front", "isthmus-worker"):
        environment = {each["name"]: each for each in dict(pods(manifests))[name]["containers"][0]["env"]}
        assert environment["ISTHMUS_CLOUD_EXECUTOR"]["value"] == "ray://isthmus-ray-head-svc:10001"
        assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "isthmus-ray", "key": "token"}
    assert spec["rayVersion"] == version, "the version that was tested"


def test_a_new_front_serves_for_a_while_before_the_next_old_one_goes() -> None:
    for given, seconds in (({}, 15), ({"fronts": {"minReadySeconds": 40}}, 40)):
        specs = {each["metadata"]["name"]: each["spec"] for each in rendered(given) if each["kind"] == "Deployment"}
        assert specs["isthmus-front"]["minReadySeconds"] == seconds
        assert specs["isthmus-front"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_the_chart_is_clean_and_refuses_values_that_cannot_work() -> None:
    helm: Any = pytest.importorskip("helm_python")
    assert not helm.lint(str(CHART))["errors"]
    for wrong in ({"artefacts": {"url": "/tmp"}}, {"fronts": {"replicas": 0}}, {"metrics": {"enabled": True}}):
        with pytest.raises(helm.HelmError):
            rendered(wrong)


def test_alerts_board_and_readme_of_the_deployment_agree() -> None:
    readme = (DEPLOY / "README.md").read_text()
    for name in ("compose.yaml", "helm/isthmus", "observability", "containers"):
        assert name in readme, name
