"""deploy/ stays true: manifests have the fields of KubeRay, no secret and no root, and every command in them parses."""

from __future__ import annotations

import copy
import fnmatch
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from commands import parses
from setwise.platform import run

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERAY = sorted((DEPLOY / "kuberay").glob("*.yaml"))
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
GUIDE = (DEPLOY / "README.md").read_text()
SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
SECRET = re.compile(r"token|password|secret|credential|key", re.IGNORECASE)


def read(path: Path) -> Any:
    return YAML(typ="safe").load(path)


COMPOSE = read(DEPLOY / "compose.yaml")


def mistakes(manifest: Any) -> list[str]:
    """What the schema of the manifest's kind does not allow, each with its place."""
    schema = {"$defs": SCHEMA["$defs"], "$ref": f"#/$defs/{manifest['kind']}"}
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(manifest)]


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a document."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(part)


def pods(manifest: Any) -> list[dict[str, Any]]:
    return [node for node in nodes(manifest) if "containers" in node]


def commands_of_the_guide() -> list[str]:
    """Lines of the guide's shell blocks that call setwise, here or in the head's container."""
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE, flags=re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    lines = [line.removeprefix("docker compose exec head ").removesuffix(" &") for line in lines]
    return [line for line in lines if line.startswith("setwise ")]


ENTRYPOINTS = [read(path)["spec"]["entrypoint"] for path in KUBERAY if read(path)["kind"] == "RayJob"]


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_a_manifest_has_only_fields_that_kuberay_has(path: Path) -> None:
    assert mistakes(read(path)) == []


@pytest.mark.parametrize(
    ("file", "place", "key"),
    [
        ("raycluster.yaml", ("spec",), "enableInTreeAutoscalling"),
        ("raycluster.yaml", ("spec", "authOptions"), "secret"),
        ("raycluster.yaml", ("spec", "workerGroupSpecs", 0), "minReplica"),
        ("raycluster.yaml", ("spec", "headGroupSpec", "template", "spec", "securityContext"), "runAsNonroot"),
        ("study.yaml", ("spec",), "entryPoint"),
        ("store.yaml", ("spec", "resources", "requests"), "store"),
    ],
)
def test_a_misspelt_key_is_found(file: str, place: tuple[str | int, ...], key: str) -> None:
    manifest = copy.deepcopy(read(DEPLOY / "kuberay" / file))
    node = manifest
    for step in place:
        node = node[step]
    node[key] = "1"
    assert any(key in mistake for mistake in mistakes(manifest))


def test_a_value_of_another_type_is_found() -> None:
    manifest = read(DEPLOY / "kuberay/raycluster.yaml")
    manifest["spec"]["workerGroupSpecs"][0]["maxReplicas"] = "8"
    manifest["spec"]["autoscalerOptions"]["version"] = "v3"
    assert len(mistakes(manifest)) == 2


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_every_pod_is_unprivileged_and_says_what_it_needs(path: Path) -> None:
    for pod in pods(read(path)):
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, container["name"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, container["name"]
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), container["name"]
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"] or (
                container["name"] == "ray-job-submitter"
            )


