"""The rendered manifests against KubeRay's own schema and rules, and what must never be in them."""

import copy
import gzip
import importlib.metadata
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError
from support.box.kuberay import OPERATORS

from deploy.config import ClusterConfig, GroupConfig, read_config
from deploy.errors import ManifestError
from deploy.jobs import Job
from deploy.render import JOB, KEEPERS, MAXIMA, ONCE, render, write_manifests
from diccae.cli import main
from diccae.commands import evaluate, finetune, pretrain
from diccae.config import RunConfig, config_text
from diccae.run_folder import RunFolder
from diccae.subcommands import COMMANDS, module_of
from pipeline.store import lease

ROOT = Path(__file__).parents[2]
GUARDED_PORTS = {6379, 8265, 10001, 5000}


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's schema as Kubernetes applies it, but refusing unknown fields, not dropping them."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if "properties" in schema:
        strict["properties"] = {k: _strict(inner) for k, inner in schema["properties"].items()}
        strict["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            strict[key] = _strict(schema[key])
    return strict


METADATA = {
    "type": "object",
    "required": ["name", "namespace"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


def _kind(api: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {"const": api},
            "kind": {"const": kind},
            "metadata": METADATA,
            "spec": spec,
        },
    }


@pytest.fixture(scope="session")
def schemas() -> dict[str, jsonschema.Draft202012Validator]:
    """Strict validators by kind: RayJob from its CRD, the others from the types it embeds."""
    data = Path(__file__).parent / "data" / "rayjob-v1.schema.json.gz"
    crd = _strict(json.loads(gzip.decompress(data.read_bytes())))
    cluster = crd["properties"]["spec"]["properties"]["rayClusterSpec"]["properties"]
    head = cluster["headGroupSpec"]["properties"]
    rules = cluster["networkPolicy"]["properties"]["head"]["properties"]
    labels = {"type": "object", "additionalProperties": {"type": "string"}}
    selector = {"type": "object", "properties": {"matchLabels": labels}}
    selector |= {"required": ["matchLabels"], "additionalProperties": False}
    deployment = {
        "replicas": {"type": "integer"},
        "selector": selector,
        "template": head["template"],
    }
    policy = {
        "podSelector": selector,
        "policyTypes": {"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
        "ingress": rules["ingressRules"],
    }
    by_kind = {
        "RayJob": _kind("ray.io/v1", "RayJob", crd["properties"]["spec"]),
        "Service": _kind("v1", "Service", head["headService"]["properties"]["spec"]),
        "Deployment": _kind("apps/v1", "Deployment", _object(deployment)),
        "NetworkPolicy": _kind("networking.k8s.io/v1", "NetworkPolicy", _object(policy)),
    }
    return {kind: jsonschema.Draft202012Validator(schema) for kind, schema in by_kind.items()}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


COMMAND = ("ingest", "--store", "s3://bucket/store")


def _cluster(**fields: Any) -> ClusterConfig:
    """Defaults, but for what is given; a command, which has none."""
    return ClusterConfig(**{"command": COMMAND, **fields})


def _documents(config: ClusterConfig) -> list[dict[str, Any]]:
    texts = [text for name, text in render(config).items() if name != "ray-cluster.yaml"]
    return [document for text in texts for document in yaml.safe_load_all(text)]


def _rayjob(config: ClusterConfig) -> dict[str, Any]:
    return yaml.safe_load(render(config)["rayjob.yaml"])


def _errors(schemas: dict[str, Any], document: dict[str, Any]) -> list[str]:
    return [error.json_path for error in schemas[document["kind"]].iter_errors(document)]


def _rule_errors(job: dict[str, Any]) -> Iterator[str]:
    """The rules of KubeRay's validation.go that its schema cannot say, for the fields used here."""
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    if len(job["metadata"]["name"]) > 47:
        yield "name longer than 47"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttl without shutdown"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no mapping"
    if spec["submissionMode"] == "SidecarMode" and "submitterPodTemplate" in spec:
        yield "a submitter template in SidecarMode"
    if any(spec.get(key, 1) <= 0 for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds")):
        yield "a deadline of 0"
    version = tuple(int(part) for part in cluster["rayVersion"].split("."))
    if cluster["authOptions"]["mode"] == "token" and version < (2, 52):
        yield "token authentication needs Ray 2.52"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        if not pod.get("containers"):
            yield "a group without a container"
        if "labels" in group["rayStartParams"]:
            yield "labels in rayStartParams"
        if {"num-cpus", "num-gpus", "memory"} & set(
            group["rayStartParams"]
        ) and "resources" in group:
            yield "resources in two places"
        if pod.get("restartPolicy", "Never") != "Never":
            yield "restartPolicy with autoscaler v2"
        if group.get("minReplicas", 0) > group.get("maxReplicas", 1):
            yield "minReplicas over maxReplicas"


UNUSUAL = ClusterConfig(
    name="vgg-2",
    namespace="team-av",
    command=("pretrain", "--config", "my 'own' \"config\".yaml", "--store", "s3://b/$store"),
    cpu_image="registry.example/team/diccae@sha256:" + "0" * 64,
    env={"AWS_ENDPOINT_URL": "https://s3.example:9000", "QUOTED": 'a "b": {c} # d'},
    decode=GroupConfig(node_selector={"cloud.example/spot": "true"}, max_nodes=2, cpus=2),
    image_pull_secrets=("registry-login",),
)


@pytest.mark.parametrize("config", [_cluster(), UNUSUAL], ids=["defaults", "unusual"])
def test_manifests_satisfy_the_schema_and_the_rules_of_kuberay(
    schemas: dict[str, Any], config: ClusterConfig
) -> None:
    documents = _documents(config)
    kinds = ["RayJob", "NetworkPolicy", "Deployment", "Service", "NetworkPolicy"]
    assert [document["kind"] for document in documents] == kinds
    for document in documents:
        assert _errors(schemas, document) == []
        assert document["metadata"]["namespace"] == config.namespace
    assert list(_rule_errors(documents[0])) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.submisionMode", "HTTPMode"),
        ("spec.rayClusterSpec.authOptions.mode", "tokn"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", "1"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.volumeMount", []),
        ("spec.backoffLimit", "three"),
    ],
)
def test_the_schema_check_finds_planted_faults(
    schemas: dict[str, Any], path: str, value: object
) -> None:
    job = _rayjob(_cluster())
    *parents, last = path.split(".")
    place: Any = job
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    assert _errors(schemas, job)


def test_the_rule_check_finds_planted_faults() -> None:
    job = _rayjob(_cluster())
    cluster = job["spec"]["rayClusterSpec"]
    cluster["rayVersion"] = "2.51.0"
    cluster["workerGroupSpecs"][0]["rayStartParams"]["labels"] = "a=b"
    cluster["workerGroupSpecs"][1]["template"]["spec"]["restartPolicy"] = "Always"
    job["spec"]["shutdownAfterJobFinishes"] = False
    assert len(list(_rule_errors(job))) == 4


def test_words_of_the_command_and_env_arrive_as_given() -> None:
    job = _rayjob(UNUSUAL)
    words = ["python", "-m", "diccae", *UNUSUAL.command, "--scale.shard-cache", "None"]
    assert shlex.split(job["spec"]["entrypoint"]) == words
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    env = {entry["name"]: entry["value"] for entry in head["env"]}
    maxima = json.loads(env.pop(MAXIMA))
    assert env == UNUSUAL.env
    assert maxima[0] == {"role": "decode", "nodes": 2, "cpus": 2, "gpus": 0}
    start = yaml.safe_load(render(UNUSUAL)["ray-cluster.yaml"])["head_start_ray_commands"][-1]
    assert f"{MAXIMA}={json.dumps(maxima)}" in shlex.split(start)


@pytest.mark.parametrize("node", ["head", "worker"])
def test_ray_up_gives_every_node_the_variables_that_pods_get(node: str) -> None:
    config = UNUSUAL.model_copy(update={"env": UNUSUAL.env | {"LINES": "one\ntwo: x # y"}})
    cluster = yaml.safe_load(render(config)["ray-cluster.yaml"])
    words = shlex.split(cluster[f"{node}_start_ray_commands"][-1])
    assert words[0] == "env"
    given = dict(word.split("=", 1) for word in words[1 : words.index("ray")])
    assert given.items() >= config.env.items()
    assert given["RAY_AUTH_MODE"] == "token"


def test_every_pod_pulls_with_the_secret_of_the_registry() -> None:
    pods = [pod for document in _documents(UNUSUAL) for pod in _pods_of(document)]
    assert len(pods) == 5
    for pod in pods:
        assert pod["imagePullSecrets"] == [{"name": "registry-login"}]


@pytest.mark.parametrize("place", ["env", "command"])
def test_a_password_in_a_url_is_no_part_of_a_manifest(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, config = "http://ann:geheim@mlflow:5000", tmp_path / "cluster.yaml"
    config.write_text(f"env: {{MLFLOW_TRACKING_URI: '{url}'}}\n" if place == "env" else "{}")
    words = ["pretrain", "--store", "s3://b/store", "--out", "s3://b/run"]
    words += ["--tracking.uri", url] if place == "command" else []
    out = str(tmp_path / "out")
    assert main(["render", "--config", str(config), "--out", out, "--", *words]) == 2
    printed = capsys.readouterr().err
    assert "http://ann:***@mlflow:5000 holds a password" in printed
    assert "MLFLOW_TRACKING_PASSWORD into the secret" in printed
    assert "geheim" not in printed
    assert not Path(out).exists()


def test_jobs_show_no_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "diccae pretrain --tracking.uri http://ann:geheim@mlflow:5000"
    job = Job("raysubmit_1", "RUNNING", command, "", 1.0, 0.0, None)
    monkeypatch.setattr("deploy.jobs.jobs", lambda address: [job])
    for form in ([], ["--json"]):
        assert main(["jobs", "--address", "http://127.0.0.1:9", *form]) == 0
        printed = capsys.readouterr().out
        assert "http://ann:***@mlflow:5000" in printed
        assert "geheim" not in printed


@pytest.mark.parametrize("gpus", [0, 1])
def test_nodes_that_train_without_a_card_ask_docker_for_none(gpus: int) -> None:
    train = GroupConfig(gpus=gpus, max_nodes=1, instance="c6i.2xlarge")
    cluster = yaml.safe_load(render(_cluster(train=train))["ray-cluster.yaml"])
    docker = cluster["available_node_types"]["train-gpu"]["docker"]
    assert ("--gpus all" in docker["worker_run_options"]) == bool(gpus)
    assert docker["worker_image"] == ("diccae:gpu" if gpus else "diccae:cpu")
    group = _rayjob(_cluster(train=train))["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]
    assert group["template"]["spec"]["containers"][0]["image"] == docker["worker_image"]


def _pods_of(part: Any) -> Iterator[dict[str, Any]]:
    """Everything below that has containers."""
    below = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    if isinstance(part, dict) and "containers" in part:
        yield part
    for one in below:
        yield from _pods_of(one)


def test_a_shared_claim_is_in_every_pod_and_a_run_in_one_pod_is_refused(
    schemas: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("pretrain", "--store", "s3://b/store", "--out", "/runs/first")
    config = _cluster(shared_claim="team-runs", shared_mount="/runs", command=command)
    job = _rayjob(config)
    assert _errors(schemas, job) == []
    cluster = job["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        claim = {"name": "shared", "persistentVolumeClaim": {"claimName": "team-runs"}}
        assert claim in pod["volumes"]
        mount = {"name": "shared", "mountPath": "/runs"}
        assert mount in pod["containers"][0]["volumeMounts"]
    local = ("pretrain", "--store", "s3://b/store", "--out=out/run")
    for words in (command, local, ("ingest", "--store", "store")):
        assert main(["render", "--out", str(tmp_path / "m"), "--", *words]) == 2
        assert "set shared_claim" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def _groups(config: ClusterConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Pod of the head, and of the two other groups."""
    cluster = _rayjob(config)["spec"]["rayClusterSpec"]
    head, *others = (
        group["template"]["spec"]
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    )
    return head, others


def test_pods_that_read_have_a_disk_for_shards_and_the_job_fills_no_more_of_it(
    schemas: dict[str, Any],
) -> None:
    command = ("pretrain", "--store", "s3://b/store", "--out", "s3://b/run")
    config = _cluster(shard_cache_gib=300, command=command)
    job = _rayjob(config)
    assert _errors(schemas, job) == []
    words = shlex.split(job["spec"]["entrypoint"])[3:]
    scale = pretrain.OPTIONS.parse(words[1:]).run.scale
    head, others = _groups(config)
    for pod in others:
        (volume,) = [v for v in pod["volumes"] if v["name"] == "shard-cache"]
        size_gib = int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi"))
        assert scale.shard_cache_gib < size_gib < 1.03 * scale.shard_cache_gib
        (container,) = pod["containers"]
        (mount,) = [m for m in container["volumeMounts"] if m["name"] == "shard-cache"]
        assert mount["mountPath"] == scale.shard_cache
        assert container["resources"]["requests"]["ephemeral-storage"] == f"{size_gib}Gi"
        assert "ephemeral-storage" not in container["resources"]["limits"]
    assert "shard-cache" not in json.dumps(head)


PRETRAIN = "pretrain --store s3://b/store --out s3://b/run"


@pytest.mark.parametrize(
    ("command", "gib"),
    [
        (PRETRAIN, 0),
        (f"{PRETRAIN} --scale.shard-cache None", 300),
        ("evaluate --out s3://b/run", 300),
        ("ingest --store s3://b/store", 300),
    ],
)
def test_a_command_without_a_disk_for_shards_has_pods_without(command: str, gib: int) -> None:
    job = render(_cluster(command=tuple(command.split()), shard_cache_gib=gib))["rayjob.yaml"]
    assert "/shard-cache" not in job
    assert "ephemeral-storage" not in job


@pytest.mark.parametrize("gib", [0, 9])
def test_commands_that_read_epochs_are_told_of_the_disk_and_others_that_there_is_none(
    gib: int,
) -> None:
    told = {}
    for name in COMMANDS:
        job = _rayjob(_cluster(command=(name,), shard_cache_gib=gib))
        words = shlex.split(job["spec"]["entrypoint"])
        if "--scale.shard-cache" in words:
            told[name] = words[words.index("--scale.shard-cache") + 1]
    folder = "/shard-cache" if gib else "None"
    assert told == dict.fromkeys(KEEPERS, folder) | dict.fromkeys(ONCE, "None")
    assert set(told) == {
        name
        for name in COMMANDS
        if "scale" in (getattr(module_of(name).OPTIONS, "sections", None) or ())
    }


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (finetune, "finetune"),
        (evaluate, "evaluate"),
        (finetune, "finetune --scale.shard-cache None"),
    ],
)
@pytest.mark.parametrize("gib", [0, 90])
def test_a_run_that_began_with_a_cache_is_gone_on_with_where_there_is_none(
    tmp_path: Path, stage: ModuleType, words: str, gib: int
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    began = RunConfig(scale={"shard_cache": "/shard-cache", "shard_cache_gib": 120})
    (out / "config.yaml").write_text(config_text(began))
    config = _cluster(
        command=(*words.split(), "--out", str(out)),
        shard_cache_gib=gib,
        shared_claim="runs",
        shared_mount=str(tmp_path),
    )
    manifest, *_ = write_manifests(config, tmp_path / "manifests")
    entrypoint = yaml.safe_load(manifest.read_text())["spec"]["entrypoint"]

    def own_config(args: Any) -> RunConfig:
        return RunFolder(args.out).config()

    scale = stage.OPTIONS.parse(shlex.split(entrypoint)[4:], own_config).run.scale
    mounted = {
        mount["mountPath"]
        for pod in _groups(config)[1]
        for container in pod["containers"]
        for mount in container["volumeMounts"]
    }
    assert (scale.shard_cache is not None) == (gib > 0 and words == "finetune")
    assert scale.shard_cache is None or scale.shard_cache in mounted


@pytest.mark.parametrize(
    "words", ["--scale.shard-cache /mnt/nvme", "--scale.shard_cache=/mnt/nvme"]
)
@pytest.mark.parametrize("gib", [0, 300])
def test_a_folder_for_shards_that_no_volume_mounts_is_refused(words: str, gib: int) -> None:
    command = ("pretrain", "--store", "s3://b/s", "--out", "s3://b/r", *words.split())
    said = r"--scale.shard.cache /mnt/nvme: .* set shard_cache_gib"
    with pytest.raises(ManifestError, match=said):
        render(_cluster(command=command, shard_cache_gib=gib))


def test_a_run_in_a_bucket_needs_no_claim() -> None:
    command = ("pretrain", "--store", "s3://b/store", "--out", "s3://b/run")
    pod = _rayjob(_cluster(command=command))["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert all("emptyDir" in volume for volume in pod["template"]["spec"]["volumes"])


def test_two_jobs_stand_beside_each_other() -> None:
    """One MLflow serves both, whichever manifests were applied last."""
    one, other = _documents(_cluster(name="one")), _documents(_cluster(name="other"))
    assert one[2:] == other[2:]
    (rule,) = one[-1]["spec"]["ingress"]
    (peer,) = rule["from"]
    assert peer["podSelector"] == {
        "matchExpressions": [{"key": "diccae.io/cluster", "operator": "Exists"}]
    }


def test_attempts_of_a_job_know_each_other_and_nobody_elses() -> None:
    """By a variable of the job: what is submitted to its cluster besides is another's."""
    jobs = [_rayjob(config) for config in (_cluster(), UNUSUAL)]
    given = [yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"][JOB] for job in jobs]
    assert given == ["diccae/diccae", "team-av/vgg-2"]
    assert lease.JOB == JOB
    for job in jobs:
        assert JOB not in str(job["spec"]["rayClusterSpec"])


def test_workers_of_ray_up_have_an_instance_profile() -> None:
    for given, name in (("", "ray-autoscaler-v1"), ("team-s3", "team-s3")):
        text = render(_cluster(worker_profile=given))["ray-cluster.yaml"]
        types = yaml.safe_load(text)["available_node_types"]
        for group in ("decode-cpu", "train-gpu"):
            assert types[group]["node_config"]["IamInstanceProfile"] == {"Name": name}


def test_the_autoscaler_logs_where_the_head_reads() -> None:
    """KubeRay gives its container the volume `ray-logs`, a new one if the manifest has none."""
    spec = _rayjob(_cluster())["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (container,) = spec["containers"]
    (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == "/tmp/ray"]
    assert mount["name"] == "ray-logs"
    assert "ray-logs" in [volume["name"] for volume in spec["volumes"]]


def test_head_takes_no_work_and_shared_memory_holds_the_object_store() -> None:
    cluster = _rayjob(_cluster())["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        (shm,) = [v for v in group["template"]["spec"]["volumes"] if v["name"] == "shm"]
        assert shm["emptyDir"]["medium"] == "Memory"
        size = int(shm["emptyDir"]["sizeLimit"].removesuffix("Mi")) * 2**20
        assert size >= int(group["rayStartParams"]["object-store-memory"])
    roles = [group["labels"] for group in cluster["workerGroupSpecs"]]
    assert roles == [{"diccae.io/role": "decode"}, {"diccae.io/role": "train"}]
    gpu = cluster["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["resources"]
    assert gpu["limits"]["nvidia.com/gpu"] == "8"


def _walk(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _walk(inner, f"{path}[{index}]")


def test_nothing_listens_for_the_world_and_the_token_is_required() -> None:
    documents = _documents(_cluster())
    for document in documents:
        assert document["kind"] not in {"Ingress", "Gateway", "HTTPRoute"}
        for path, value in _walk(document):
            assert value not in ("LoadBalancer", "NodePort"), path
            assert not path.endswith((".enableIngress", ".hostPort", ".nodePort", ".externalIPs"))
            assert not (path.endswith((".hostNetwork", ".privileged")) and value), path
    cluster = documents[0]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "diccae-ray-token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"


def _pods(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every pod that comes of a document, the head with the container that KubeRay adds."""
    spec = document["spec"]
    if document["kind"] == "Deployment":
        yield spec["template"]["spec"]
    if document["kind"] == "RayJob":
        cluster = spec["rayClusterSpec"]
        yield spec["submitterPodTemplate"]["spec"]
        yield from (group["template"]["spec"] for group in cluster["workerGroupSpecs"])
        head = copy.deepcopy(cluster["headGroupSpec"]["template"]["spec"])
        # KubeRay gives it a securityContext only from here.
        head["containers"].append({"name": "autoscaler", **cluster["autoscalerOptions"]})
        yield head


def _unrestricted(pod: dict[str, Any]) -> Iterator[str]:
    """What the pod security profile `restricted` forbids in a pod, for the fields used here."""
    of_pod = pod.get("securityContext", {})
    if {"hostNetwork", "hostPID", "hostIPC"} & set(pod):
        yield "a namespace of the host"
    for volume in pod.get("volumes", []):
        if not {"emptyDir", "persistentVolumeClaim", "secret", "configMap"} & set(volume):
            yield f"volume {volume['name']}"
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        own = container.get("securityContext", {})
        both = of_pod | own
        allowed = {
            "escalation": own.get("allowPrivilegeEscalation") is False,
            "privileged": not own.get("privileged"),
            "capabilities": own.get("capabilities") == {"drop": ["ALL"]},
            "root": both.get("runAsNonRoot") is True and both.get("runAsUser") != 0,
            "seccomp": both.get("seccompProfile", {}).get("type") == "RuntimeDefault",
        }
        yield from (f"{container['name']}: {what}" for what, is_so in allowed.items() if not is_so)


def test_every_container_satisfies_the_restricted_profile() -> None:
    """In a namespace that enforces it a pod with another container is refused."""
    pods = [pod for document in _documents(_cluster()) for pod in _pods(document)]
    names = [container["name"] for pod in pods for container in pod["containers"]]
    assert sorted(names) == [
        "autoscaler", "mlflow", "ray-head", "ray-worker", "ray-worker", "submit",
    ]  # fmt: skip
    assert [fault for pod in pods for fault in _unrestricted(pod)] == []


def test_the_check_of_the_profile_finds_planted_faults() -> None:
    job = _rayjob(_cluster())
    cluster = job["spec"]["rayClusterSpec"]
    cluster["autoscalerOptions"]["securityContext"] = {"privileged": True}
    cluster["workerGroupSpecs"][0]["template"]["spec"]["securityContext"] = {"runAsUser": 0}
    volume = {"name": "host", "hostPath": {"path": "/"}}
    cluster["workerGroupSpecs"][1]["template"]["spec"]["volumes"].append(volume)
    assert [fault for pod in _pods(job) for fault in _unrestricted(pod)] == [
        "ray-worker: root", "ray-worker: seccomp", "volume host", "autoscaler: escalation",
        "autoscaler: privileged", "autoscaler: capabilities",
    ]  # fmt: skip


def test_every_ray_pod_is_behind_the_network_policy() -> None:
    job, policy = _documents(_cluster())[:2]
    spec = job["spec"]
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    templates = [spec["submitterPodTemplate"], *[group["template"] for group in groups]]
    (selected,) = policy["spec"]["podSelector"]["matchLabels"].items()
    assert all(selected in template["metadata"]["labels"].items() for template in templates)
    for rule in policy["spec"]["ingress"]:
        assert rule["from"]
        assert all("ipBlock" not in peer for peer in rule["from"])


@pytest.mark.parametrize("installed", OPERATORS)
def test_the_operator_is_let_in_however_it_was_installed(installed: str) -> None:
    """Without its answer a job that succeeded is marked failed, and done again."""
    assert _operator_labels(_cluster()).items() <= OPERATORS[installed].items()


def test_an_operator_of_other_labels_can_be_named_and_not_every_pod() -> None:
    own = {"team.example/app": "ray: operator", "tier": "1"}
    assert _operator_labels(_cluster(operator_labels=own)) == own
    with pytest.raises(ValidationError, match="operator_labels"):
        _cluster(operator_labels={})


def _operator_labels(config: ClusterConfig) -> dict[str, str]:
    policy = _documents(config)[1]
    (peer,) = [rule["from"][0] for rule in policy["spec"]["ingress"] if "ports" in rule]
    return peer["podSelector"]["matchLabels"]


def test_no_secret_is_written_and_none_can_be() -> None:
    for text in render(_cluster()).values():
        assert not re.search(r"kind: Secret|stringData|BEGIN [A-Z ]*PRIVATE", text)
        assert not re.search(
            r"(?i)(password|secret_access_key|auth_token)\s*[:=]\s*[\"']?\w{8,}", text
        )
    with pytest.raises(ValidationError, match="diccae-storage"):
        _cluster(env={"AWS_SECRET_ACCESS_KEY": "hunter2hunter2"})
    for name in ("x\n  privileged: true", "A", "a" * 60):
        with pytest.raises(ValidationError):
            _cluster(name=name)


def test_ray_up_file_satisfies_rays_own_schema_and_stays_on_loopback() -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    cluster = yaml.safe_load(render(_cluster())["ray-cluster.yaml"])
    jsonschema.validate(cluster, schema)
    validate_config(prepare_config(copy.deepcopy(cluster)))  # what `ray up` does before it starts
    assert set(cluster["available_node_types"]) == {"head", "decode-cpu", "train-gpu"}
    (start,) = [line for line in cluster["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert all(
        "RAY_AUTH_MODE=token" in line
        for line in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
        if "ray start" in line
    )
    cluster["available_node_types"]["head"]["resourses"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster, schema)


def test_compose_publishes_only_on_loopback_and_takes_its_secrets_from_outside() -> None:
    compose = yaml.safe_load((ROOT / "deploy/mlflow/compose.yaml").read_text())
    services = compose["services"]
    assert {"postgres", "s3", "mlflow"} <= set(services)
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET", key):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), key
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    assert f"AS {services['mlflow']['build']['target']}\n" in dockerfile


def test_the_database_uri_names_the_driver_that_the_image_has() -> None:
    """What `postgresql://` alone means changed with SQLAlchemy 2.1, and MLflow did not start."""
    (driver,) = re.findall(r" (psycopg\w*)-binary==", (ROOT / "deploy/Dockerfile").read_text())
    for file in ("compose.yaml", "kubernetes.yaml"):
        text = (ROOT / "deploy/mlflow" / file).read_text()
        assert re.findall(r"\w+\+?\w*(?=://(?:mlflow|USER):)", text) == [f"postgresql+{driver}"]


def test_image_is_built_of_what_is_here_pinned_and_not_run_as_root() -> None:
    lines = (ROOT / "deploy/Dockerfile").read_text().replace("\\\n", " ").splitlines()
    stages: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("FROM "):
            stages[line.split(" AS ")[1]] = []
        elif stages:
            stages[list(stages)[-1]].append(line)
    assert list(stages) == ["build", "cpu", "gpu", "mlflow"]
    assert "USER 1000" in stages["cpu"]
    assert "USER 1000" in stages["mlflow"]
    allowed = (ROOT / "deploy/Dockerfile.dockerignore").read_text()
    for line in (line for stage in stages.values() for line in stage):
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line
                assert f"!{source}\n" in allowed, line
        if "pip install" in line:
            assert "constraints.txt" in line
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name.rstrip("*") for name in packages["packages"]["find"]["include"]}
    assert {line.split()[1] for line in stages["build"] if len(line.split()) == 3} >= folders


def test_the_images_ray_is_the_one_installed_here() -> None:
    assert ClusterConfig().ray_version == importlib.metadata.version("ray")


def test_command_line_writes_the_manifests_or_names_the_wrong_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("namespace: team-av\ntrain: {gpus: 4, max_nodes: 2}\n")
    command = ["--", "ingest", "--store", "s3://b/s", "--plan"]
    args = ["render", "--config", str(config), "--out", str(tmp_path / "out"), *command]
    assert main(args) == 0
    job = yaml.safe_load((tmp_path / "out" / "rayjob.yaml").read_text())
    assert job["spec"]["entrypoint"] == "python -m diccae ingest --store s3://b/s --plan"
    assert job["metadata"]["namespace"] == "team-av"
    args[4] = str(tmp_path / "other")
    for text, said in (
        ("namspace: x\n", "unknown key namspace: did you mean namespace?"),
        ("train: {gpuz: 4}\n", "unknown key train.gpuz: did you mean gpus?"),
        (
            "train: {tolerations: [{key: a, effect: nosched}]}\n",
            "train.tolerations.0.effect: Input should be 'NoSchedule'",
        ),
        (
            "train: {tolerations: [{key: a, value: b}]}\n",
            "unknown key train.tolerations.0.value: known keys: effect, key",
        ),
        ("- train\n", "found a list, expected keys and values"),
        ("# caf\xe9\n", "'utf-8' codec can't decode byte 0xe9 in position 5"),
    ):
        config.write_bytes(text.encode("latin-1"))
        capsys.readouterr()
        assert main(args) == 2
        printed = capsys.readouterr().err
        assert f"cluster.yaml: {said}" in printed
        assert printed.count("\n") == 1
    assert not (tmp_path / "other").exists()


def test_rendering_nothing_says_what_to_add_and_a_name_of_the_line_goes_before_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "cluster.yaml", str(tmp_path / "out")
    config.write_text("name: team\n")
    args = ["render", "--config", str(config), "--out", out]
    assert main(args) == 2
    assert "end the line with: -- pretrain --store" in capsys.readouterr().err
    with pytest.raises(ManifestError, match=r"command: empty"):
        render(ClusterConfig())
    assert main([*args, "--name", "vgg-finetune", "--", "finetune", "--out", "s3://b/run"]) == 0
    job = yaml.safe_load((tmp_path / "out" / "rayjob.yaml").read_text())
    assert job["metadata"]["name"] == "vgg-finetune"
    assert main([*args, "--name", "Vgg", "--", "finetune", "--out", "s3://b/run"]) == 2
    assert "name: " in capsys.readouterr().err


def test_what_a_cluster_file_does_not_name_keeps_its_default(tmp_path: Path) -> None:
    """Naming one key of a group took its taints, its memory and its machine type away."""
    file, default = tmp_path / "cluster.yaml", ClusterConfig()
    file.write_text(
        "train: {max_nodes: 2}\ndecode: {cpus: 4}\n"
        "env: {AWS_ENDPOINT_URL: https://s3.example, MLFLOW_DISABLE_TELEMETRY: null}\n"
    )
    config = read_config(str(file), COMMAND)
    assert config.train == default.train.model_copy(update={"max_nodes": 2})
    assert config.decode == default.decode.model_copy(update={"cpus": 4})
    kept = {k: v for k, v in default.env.items() if k != "MLFLOW_DISABLE_TELEMETRY"}
    assert config.env == kept | {"AWS_ENDPOINT_URL": "https://s3.example"}
    pod = _rayjob(config)["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]["template"]["spec"]
    assert [taint["key"] for taint in pod["tolerations"]] == ["nvidia.com/gpu"]


def test_rendering_twice_writes_the_same_files(tmp_path: Path) -> None:
    first = {path.name: path.read_text() for path in write_manifests(UNUSUAL, tmp_path)}
    second = {path.name: path.read_text() for path in write_manifests(UNUSUAL, tmp_path)}
    assert first == second == render(UNUSUAL)


def test_a_cluster_whose_only_workers_train_has_no_place_for_the_clustering_pool() -> None:
    with pytest.raises(ValidationError, match=r"decode.max_nodes = 0: the clustering pool"):
        _cluster(decode=GroupConfig(max_nodes=0))
