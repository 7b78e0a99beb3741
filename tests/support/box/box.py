"""Box: rendered manifests, applied to a Node: names, network policies, pods, object storage.

Knows nothing of Ray. Invariant: a pod reaches what the policies let it reach, by names that the
cluster's name server knows, and nothing else.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from support.box import policy
from support.box.errors import BoxError
from support.box.node import Machine, Node
from support.box.pod import PYTHON, ROOT, Image, Manifest, Pod, Secrets

S3_PORT = 9000
S3_URL = f"http://s3.storage.test:{S3_PORT}"
KEYS = {
    "AWS_ACCESS_KEY_ID": "of-the-box",
    "AWS_SECRET_ACCESS_KEY": "of-the-box",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": S3_URL,
}
"""What a storage secret holds, for the object storage of the box."""
_HERE = Path(__file__).parent


def until(what: Callable[[], str], met: Callable[[], bool], timeout_s: float) -> None:
    """Poll. Raises: BoxError that says `what` is the matter if it is not met in time."""
    deadline = time.monotonic() + timeout_s
    while not met():
        if time.monotonic() > deadline:
            raise BoxError(f"{what()} (after {timeout_s:.0f} s)")
        time.sleep(0.1)


class Box:
    """A namespace of a Kubernetes cluster, as far as one job can tell."""

    def __init__(self, manifests: Mapping[str, str], secrets: Secrets) -> None:
        """Args: manifests: text by file name, as rendered; those that are not Kubernetes' are
        passed over. secrets: by name, what `kubectl create secret` was given."""
        self.objects = Box.parse(manifests)
        self.secrets = secrets
        self.pods: dict[str, Pod] = {}
        self.node = Node()
        self._names: dict[str, str] = {}
        self._outside: list[policy.Peer] = []
        self._start_names()

    @staticmethod
    def parse(manifests: Mapping[str, str]) -> list[Manifest]:
        """The objects in rendered files."""
        return [
            document
            for name, text in manifests.items()
            if name != "ray-cluster.yaml"
            for document in yaml.safe_load_all(text)
        ]

    def __enter__(self) -> "Box":
        return self

    def __exit__(self, *_: object) -> None:
        self.node.close()

    def of_kind(self, kind: str) -> list[Manifest]:
        """Objects that were applied."""
        return [document for document in self.objects if document["kind"] == kind]

    def _start_names(self) -> None:
        self._names_file = self.node.folder / "names.json"
        self._write_names()
        self.dns = self.add_machine("kube-dns", "kube-system", {"k8s-app": "kube-dns"})
        self.serve(self.dns, [sys.executable, "-S", "-E", _HERE / "dns.py", self._names_file])
        resolver = self.node.folder / "resolv.conf"
        resolver.write_text(f"nameserver {self.dns.address}\n")
        self.node.sh(f"mount --bind {resolver} /etc/resolv.conf")

    def add_machine(
        self, name: str, namespace: str = "", labels: Mapping[str, str] | None = None
    ) -> Machine:
        """A machine that is no pod of ours: a service of the cluster, or one outside it."""
        machine = self.node.add_machine(name)
        self._outside.append(policy.Peer(namespace, dict(labels or {}), machine.address))
        self._enforce()
        return machine

    def serve(
        self, machine: Machine, command: Sequence[str | Path], ready: str = "", **env: str
    ) -> "subprocess.Popen[bytes]":
        """Start a server there and wait for the line in which it says it is ready."""
        log = self.node.folder / f"{machine.name}.log"
        everything = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", **env}
        with log.open("ab") as file:
            process = self.node.start([*map(str, command)], machine.name, file, everything)

        def said() -> bool:
            if process.poll() is not None:
                raise BoxError(f"{machine.name} ended: {log.read_text()[-2000:]}")
            return ready in log.read_text()

        until(lambda: f"{machine.name} never said {ready!r}: {log.read_text()[-2000:]}", said, 60)
        return process

    def add_storage(self, *buckets: str) -> Machine:
        """Object storage outside the cluster, at S3_URL."""
        self.storage = machine = self.add_machine("s3")
        self.name(S3_URL.split("/")[2].split(":")[0], machine.address)
        command = [sys.executable, _HERE / "bucket.py", str(S3_PORT), *buckets]
        # moto would take the first word of the server's name for a bucket.
        self.serve(machine, command, "ready", S3_IGNORE_SUBDOMAIN_BUCKETNAME="true")
        return machine

    def ask_storage(self, question: str) -> str:
        """Whatever `bucket.py` answers: `names?BUCKET`, `faults?0.05`, `hold?WORD`."""
        url = f"http://127.0.0.1:{S3_PORT}/box/{question}"
        return self.outside(["wget", "-q", "-O-", url], self.storage, 60).stdout

    def name(self, name: str, address: str | None) -> None:
        """Let the name server know a name; None: forget it."""
        if address is None:
            self._names.pop(name, None)
        else:
            self._names[name] = address
        self._write_names()

    def _write_names(self) -> None:
        scratch = self._names_file.with_suffix(".tmp")
        scratch.write_text(json.dumps(self._names))
        scratch.replace(self._names_file)

    def name_service(self, name: str, namespace: str, address: str | None) -> None:
        """A service of the cluster, at the address of the pod behind it."""
        self.name(f"{name}.{namespace}.svc.cluster.local", address)

    def add_pod(self, manifest: Manifest) -> Pod:
        """Give a pod its place on the network; its containers are started by `Pod.start`."""
        machine = self.node.add_machine(manifest["metadata"]["name"])
        pod = Pod(self.node, manifest, machine, self.secrets, self.dns.address)
        self.pods[pod.name] = pod
        self._enforce()
        return pod

    def remove_pod(self, pod: Pod) -> None:
        """Kill a pod and forget it."""
        del self.pods[pod.name]
        pod.delete()
        self._enforce()

    def _enforce(self) -> None:
        """Write the policies' rules anew: who a policy means changes with every pod."""
        peers = [policy.Peer(p.namespace, p.labels, p.machine.address) for p in self.pods.values()]
        policies = self.of_kind("NetworkPolicy")
        for pod, peer in zip(self.pods.values(), peers, strict=True):
            text = policy.rules(peer, policies, [*peers, *self._outside])
            self.node.sh("nft -f -", pod.machine.name, stdin=text)

    def outside(
        self, command: Sequence[str], machine: Machine, timeout_s: float, **env: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command with this machine's files at that place of the network."""
        everything = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", **env}
        prefix = self.node.prefix(machine.name)
        return subprocess.run(
            [*prefix, *command], capture_output=True, text=True, timeout=timeout_s, env=everything
        )


def images(config: Any) -> dict[str, Image]:
    """What stands for the images of a ClusterConfig."""
    debians = "/usr/lib/python3/dist-packages/psycopg2"
    env = {**PYTHON.env, "PYTHONPATH": f"{PYTHON.env['PYTHONPATH']}:/opt/postgres"}
    server = Image(env, ("mlflow", "server"), {debians: "/opt/postgres/psycopg2"})
    return {config.cpu_image: PYTHON, config.gpu_image: PYTHON, config.mlflow_image: server}