def test_the_cluster_asks_for_a_token_and_grows_from_nothing() -> None:
    spec = read(DEPLOY / "kuberay/raycluster.yaml")["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "setwise-ray-token"}
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert {group["labels"]["ray.io/accelerator-type"] for group in spec["workerGroupSpecs"]} == {"RTX3090", "A100"}
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        # KubeRay takes resources from one of the two places, and from autoscaler v2 on lets no pod restart by itself.
        assert group["rayStartParams"] == {} and "restartPolicy" not in group["template"]["spec"]


def test_a_job_runs_in_a_group_of_the_cluster() -> None:
    cluster = read(DEPLOY / "kuberay/raycluster.yaml")
    offered = {name for group in cluster["spec"]["workerGroupSpecs"] for name in group["resources"]}
    for path in KUBERAY:
        if (job := read(path))["kind"] == "RayJob":
            assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
            assert set(json.loads(job["spec"]["entrypointResources"])) <= offered


def test_the_cluster_has_the_ray_of_the_lock() -> None:
    locked = re.search(r"^ray==([\d.]+)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    assert locked is not None
    assert read(DEPLOY / "kuberay/raycluster.yaml")["spec"]["rayVersion"] == locked[1]


def test_every_claim_and_the_image_are_the_same_everywhere() -> None:
    manifests = [read(path) for path in KUBERAY]
    claims = {node["claimName"] for manifest in manifests for node in nodes(manifest) if "claimName" in node}
    assert claims == {manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] != "RayJob"} - {
        "setwise"
    }
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert version is not None
    images = {container["image"] for manifest in manifests for pod in pods(manifest) for container in pod["containers"]}
    assert images == {f"setwise:{version[1]}-cuda"}
    ours = {service["image"] for name, service in COMPOSE["services"].items() if name != "postgres"}
    assert ours == {f"setwise:{version[1]}-${{SETWISE_DEVICE:-cuda}}"}


def test_no_file_holds_a_secret() -> None:
    for path in KUBERAY:
        for node in nodes(read(path)):
            assert node.get("kind") != "Secret", path
            assert "value" not in node, f"{path}: an environment variable by value; take it from a secret"
    for name, service in COMPOSE["services"].items():
        for variable, value in service["environment"].items():
            if re.search(r"TOKEN|PASSWORD", variable):
                assert re.fullmatch(r"\$\{SETWISE_[A-Z_]+:\?[^}]+\}", value), f"{name}: {variable}"
            assert not re.search(r"://[^/@\s]*:[^/@\s]*@", value), f"{name}: {variable} has a password in its address"
    for line in (DEPLOY / ".env.example").read_text().splitlines():
        variable, equals, value = line.partition("=")
        assert not (equals and SECRET.search(variable) and value), line
    assert not re.search(r"^(ENV|ARG) .*(TOKEN|PASSWORD)", DOCKERFILE, flags=re.MULTILINE)


def test_git_and_the_builder_never_see_the_environment_file() -> None:
    ignored = subprocess.run(["git", "-C", ROOT, "check-ignore", "-q", "deploy/.env"], check=False)
    assert ignored.returncode == 0
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert not any(fnmatch.fnmatch(path, line[1:]) for line in lines if line[0] == "!" for path in ("deploy", ".env"))


def test_every_variable_that_compose_takes_is_explained() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    example = dict(re.findall(r"^([A-Z_]+)=(.*)$", (DEPLOY / ".env.example").read_text(), flags=re.MULTILINE))
    for name, operator, default in re.findall(r"\$\{(\w+)(:[-?])([^}]*)\}", text):
        assert example[name] == (default if operator == ":-" else ""), name
    assert set(example) == set(re.findall(r"\$\{(\w+)", text))


def test_compose_opens_ports_on_loopback_alone() -> None:
    opened = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert sorted(port.rpartition("}:")[2] for port in opened) == ["5000:5000", "5432:5432", "8265:8265"]
    assert all(port.startswith("${SETWISE_BIND:-127.0.0.1}:") for port in opened)
    assert not any("network_mode" in service or service.get("privileged") for service in COMPOSE["services"].values())


def test_compose_gives_no_service_root_and_asks_each_how_it_is() -> None:
    assert re.findall(r"^USER (.+)", DOCKERFILE, flags=re.MULTILINE) == ["1000:1000"]
    for name, service in COMPOSE["services"].items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("user", "postgres") == "postgres", name
        assert service["healthcheck"]["test"][0] == "CMD", name
        for volume in service["volumes"]:
            assert volume.rpartition(":")[0] in COMPOSE["volumes"] or volume == "${SETWISE_STORE_VOLUME:-store}:/store"


def test_mlflow_answers_to_named_hosts_and_hands_artifacts_on() -> None:
    mlflow = COMPOSE["services"]["mlflow"]
    options = dict(part.removeprefix("--").partition("=")[::2] for part in mlflow["command"][2:])
    hosts = options["allowed-hosts"].partition(":-")[2].removesuffix("}").split(",")
    assert hosts == ["localhost:*", "127.0.0.1:*", "mlflow:*"]
    assert f"{options['artifacts-destination']}" in [volume.partition(":")[2] for volume in mlflow["volumes"]]
    assert mlflow["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


@pytest.mark.filterwarnings("ignore")  # of modules that the two command lines import
def test_every_option_of_ray_and_mlflow_is_one_of_theirs() -> None:
    from mlflow.cli import server
    from ray.scripts.scripts import start

    known = {
        command.name: {option for parameter in command.params for option in parameter.opts}
        for command in (server, start)
    }
    called = [service["command"] for name, service in COMPOSE["services"].items() if "command" in service]
    typed = re.findall(r"^ *((?:ray start|mlflow server) .+)", GUIDE, flags=re.MULTILINE)
    lines = [shlex.split(line) for line in typed]
    assert len(called) == 4 and len(lines) == 3
    for program, verb, *arguments in called + lines:
        assert program in ("ray", "mlflow")
        options = {part.partition("=")[0] for part in arguments if part.startswith("--")}
        assert options <= known[verb], f"{program} {verb}: {options - known[verb]}"
    parameters = read(DEPLOY / "kuberay/raycluster.yaml")["spec"]["headGroupSpec"]["rayStartParams"]
    assert {f"--{name}" for name in parameters} <= known["start"]


@pytest.mark.parametrize("line", [*ENTRYPOINTS, *commands_of_the_guide()])
def test_every_setwise_command_parses(line: str) -> None:
    parses(line)


def test_the_guide_and_the_jobs_have_commands() -> None:
    assert len(ENTRYPOINTS) == 2 and len(commands_of_the_guide()) >= 6


def test_images_have_a_version() -> None:
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, flags=re.MULTILINE))
    based = [image for image in re.findall(r"^FROM (\S+)", DOCKERFILE, flags=re.MULTILINE) if image not in stages]
    assert len(based) == 2
    for image in [*based, COMPOSE["services"]["postgres"]["image"]]:
        assert re.search(r":\d+\.\d+[\w.-]*$", image), f"{image} moves"


