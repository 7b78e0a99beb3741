"""AutoscaledCluster: a RayCluster that Ray's own autoscaler makes larger and smaller.

Knows nothing of jobs. As KubeRay does it: the autoscaler runs beside the head, asks the API server
what there is and writes there what it wants; the operator then starts and removes pods.
"""

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

from support.box import apiserver
from support.box.box import Box
from support.box.job import Images, RayCluster
from support.box.pod import Manifest, Pod

_HERE = Path(__file__).parent
_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


class AutoscaledCluster(RayCluster):
    """Starts with the head and the groups' `minReplicas`."""

    def __init__(self, box: Box, spec: Manifest, name: str, namespace: str, images: Images) -> None:
        self._folder = box.node.folder / f"api-{name}"
        self._folder.mkdir()
        self._pods: list[Any] = []
        self.sizes: list[tuple[float, dict[str, int]]] = []
        """When (s) the operator changed the number of pods, and how many of each group it was."""
        self._began = time.monotonic()
        super().__init__(box, spec, name, namespace, images)
        self._write("raycluster.json", _object(spec, name, namespace))
        self._tell_pods()
        self._serve()
        (autoscaler,) = [c for c in self.head.spec["containers"] if c["name"] == "autoscaler"]
        account = self._folder / "account"
        image = images[autoscaler["image"]]._replace(files={str(account): _ACCOUNT})
        self.autoscaler = self.head.start(autoscaler, image)

    def _serve(self) -> None:
        machine = self.box.add_machine(f"api-{self.name}", "default")
        account = self._folder / "account"
        account.mkdir()
        subject = f"-subj /CN=kubernetes -addext subjectAltName=IP:{machine.address}"
        self.box.node.sh(
            f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 {subject}"
            f" -keyout {self._folder}/key.pem -out {self._folder}/ca.crt 2>/dev/null"
        )
        (self._folder / "token").write_text("of-the-autoscaler")
        for file in ("ca.crt", "token"):
            (account / file).write_bytes((self._folder / file).read_bytes())
        self.box.serve(machine, [sys.executable, _HERE / "apiserver.py", self._folder], "ready")
        for container in self.head.spec["containers"]:
            container["env"] += [
                {"name": "KUBERNETES_SERVICE_HOST", "value": machine.address},
                {"name": "KUBERNETES_SERVICE_PORT_HTTPS", "value": str(apiserver.PORT)},
            ]

    def reconcile(self) -> None:
        """As many pods of each group as the RayCluster says, without those it wants deleted."""
        super().reconcile()
        before = self._counts()
        for group in self._read("raycluster.json")["spec"]["workerGroupSpecs"]:
            unwanted = group["scaleStrategy"].get("workersToDelete", [])
            for pod in self.of_group(group["groupName"]):
                if pod.name in unwanted:
                    self.remove_worker(pod)
            for _ in range(group["replicas"] - len(self.of_group(group["groupName"]))):
                self.add_worker(group)
        if self._counts() != before:
            self.sizes.append((time.monotonic() - self._began, self._counts()))
        self._tell_pods()

    def _counts(self) -> dict[str, int]:
        names = [group["groupName"] for group in self.spec["workerGroupSpecs"]]
        return {name: len(self.of_group(name)) for name in names}

    def _tell_pods(self) -> None:
        pods = [_pod(pod) for pod in [self.head, *self.workers]]
        if pods != self._pods:
            self._pods = pods
            self._write("pods.json", {"items": pods})

    def _read(self, name: str) -> Any:
        return json.loads((self._folder / name).read_text())

    def _write(self, name: str, content: Manifest) -> None:
        scratch = self._folder / f"{name}.tmp"
        scratch.write_text(json.dumps(content))
        scratch.replace(self._folder / name)

    def state(self) -> str:
        """See RayCluster; and what the autoscaler says."""
        return f"{super().state()}\nautoscaler: {self.autoscaler.tail(5)}"


def _object(spec: Manifest, name: str, namespace: str) -> Manifest:
    """The RayCluster as it is stored: with what the CRD and the operator's types fill in."""
    spec = copy.deepcopy(spec)
    for group in spec["workerGroupSpecs"]:
        group |= {"replicas": group["minReplicas"], "numOfHosts": 1, "scaleStrategy": {}}
    return {"metadata": {"name": name, "namespace": namespace}, "spec": spec}


def _pod(pod: Pod) -> Manifest:
    container = pod.containers.get("ray-worker") or pod.containers.get("ray-head")
    is_running = container is not None and container.exit_code is None
    state = {"running": {}} if is_running else {"waiting": {}}
    return {
        "metadata": {"name": pod.name, "labels": pod.labels, "resourceVersion": "1"},
        "status": {"podIP": pod.machine.address, "containerStatuses": [{"state": state}]},
    }
