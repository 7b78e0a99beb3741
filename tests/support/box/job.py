"""RayJob in a Box: clusters, the submitter, and new clusters after a failure, as KubeRay does it.

Knows nothing of what the job does. Invariant: a worker pod that ended is replaced; a head that
ended costs the attempt.
"""

import copy
import itertools
import json
import time
from collections.abc import Callable
from typing import NamedTuple

from support.box import kuberay
from support.box.box import Box, until
from support.box.errors import BoxError
from support.box.pod import Container, Image, Manifest, Pod

Images = dict[str, Image]


class RayCluster:
    """The pods of one RayCluster, started and kept at the number the manifest asks for."""

    def __init__(self, box: Box, spec: Manifest, name: str, namespace: str, images: Images) -> None:
        self.box, self.spec, self.name, self.namespace = box, spec, name, namespace
        self._images = images
        self._numbers = itertools.count()
        self._ready: set[str] = set()
        self._was_complete = False
        self._groups: dict[str, Manifest] = {}
        """Worker pods: the group of each."""
        self.replaced: list[str] = []
        self.head = self._start(kuberay.head_pod(spec, name, namespace))
        box.name_service(kuberay.head_service(name), namespace, self.head.machine.address)
        for group in spec["workerGroupSpecs"]:
            for _ in range(group["minReplicas"]):
                self.add_worker(group)

    def _start(self, manifest: Manifest) -> Pod:
        pod = self.box.add_pod(manifest)
        containers = [*pod.spec.get("initContainers", []), *pod.spec["containers"]]
        pod.start(containers[0], self._images[containers[0]["image"]])
        return pod

    def add_worker(self, group: Manifest) -> Pod:
        """One more pod of a group."""
        name = f"{self.name}-{group['groupName']}-{next(self._numbers)}"
        manifest = kuberay.worker_pod(self.spec, group, self.name, name, self.namespace)
        pod = self._start(manifest)
        self._groups[name] = group
        return pod

    def remove_worker(self, pod: Pod) -> None:
        """One less."""
        self._ready.discard(pod.name)
        del self._groups[pod.name]
        self.box.remove_pod(pod)

    @property
    def workers(self) -> list[Pod]:
        """Those there are now."""
        return [self.box.pods[name] for name in self._groups]

    def of_group(self, name: str) -> list[Pod]:
        """The pods of one group."""
        return [pod for pod in self.workers if self._groups[pod.name]["groupName"] == name]

    def reconcile(self) -> None:
        """Replace the workers that have ended since they were ready; once all were, any: then it
        is no mistake of the manifest, Ray gives up a start that takes half a minute."""
        for pod in self.workers:
            if self._go_on(pod) and (self._was_complete or pod.name in self._ready):
                self.replaced.append(pod.name)
                group = self._groups[pod.name]
                self.remove_worker(pod)
                self.add_worker(group)

    def _go_on(self, pod: Pod) -> bool:
        """Start what has waited for an init container. Returns whether the pod has ended."""
        waited, ray = pod.containers["wait-gcs-ready"], pod.containers.get("ray-worker")
        if ray is None and waited.exit_code == 0:
            (container,) = pod.spec["containers"]
            pod.start(container, self._images[container["image"]])
            return False
        return (ray or waited).exit_code is not None

    def is_ready(self) -> bool:
        """Whether every pod has passed its readiness probe. Raises: BoxError if one ended."""
        self.reconcile()
        for pod in [self.head, *self.workers]:
            self.is_pod_ready(pod)
        self._was_complete = len(self._ready) == 1 + len(self._groups)
        return self._was_complete

    def is_pod_ready(self, pod: Pod) -> bool:
        """Ask one pod's readiness probe, unless it has passed. Raises: BoxError if it ended."""
        if pod.name in self._ready:
            return True
        if pod is not self.head:
            self._go_on(pod)
        container = _rays(pod)
        if container.name == "wait-gcs-ready":
            return False
        if container.exit_code is not None:
            raise BoxError(f"pod {pod.name} ended at its start: {container.tail()}")
        probe = kuberay.READY_HEAD if pod is self.head else kuberay.READY_WORKER
        if pod.probe(container, probe, 10):
            self._ready.add(pod.name)
        return pod.name in self._ready

    def state(self) -> str:
        """What each pod waits for, with the end of its log."""
        return "\n".join(self.state_of(pod) for pod in [self.head, *self.workers])

    def state_of(self, pod: Pod) -> str:
        """The same of one pod."""
        last = _rays(pod)
        state = "ready" if pod.name in self._ready else f"in {last.name}: {last.tail(3)}"
        return f"pod {pod.name}: {state}"

    def delete(self) -> None:
        """Kill all pods; the service's name goes with them."""
        self.box.name_service(kuberay.head_service(self.name), self.namespace, None)
        for pod in [self.head, *self.workers]:
            self.box.remove_pod(pod)


