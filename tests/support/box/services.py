"""MLflow as its manifest has it, before a Postgres outside the cluster.

Knows nothing of runs. Invariant: who uses them has an address, never a file.
"""

import shutil
import sys
from pathlib import Path

from support.box import kuberay
from support.box.box import Box, until
from support.box.pod import Image, Pod, Secrets

POSTGRES = "postgres.storage.test"
_DEBIANS = "/usr/lib/python3/dist-packages"


def why_no_postgres() -> str | None:
    """Why there is none; None if there is."""
    if not _programs():
        return "no Postgres (Debian: postgresql)"
    if not Path(f"{_DEBIANS}/psycopg2").exists() or sys.version_info[:2] != (3, 11):
        return "no psycopg2 (Debian: python3-psycopg2)"
    return None


def _programs() -> list[Path]:
    return sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def mlflow_secret(bucket_keys: Secrets) -> dict[str, str]:
    """What the head of mlflow.yaml says to create."""
    uri = f"postgresql+psycopg2://mlflow:of-the-box@{POSTGRES}/mlflow"
    return {"MLFLOW_BACKEND_STORE_URI": uri, **bucket_keys["diccae-storage"]}


def add_postgres(box: Box) -> None:
    """A Postgres with the database and the user `mlflow`."""
    machine = box.add_machine("postgres")
    box.name(POSTGRES, machine.address)
    programs, data = _programs()[-1], box.node.folder / "postgres"
    box.node.folder.chmod(0o711)
    data.mkdir()
    shutil.chown(data, "postgres", "postgres")
    as_postgres = "setpriv --reuid=postgres --regid=postgres --clear-groups"
    box.node.sh(f"{as_postgres} {programs}/initdb -D {data} --auth=trust --no-sync >/dev/null")
    (data / "pg_hba.conf").write_text("local all all trust\nhost all all 10.244.0.0/16 md5\n")
    server = [f"{programs}/postgres", "-D", str(data), "-k", str(data), "-c", "fsync=off"]
    command = [*as_postgres.split(), *server, "-c", "listen_addresses=*"]
    box.serve(machine, command, "ready to accept connections")
    sql = "create user mlflow password 'of-the-box'; create database mlflow owner mlflow"
    for statement in sql.split("; "):
        box.node.sh(f'{as_postgres} {programs}/psql -h {data} -qc "{statement}"', machine.name)


def start_mlflow(box: Box, images: dict[str, Image], timeout_s: float = 120) -> Pod:
    """The Deployment's pod, ready, behind its Service's name."""
    (deployment,) = box.of_kind("Deployment")
    (service,) = box.of_kind("Service")
    namespace = deployment["metadata"]["namespace"]
    template = deployment["spec"]["template"]
    pod = box.add_pod(kuberay.pod_of(template, deployment["metadata"]["name"], namespace))
    (container,) = pod.spec["containers"]
    started = pod.start(container, images[container["image"]])
    selected = service["spec"]["selector"].items() <= pod.labels.items()
    if selected:
        box.name_service(service["metadata"]["name"], namespace, pod.machine.address)
    probe = container["readinessProbe"]["httpGet"]
    (port,) = [p["containerPort"] for p in container["ports"] if p["name"] == probe["port"]]
    ask = f"wget -q -O- http://127.0.0.1:{port}{probe['path']}"
    until(lambda: f"mlflow: {started.tail()}", lambda: pod.probe(started, ask, 10), timeout_s)
    return pod
