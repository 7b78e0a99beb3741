"""The pods that KubeRay makes of a RayCluster and a RayJob: what it adds to their templates.

Knows nothing of processes. As of KubeRay 1.6 (ray-operator/controllers/ray/common), as far as a
pod can tell. The autoscaler's container is the head's second one; only an `AutoscaledCluster`
starts it: elsewhere nothing would give it more pods.
"""

import copy
import json
from typing import Any

import yaml
from support.box.pod import quantity

Manifest = dict[str, Any]

GCS_PORT, DASHBOARD_PORT, AGENT_PORT = 6379, 8265, 52365
OPERATORS: dict[str, dict[str, str]] = {
    "helm": {
        "app.kubernetes.io/name": "kuberay-operator",
        "app.kubernetes.io/instance": "kuberay-operator",
        "app.kubernetes.io/component": "kuberay-operator",
    },
    "kustomize": {
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/component": "kuberay-operator",
    },
}
"""Labels of the operator's pod, by how it was installed (helm-chart/kuberay-operator and
ray-operator/config/manager there)."""
_WGET = "wget --tries 1 -T 2 -q -O- http://localhost:{}/api/{} | grep success"
READY_HEAD = " && ".join(
    [_WGET.format(AGENT_PORT, "local_raylet_healthz"), _WGET.format(DASHBOARD_PORT, "gcs_healthz")]
)
READY_WORKER = _WGET.format(AGENT_PORT, "local_raylet_healthz")
_BASH = ["/bin/bash", "-c", "--"]


def head_service(cluster: str) -> str:
    """Name of the service in front of a cluster's head."""
    return f"{cluster}-head-svc"


def head_pod(spec: Manifest, cluster: str, namespace: str) -> Manifest:
    """The head's pod of a RayCluster's `spec`."""
    group = spec["headGroupSpec"]
    given = {"dashboard-host": "0.0.0.0", "no-monitor": "true", **group["rayStartParams"]}
    if not spec.get("enableInTreeAutoscaling"):
        del given["no-monitor"]
    pod = _ray_pod(spec, group, given, cluster, f"{cluster}-head", namespace)
    pod["metadata"]["labels"] |= {"ray.io/node-type": "head", "ray.io/group": "headgroup"}
    if spec.get("enableInTreeAutoscaling"):
        _add_autoscaler(pod, spec, cluster)
    return pod


def _add_autoscaler(pod: Manifest, spec: Manifest, cluster: str) -> None:
    (ray,), options = pod["spec"]["containers"], spec.get("autoscalerOptions", {})
    own = [m for m in ray["volumeMounts"] if m["name"] == "ray-logs"]
    where = {"RAY_CLUSTER_NAMESPACE": pod["metadata"]["namespace"], "KUBERAY_CRD_VER": "v1"}
    names = {"RAY_CLUSTER_NAME": cluster, "RAY_HEAD_POD_NAME": pod["metadata"]["name"]}
    if options.get("version") == "v2":
        ray["env"].append({"name": "RAY_enable_autoscaler_v2", "value": "1"})
    script = f"ray kuberay-autoscaler --cluster-name {cluster}"
    pod["spec"]["containers"].append(
        {
            "name": "autoscaler",
            "image": options.get("image", ray["image"]),
            "command": _BASH,
            "args": [f"{script} --cluster-namespace {pod['metadata']['namespace']}"],
            "env": [
                *({"name": name, "value": value} for name, value in (where | names).items()),
                *_token(spec),
                *options.get("env", []),
            ],
            "envFrom": options.get("envFrom", []),
            "resources": options.get("resources", {"limits": {"cpu": "500m", "memory": "512Mi"}}),
            "securityContext": options.get("securityContext", {}),
            "volumeMounts": [*own, *options.get("volumeMounts", [])],
        }
    )


def worker_pod(
    spec: Manifest, group: Manifest, cluster: str, name: str, namespace: str
) -> Manifest:
    """A pod of a worker group; it waits for the head first."""
    head = f"{head_service(cluster)}.{namespace}.svc.cluster.local"
    given = {"address": f"{head}:{GCS_PORT}", **group["rayStartParams"]}
    if labels := group.get("labels"):
        given["labels"] = ",".join(f"{key}={value}" for key, value in labels.items())
    pod = _ray_pod(spec, group, given, cluster, name, namespace, head)
    pod["metadata"]["labels"] |= {
        "ray.io/node-type": "worker",
        "ray.io/group": group["groupName"],
    }
    wait = copy.deepcopy(pod["spec"]["containers"][0])
    wait |= {"name": "wait-gcs-ready", "command": _BASH}
    check = f"ray health-check --address {head}:{GCS_PORT}"
    wait["args"] = [f"until {check}; do sleep 1; done"]
    wait["resources"] = {"limits": {"cpu": "200m", "memory": "256Mi"}}
    pod["spec"]["initContainers"] = [wait]
    return pod


