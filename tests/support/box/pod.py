"""Pod: a Kubernetes pod as real processes, from its manifest, on a Node.

Knows nothing of Ray. What the manifest does not give, the pod does not have: no file, no variable,
no disk of this machine but the image, which is read-only.
Invariant: a volume is its pod's own, a claim's excepted; what is too large for it, fails.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from support.box.errors import BoxError
from support.box.node import Machine, Node, below

Manifest = dict[str, Any]
Secrets = Mapping[str, Mapping[str, str]]

ROOT = Path(__file__).resolve().parents[3]
_CODE = ("clustering", "configs", "deploy", "diccae", "pipeline", "training")
_IMAGE_USER = 1000
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "m": 0.001, "": 1}
_ETC = ("alternatives", "ld.so.cache", "mime.types", "nsswitch.conf", "ssl")


class Image(NamedTuple):
    """What a container image brings, besides the files all of them share here."""

    env: Mapping[str, str]
    entrypoint: tuple[str, ...] = ()
    files: Mapping[str, str] = {}
    """Folders of this machine: where the image has them."""


_PATH = f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin"
PYTHON = Image(
    {
        "PATH": _PATH,
        "PYTHONPATH": "/opt/diccae",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HOME": "/home/diccae",
        "LANG": "C.UTF-8",
    }
)
"""Targets `cpu` and `gpu` of the Dockerfile."""


def quantity(text: str | int) -> float:
    """Kubernetes' `512Mi`, `200m`, `4` as a number."""
    digits = str(text).rstrip("KMGim")
    return float(digits) * _UNITS[str(text)[len(digits) :]]


class Container(NamedTuple):
    """A container that was started."""

    name: str
    process: "subprocess.Popen[bytes]"
    pid: int
    """Of its first process, on this machine."""
    log: Path
    user: int
    cgroup: Path | None

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def tail(self, n_lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-n_lines:])


