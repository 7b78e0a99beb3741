"""What a pod of the rendered manifests has and has not, in real namespaces; Ray is not started."""

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.box import kuberay
from support.box.box import S3_URL, Box, images, until
from support.box.errors import BoxError
from support.box.kuberay import OPERATORS
from support.box.node import why_not
from support.box.pod import Pod
from support.box.smallest import SECRETS, config

from deploy.render import render

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

IMAGES = images(config())
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def shared_box() -> Iterator[Box]:
    with Box(render(config()), SECRETS) as box:
        box.add_storage("bucket")
        yield box


@pytest.fixture
def box(shared_box: Box) -> Iterator[Box]:
    """Without the pods of the test before."""
    yield shared_box
    for pod in [*shared_box.pods.values()]:
        shared_box.remove_pod(pod)


def _head(box: Box, name: str, change: Change = lambda _: None) -> Pod:
    (job,) = box.of_kind("RayJob")
    spec = copy.deepcopy(job["spec"]["rayClusterSpec"])
    change(spec["headGroupSpec"]["template"])
    return box.add_pod(kuberay.head_pod(spec, name, "diccae"))


def _run(pod: Pod, script: str) -> str:
    """What a shell in the pod's Ray container prints, and its exit code."""
    container = {**pod.spec["containers"][0], "command": ["bash", "-c", script], "args": []}
    container["name"] = f"sh{len(pod.containers)}"
    started = pod.start(container, IMAGES[container["image"]])
    code = started.process.wait(200)
    return f"{started.log.read_text()}exit {code}"


def test_a_pod_writes_to_its_volumes_its_home_and_tmp_and_nowhere_else(box: Box) -> None:
    head = _head(box, "one")
    places = "/ /app /app/configs /dev /dev/shm /etc /home/diccae /opt/diccae/diccae /tmp /tmp/ray"
    places += f" /usr /var /sys/fs/cgroup {sys.prefix}"
    said = _run(head, f"for d in {places}; do touch $d/x 2>/dev/null && echo -n $d' '; done; id -u")
    assert said == "/dev/shm /home/diccae /tmp /tmp/ray 1000\nexit 0"


def test_no_file_crosses_from_pod_to_pod_and_none_from_this_machine(
    box: Box, tmp_path: Path
) -> None:
    one, two = _head(box, "one"), _head(box, "two")
    assert "exit 0" in _run(one, "touch /tmp/x /tmp/ray/x /dev/shm/x ~/x; mkfifo /tmp/ray/pipe")
    assert _run(one, "ls /tmp/ray /dev/shm | xargs") == "/dev/shm: x /tmp/ray: pipe x\nexit 0"
    assert _run(two, f"ls -d /tmp/x /tmp/ray/x /dev/shm/x ~/x {tmp_path} 2>/dev/null") == "exit 2"
    assert _run(two, "ps -e -o pid= | wc -l") == "3\nexit 0"


def test_code_and_configs_are_the_images(box: Box) -> None:
    said = _run(_head(box, "one"), "python -c 'import diccae; print(diccae.__path__)'; ls configs")
    assert "['/opt/diccae/diccae']" in said
    assert "vggsound.yaml" in said


def test_variables_are_the_manifests_and_the_secrets_alone(box: Box) -> None:
    os.environ["OF_THE_TESTS"] = "1"
    said = _run(_head(box, "one"), "env")
    for wanted in ("RAY_AUTH_MODE=token", f"AWS_ENDPOINT_URL={S3_URL}", "DICCAE_AUTOSCALING"):
        assert wanted in said
    assert "OF_THE_TESTS" not in said


def test_memory_and_volumes_end_where_the_manifest_says(box: Box) -> None:
    def little(template: dict[str, Any]) -> None:
        template["spec"]["volumes"][1]["emptyDir"] = {"sizeLimit": "1Mi"}
        template["spec"]["containers"][0]["resources"]["limits"]["memory"] = "64Mi"

    head = _head(box, "one", little)
    assert "No space left" in _run(head, "head -c 2M /dev/zero > /tmp/ray/x")
    assert "exit 0" in _run(head, "head -c 500K /dev/zero > /tmp/ray/x")
    assert "exit 0" in _run(head, "python -c 'bytearray(b\"1\") * 2**24'")
    assert "exit 0" not in _run(head, "python -c 'bytearray(b\"1\") * 2**28'")