def submitter_pod(job: Manifest, cluster: str, name: str, submission: str) -> Manifest:
    """The pod that hands the entrypoint to the cluster's job server and follows its log."""
    spec, namespace = job["spec"], job["metadata"]["namespace"]
    url = f"http://{head_service(cluster)}.{namespace}.svc.cluster.local:{DASHBOARD_PORT}"
    environment = json.dumps(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")))
    at = f"--address {url}"
    script = (
        f"if ! ray job status {at} {submission} >/dev/null 2>&1; then"
        f" ray job submit {at} --no-wait --runtime-env-json {json.dumps(environment)}"
        f" --submission-id {submission} -- {spec['entrypoint'].strip()}; fi;"
        f" ray job logs {at} --follow {submission}"
    )
    pod = pod_of(spec["submitterPodTemplate"], name, namespace)
    container = pod["spec"]["containers"][0]
    container |= {"command": ["/bin/bash", "-e", "-c", "--"], "args": [script]}
    container.setdefault("env", [])
    container["env"] += [
        {"name": "RAY_DASHBOARD_ADDRESS", "value": url},
        {"name": "RAY_JOB_SUBMISSION_ID", "value": submission},
        *_token(spec["rayClusterSpec"]),
    ]
    return pod


def pod_of(template: Manifest, name: str, namespace: str) -> Manifest:
    pod = copy.deepcopy(template)
    pod.setdefault("metadata", {})
    pod["metadata"] |= {"name": name, "namespace": namespace}
    pod["metadata"].setdefault("labels", {})
    pod["spec"].setdefault("volumes", [])
    return pod


def _ray_pod(
    spec: Manifest,
    group: Manifest,
    params: Manifest,
    cluster: str,
    name: str,
    namespace: str,
    head: str = "",
) -> Manifest:
    pod = pod_of(group["template"], name, namespace)
    pod["metadata"]["labels"] |= {"ray.io/is-ray-node": "yes", "ray.io/cluster": cluster}
    container = pod["spec"]["containers"][0]
    limits = container["resources"]["limits"]
    started = {
        "num-cpus": str(int(quantity(limits["cpu"]))),
        "memory": str(int(quantity(limits["memory"]))),
        "metrics-export-port": "8080",
        "dashboard-agent-listen-port": str(AGENT_PORT),
        "block": "true",
        **(
            {"num-gpus": limits["nvidia.com/gpu"]}
            if quantity(limits.get("nvidia.com/gpu", 0))
            else {}
        ),
        **params,
    }
    flags = " ".join(
        f"--{key}" if value == "true" else f"--{key}={value}"
        for key, value in sorted(started.items())
        if value != "false"
    )
    start = f"ray start {'' if head else '--head '}{flags}"
    container |= {"command": _BASH, "args": [f"ulimit -n 65536; {start}"]}
    _mount_shared_memory(pod, limits["memory"])
    container["env"] = [
        *container.get("env", []),
        *([{"name": "FQ_RAY_IP", "value": head}] if head else []),
        {"name": "RAY_ADDRESS", "value": f"{head or '127.0.0.1'}:{GCS_PORT}"},
        {"name": "RAY_PORT", "value": str(GCS_PORT)},
        {"name": "RAY_CLUSTER_NAME", "value": cluster},
        {"name": "RAY_CLOUD_INSTANCE_ID", "value": name},
        {"name": "RAY_NODE_TYPE_NAME", "value": group.get("groupName", "headgroup")},
        {"name": "RAY_USAGE_STATS_KUBERAY_IN_USE", "value": "1"},
        {"name": "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "value": "1"},
        *_token(spec),
    ]
    return pod


def _mount_shared_memory(pod: Manifest, limit: str) -> None:
    """/dev/shm, unless the manifest mounts one."""
    mounts = pod["spec"]["containers"][0].setdefault("volumeMounts", [])
    if all(mount["mountPath"] != "/dev/shm" for mount in mounts):
        mounts.append({"name": "shared-mem", "mountPath": "/dev/shm"})
        directory = {"medium": "Memory", "sizeLimit": limit}
        pod["spec"]["volumes"].append({"name": "shared-mem", "emptyDir": directory})


def _token(spec: Manifest) -> list[Manifest]:
    options = spec.get("authOptions", {})
    if options.get("mode") != "token":
        return []
    key = {"name": options["secretName"], "key": "auth_token"}
    return [
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": key}},
    ]