class Pod:
    """One pod; containers start when they are told to."""

    def __init__(
        self, node: Node, manifest: Manifest, machine: Machine, secrets: Secrets, nameserver: str
    ) -> None:
        self.node, self.machine, self.secrets = node, machine, secrets
        self.manifest, self.spec = manifest, manifest["spec"]
        self.name = manifest["metadata"]["name"]
        self.namespace = manifest["metadata"]["namespace"]
        self.labels: dict[str, str] = manifest["metadata"].get("labels", {})
        self.containers: dict[str, Container] = {}
        self._nameserver = nameserver
        self._volumes = {
            volume["name"]: self._volume(volume) for volume in self.spec.get("volumes", [])
        }

    def _volume(self, volume: Manifest) -> Path:
        group = self.spec.get("securityContext", {}).get("fsGroup", 0)
        if claim := volume.get("persistentVolumeClaim"):
            path = self.node.folder / "claims" / claim["claimName"]
            mount = ""
        elif "emptyDir" in volume:
            path = self.node.folder / "volumes" / self.name / volume["name"]
            mount = self._tmpfs(volume["emptyDir"], path)
        else:
            raise BoxError(f"{self.name}: volume {volume}: neither an emptyDir nor a claim")
        path.mkdir(parents=True, exist_ok=True)
        self.node.sh(f"{mount} chgrp {group} {path}; chmod 2777 {path}")
        return path

    def _tmpfs(self, declared: Manifest, path: Path) -> str:
        # The kubelet evicts a pod that writes more to its disk than sizeLimit; here it is full.
        if not declared:
            return ""
        limit = int(quantity(declared["sizeLimit"])) if "sizeLimit" in declared else 2**40
        return f"mount -t tmpfs -o size={limit} emptydir {path};"

    def start(self, container: Manifest, image: Image) -> Container:
        """Start one of the manifest's containers. Raises: BoxError if a secret is missing."""
        name = container["name"]
        command = [*container.get("command", image.entrypoint), *container.get("args", [])]
        env = {**image.env, "HOSTNAME": self.name, **self._environment(container)}
        security = {**self.spec.get("securityContext", {}), **container.get("securityContext", {})}
        root = self.node.folder / "roots" / self.name / name
        root.mkdir(parents=True)
        log = self.node.folder / f"{self.name}-{name}.log"
        cgroup = self._cgroup(container)
        script = "\n".join(
            self._build_root(root, container, image, cgroup) + _enter_root(security, env, command)
        )
        unshare = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
        with log.open("wb") as file:
            process = self.node.start(
                [*unshare, "bash", "-ec", script], self.machine.name, file, cgroup=cgroup
            )
        user = security.get("runAsUser", _IMAGE_USER)
        # Below nsenter and unshare: killing it, the init of its processes, kills all of them.
        started = Container(name, process, below(process, 2), log, user, cgroup)
        self.containers[name] = started
        return started

    def _cgroup(self, container: Manifest) -> Path | None:
        limit = container.get("resources", {}).get("limits", {}).get("memory")
        name = f"{self.name}-{container['name']}"
        return None if limit is None else self.node.limit_memory(name, int(quantity(limit)))

    def _environment(self, container: Manifest) -> dict[str, str]:
        env: dict[str, str] = {}
        for source in container.get("envFrom", []):
            wanted = source["secretRef"]
            if wanted["name"] in self.secrets or not wanted.get("optional"):
                env |= self._secret(container, wanted["name"])
        for entry in container.get("env", []):
            env[entry["name"]] = self._value(container, entry)
        return env

    def _value(self, container: Manifest, entry: Manifest) -> str:
        if "value" in entry:
            return str(entry["value"])
        source = entry["valueFrom"]["secretKeyRef"]
        secret = self._secret(container, source["name"])
        if source["key"] not in secret:
            raise BoxError(
                f"pod {self.name}, container {container['name']}: secret {source['name']} has no "
                f"key {source['key']} (CreateContainerConfigError)"
            )
        return secret[source["key"]]

    def _secret(self, container: Manifest, name: str) -> Mapping[str, str]:
        if name not in self.secrets:
            raise BoxError(
                f"pod {self.name}, container {container['name']}: secret {name} not found "
                "(CreateContainerConfigError)"
            )
        return self.secrets[name]

    def _build_root(
        self, root: Path, container: Manifest, image: Image, cgroup: Path | None
    ) -> list[str]:
        """Lines that build the container's root: the image, its own devices, its volumes."""
        search = " ".join(f"{part}svc.cluster.local" for part in (f"{self.namespace}.", ""))
        lines = [
            f"R={root}; cd /; hostname {self.name}",
            "mount -t tmpfs -o size=1g,mode=755 image $R",
            'ro() { mkdir -p "$R$2"; mount --bind "$1" "$R$2"; mount -o remount,ro,bind "$R$2"; }',
            "mkdir -p $R/etc $R/tmp $R/var/tmp $R/home/diccae $R/app $R/proc $R/sys $R/dev",
            "for d in bin lib lib64 sbin; do ln -s usr/$d $R/$d; done; ro /usr /usr",
            *(f"ro {path} {path}" for path in dict.fromkeys([sys.base_prefix, sys.prefix])),
            *(f"ro {ROOT}/{package} /opt/diccae/{package}" for package in _CODE),
            f"ro {ROOT}/configs /app/configs",
            *(f"ro {source} {where}" for source, where in image.files.items()),
            *(f"cp -a /etc/{name} $R/etc/ 2>/dev/null || true" for name in _ETC),
            "printf 'root:x:0:0::/root:/bin/sh\\ndiccae:x:1000:1000::/home/diccae:/bin/bash\\n'"
            " > $R/etc/passwd; printf 'root:x:0:\\ndiccae:x:1000:\\n' > $R/etc/group",
            f"printf '127.0.0.1 localhost\\n{self.machine.address} {self.name}\\n' > $R/etc/hosts",
            f"printf 'nameserver {self._nameserver}\\nsearch {search} cluster.local\\n"
            "options ndots:5\\n' > $R/etc/resolv.conf",
            "chmod 1777 $R/tmp $R/var/tmp; chown 1000:1000 $R/home/diccae",
            "mount -t proc proc $R/proc; mount -t sysfs -o ro sysfs $R/sys",
            "mount -t tmpfs -o size=64k,mode=755 dev $R/dev; mkdir $R/dev/shm",
            "for d in 'null 3' 'zero 5' 'full 7' 'random 8' 'urandom 9'; do set -- $d;"
            " mknod -m 666 $R/dev/$1 c 1 $2; done; ln -s /proc/self/fd $R/dev/fd",
            "mount -t tmpfs -o size=64m,mode=1777 shm $R/dev/shm",
        ]
        if cgroup is not None:
            lines.append(
                "mount -t tmpfs -o size=64k,mode=755 cgroup $R/sys/fs/cgroup;"
                f" ro /run/cgroup/memory/{cgroup.name} /sys/fs/cgroup/memory"
            )
        for mount in container.get("volumeMounts", []):
            where, volume = mount["mountPath"], self._volumes.get(mount["name"])
            if volume is None:
                raise BoxError(f"pod {self.name}: volumeMount {mount['name']} names no volume")
            lines.append(f"mkdir -p $R{where}; mount --bind {volume} $R{where}")
        return lines

    def probe(self, container: Container, script: str, timeout_s: float) -> bool:
        """Whether an exec probe succeeds."""
        enter = ["nsenter", "--target", str(container.pid), "--root", "--wd"]
        enter += ["--mount", "--net", "--pid", "--ipc", "--uts"]
        user = ["setpriv", f"--reuid={container.user}", f"--regid={container.user}"]
        command = [*enter, *user, "--clear-groups", "bash", "-c", script]
        try:
            return subprocess.run(command, capture_output=True, timeout=timeout_s).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def kill(self) -> None:
        """SIGKILL to all processes of the pod at once, as when its machine is taken away."""
        for container in self.containers.values():
            if container.exit_code is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(container.pid, signal.SIGKILL)
        for container in self.containers.values():
            container.process.wait()

    def delete(self) -> None:
        """Kill it and take its disks and address away."""
        self.kill()
        volumes = self.node.folder / "volumes" / self.name
        roots = self.node.folder / "roots" / self.name
        self.node.sh(f"umount -q {volumes}/* || true; rm -rf {volumes} {roots}")
        for container in self.containers.values():
            self.node.remove_cgroup(container.cgroup)
        self.node.remove_machine(self.machine)


def _enter_root(security: Manifest, env: Mapping[str, str], command: Sequence[str]) -> list[str]:
    """Lines that make the root the container's, and end in its first process."""
    user, group = security.get("runAsUser", _IMAGE_USER), security.get("runAsGroup", _IMAGE_USER)
    words = ["setpriv", f"--reuid={user}", f"--regid={group}"]
    if "fsGroup" in security:
        words.append(f"--groups={security['fsGroup']}")
    else:
        words.append("--clear-groups")
    if not security.get("allowPrivilegeEscalation", True):
        words.append("--no-new-privs")
    if "ALL" in security.get("capabilities", {}).get("drop", []):
        words += ["--bounding-set=-all", "--inh-caps=-all"]
    words += ["env", "-i", *(f"{name}={value}" for name, value in env.items()), *command]
    return [
        "cd $R; mkdir old; pivot_root . old; umount -l old; rmdir old; cd /app",
        "mount -o remount,ro /" if security.get("readOnlyRootFilesystem") else ":",
        f"exec {shlex.join(words)}",
    ]