def test_a_read_only_root_leaves_the_volumes_writable(box: Box) -> None:
    def read_only(template: dict[str, Any]) -> None:
        template["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = True

    said = _run(
        _head(box, "one", read_only), "touch /tmp/ray/x && echo ray; touch ~/x; touch /tmp/x"
    )
    assert said.count("Read-only file system") == 2
    assert said.startswith("ray\n")


def test_names_resolve_as_in_the_cluster(box: Box) -> None:
    head = _head(box, "one")
    box.name_service("mlflow", "diccae", "10.244.9.9")
    said = _run(
        head,
        "for n in mlflow mlflow.diccae mlflow.diccae.svc.cluster.local mlfow; do "
        "getent hosts $n; done; getent hosts s3.storage.test | wc -l",
    )
    assert said.count("10.244.9.9") == 3
    assert said.endswith("\n1\nexit 0")


CONNECT = "timeout 1 bash -c 'echo > /dev/tcp/{}/{}' 2>/dev/null && echo in || echo out"
LISTEN = [
    "python",
    "-c",
    "import socket, time\nfor port in (6379, 8265):\n"
    " s = socket.create_server(('', port)); globals()[f's{port}'] = s\ntime.sleep(600)",
]


@pytest.mark.slow
def test_the_network_policy_lets_in_the_cluster_and_the_operator_at_its_port(box: Box) -> None:
    head, other = _head(box, "one"), _head(box, "two")
    stranger = _head(box, "three", lambda t: t["metadata"].update(labels={}))
    operators = [
        box.add_machine(name, "kuberay-system", labels) for name, labels in OPERATORS.items()
    ]
    elsewhere = box.add_machine("elsewhere", "default", OPERATORS["helm"])
    container = {**head.spec["containers"][0], "command": LISTEN, "args": []}
    head.start(container, IMAGES[container["image"]])
    at = head.machine.address
    until(lambda: "head never listened", lambda: "in" in _run(other, CONNECT.format(at, 8265)), 100)
    assert "in" in _run(other, CONNECT.format(at, 6379))
    for port in (6379, 8265):
        assert "out" in _run(stranger, CONNECT.format(at, port))
    asked = {
        machine: [
            box.outside(["sh", "-c", CONNECT.format(at, port)], machine, 30).stdout.strip()
            for port in (6379, 8265)
        ]
        for machine in (*operators, elsewhere)
    }
    assert [asked[operator] for operator in operators] == [["out", "in"], ["out", "in"]]
    assert asked[elsewhere] == ["out", "out"]
    box.node.cut(head.machine)
    assert "out" in _run(other, CONNECT.format(at, 6379))
    box.node.heal(head.machine)
    until(lambda: "healed", lambda: "in" in _run(other, CONNECT.format(at, 6379)), 30)


def test_without_a_rule_for_names_a_pod_knows_none(box: Box) -> None:
    policy = {
        "kind": "NetworkPolicy",
        "metadata": {"name": "egress", "namespace": "diccae"},
        "spec": {
            "podSelector": {"matchLabels": {"diccae.io/cluster": "diccae"}},
            "policyTypes": ["Egress"],
            "egress": [{"to": [{"podSelector": {}}]}],
        },
    }
    box.objects.append(policy)
    try:
        look = "getent ahostsv4 s3.storage.test | wc -l"
        assert _run(_head(box, "one"), f"timeout 3 {look}") == "0\nexit 0"
        policy["spec"]["egress"].append({"ports": [{"protocol": "UDP", "port": 53}]})
        assert _run(_head(box, "two"), look) != "0\nexit 0"
    finally:
        box.objects.remove(policy)


def test_a_missing_secret_is_named_and_an_optional_one_is_not_missed(box: Box) -> None:
    box.secrets = {"diccae-ray-token": SECRETS["diccae-ray-token"]}
    try:
        assert "AWS" not in _run(_head(box, "one"), "env")
        box.secrets = {}
        with pytest.raises(BoxError, match=r"pod two-head.*secret diccae-ray-token not found"):
            _run(_head(box, "two"), "env")
        box.secrets = {"diccae-ray-token": {"token": "x"}}
        with pytest.raises(BoxError, match="has no key auth_token"):
            _run(_head(box, "three"), "env")
    finally:
        box.secrets = SECRETS


HOLD = """
import sys
from support.box.box import Box
from support.box.smallest import SECRETS, config
from deploy.render import render
box = Box(render(config()), SECRETS)
box.node.limit_memory("x", 2**30)
print(box.node.folder, flush=True)
sys.stdin.read()
"""


def test_tests_that_are_killed_leave_nothing_behind() -> None:
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD], env=env, stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    assert holder.stdout is not None
    folder = Path(holder.stdout.readline().decode().strip())
    holder.send_signal(signal.SIGKILL)
    holder.wait()

    def servers() -> str:
        return subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True).stdout

    until(lambda: f"still there: {servers()}", lambda: servers() == "", 20)
    with Box({}, {}):
        assert not folder.exists()
        assert not [*Path("/sys/fs/cgroup/memory").glob(f"{folder.name}*")]