def test_what_the_image_is_built_from_is_there_and_is_sent_to_the_builder() -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [name for line in re.findall(r"^COPY (.+)", DOCKERFILE, flags=re.MULTILINE) for name in line.split()[:-1]]
    assert sorted(copied) == sorted(sent)
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_has_every_package_of_the_lock_with_its_hash() -> None:
    lines = [line for line in DOCKERFILE.splitlines() if "$install" in line]
    assert [("--require-hashes" in line, "--torch-backend cpu" in line) for line in lines] == [
        (True, False),
        (True, False),
        (False, True),
    ]
    assert "--only-binary :all:" in DOCKERFILE and "UV_COMPILE_BYTECODE=1" in DOCKERFILE
    assert not re.search(r"--(default-)?index|--extra-index|https?://", DOCKERFILE)


def test_the_image_knows_the_commit_it_was_built_from() -> None:
    lines = DOCKERFILE.splitlines()
    assert lines.index("ARG COMMIT=") < lines.index(f"ENV {run.BUILT_FROM}=$COMMIT")
    builds = re.findall(r"docker build .+", "\n".join(lines))
    assert builds and all("--build-arg COMMIT=$COMMIT" in line for line in builds)
    command = re.search(r"COMMIT=\$\((git .+)\)", DOCKERFILE)
    assert command is not None
    done = subprocess.run(shlex.split(command[1]), cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?\n", done.stdout)


def test_the_cpu_image_leaves_out_what_needs_cuda_and_nothing_else() -> None:
    program = re.search(r"awk '(.+)' requirements.lock > cpu.lock", DOCKERFILE)
    assert program is not None
    done = subprocess.run(["awk", program[1], ROOT / "requirements.lock"], capture_output=True, text=True, check=True)
    kept = set(re.findall(r"^([a-z0-9][\w.-]*)==", done.stdout, flags=re.MULTILINE))
    every = set(re.findall(r"^([a-z0-9][\w.-]*)==", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE))
    left_out = every - kept
    assert {"torch", "torchvision", "triton"} <= left_out
    assert all(re.match(r"torch|triton|cuda-|nvidia-", name) for name in left_out)
    assert {"nvidia-ml-py", "torch-c-dlpack-ext"} & every <= kept
    assert done.stdout.count("--hash=sha256:") >= len(kept)


def test_every_node_has_the_settings_that_setwise_gives_to_its_own_cluster() -> None:
    source = (ROOT / "platform/cluster.py").read_text()
    for name, value in re.findall(r'"((?:RAY|TUNE)_\w+)": "?([\w.]+)"?', source):
        expected = re.search(rf'^{value} = "(.+)"', source, flags=re.MULTILINE)
        assert f"{name}={expected[1] if expected else value} " in DOCKERFILE, f"{name} is missing from the Dockerfile"