def _rays(pod: Pod) -> Container:
    """The container that Ray runs in, or the one it waits for."""
    name = next(n for n in ("ray-head", "ray-worker", "wait-gcs-ready") if n in pod.containers)
    return pod.containers[name]


class Ended(NamedTuple):
    """How a job ended."""

    status: str
    """Of Ray's job: SUCCEEDED, FAILED, ... or LOST with its head."""
    log: str
    """What `kubectl logs job/NAME` has shown, of the last attempt."""
    attempts: int
    seconds: float


Watch = Callable[["RayCluster", str], None]
"""Called again and again while the job runs, with its cluster and the log so far."""


class RayJob:
    """The box's one RayJob."""

    def __init__(self, box: Box, images: Images) -> None:
        self.box, self._images = box, images
        (self.manifest,) = box.of_kind("RayJob")
        self.spec = self.manifest["spec"]
        self.name = self.manifest["metadata"]["name"]
        self.namespace = self.manifest["metadata"]["namespace"]
        labels = kuberay.OPERATORS["kustomize"]
        self._operator = box.add_machine("operator", "kuberay-system", labels)

    def run(
        self,
        watch: Watch = lambda *_: None,
        ready_s: float = 120,
        run_s: float = 500,
        *,
        entrypoint: str | None = None,
        first: RayCluster | None = None,
    ) -> Ended:
        """All attempts. Raises: BoxError if a cluster does not become ready or takes too long.

        Args: entrypoint: another than the manifest's. first: a cluster that is there, for the first
            attempt.
        """
        began = time.monotonic()
        for attempt in range(1, self.spec["backoffLimit"] + 2):
            cluster = first if first and attempt == 1 else None
            name = f"{self.name}-{attempt}"
            cluster = cluster or self.start_cluster(name, ready_s)
            status, log = self.submit(cluster, name, watch, run_s, entrypoint)
            cluster.delete()
            if status == "SUCCEEDED":
                break
        return Ended(status, log, attempt, time.monotonic() - began)

    def start_cluster(self, name: str, ready_s: float) -> RayCluster:
        """A cluster of which every pod is ready."""
        spec = self.spec["rayClusterSpec"]
        cluster = RayCluster(self.box, spec, name, self.namespace, self._images)
        until(lambda: f"cluster {name} is not ready:\n{cluster.state()}", cluster.is_ready, ready_s)
        return cluster

    def submit(
        self,
        cluster: RayCluster,
        submission: str,
        watch: Watch = lambda *_: None,
        run_s: float = 500,
        entrypoint: str | None = None,
    ) -> tuple[str, str]:
        """One submission, to its end: the job's status and what the submitter's log shows.

        Args: entrypoint: another than the manifest's.
        """
        manifest = copy.deepcopy(self.manifest)
        manifest["spec"]["entrypoint"] = entrypoint or self.spec["entrypoint"]
        name = f"{submission}-submit"
        pod = self.box.add_pod(kuberay.submitter_pod(manifest, cluster.name, name, submission))
        (container,) = pod.spec["containers"]
        submitter = pod.start(container, self._images[container["image"]])
        log = ""

        def ended() -> bool:
            nonlocal log
            log = submitter.log.read_text(errors="replace")
            cluster.reconcile()
            watch(cluster, log)
            head_died = cluster.head.containers["ray-head"].exit_code is not None
            return head_died or submitter.exit_code is not None

        until(lambda: f"job {submission} did not end:\n{log[-3000:]}", ended, run_s)
        status = self._status(cluster, submission)
        log = submitter.log.read_text(errors="replace")
        self.box.remove_pod(pod)
        return status, log

    def _status(self, cluster: RayCluster, submission: str) -> str:
        """As the operator asks for it, which the network policy has to let in."""
        if cluster.head.containers["ray-head"].exit_code is not None:
            return "LOST"
        token = self.box.secrets[self.spec["rayClusterSpec"]["authOptions"]["secretName"]]
        url = (
            f"http://{cluster.head.machine.address}:{kuberay.DASHBOARD_PORT}/api/jobs/{submission}"
        )
        header = f"--header=Authorization: Bearer {token['auth_token']}"
        done = self.box.outside(["wget", "-q", "-T", "10", "-O-", header, url], self._operator, 60)
        return json.loads(done.stdout)["status"] if done.returncode == 0 else "UNKNOWN"
