"""The rendered job's own command in its pod, with a bucket at an address: few clips, so no Ray."""

import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.box import kuberay
from support.box.box import KEYS, S3_URL, Box, images, until
from support.box.node import why_not
from support.box.pod import Container, Pod
from support.box.smallest import SECRETS, config, digests, get, put
from support.stores import contents

from deploy.config import ClusterConfig
from deploy.render import render
from diccae.cli import main
from pipeline.synth import write_clips

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

AWAY_S, CUT_S = 20, 30
CONFIGS = Path(__file__).parents[2] / "configs"


def _ingest(store: str, *more: str) -> ClusterConfig:
    source = "--clips s3://bucket/clips/clips.csv --videos s3://bucket/clips/videos"
    options = "--config /app/configs/vggsound-smoke.yaml --ingest.shard-clips 4"
    return config(*f"ingest {source} --store s3://bucket/{store} {options}".split(), *more)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("box") / "clips"
    write_clips(folder, 12, 4, seed=0)
    return folder


@pytest.fixture(scope="module")
def expected(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> list:
    """What this machine makes of the clips, without any pod."""
    store = str(tmp_path_factory.mktemp("box") / "store")
    source = ["--clips", str(clips / "clips.csv"), "--videos", str(clips / "videos")]
    smoke = ["--config", str(CONFIGS / "vggsound-smoke.yaml"), "--ingest.shard-clips", "4"]
    assert main(["ingest", *source, "--store", store, *smoke]) == 0
    return _features(store)


def _features(store: str) -> list:
    """Without the keys of rows, which hold where a clip came from."""
    return [(clip, *features) for clip, _, *features in contents(store)]


@pytest.fixture(scope="module")
def box(clips: Path) -> Iterator[Box]:
    with Box(render(config()), SECRETS) as box:
        box.add_storage("bucket")
        put(box, clips)
        yield box


def _start(
    box: Box, job: ClusterConfig, pod_name: str = "", by_hand: bool = False
) -> tuple[Pod, Container]:
    """The entrypoint as Ray's job server starts it: in the head's container, with the job's
    variables. Args: by_hand: without them, as a person would start it there."""
    with_job = Box.parse(render(job))
    (spec,) = [d["spec"] for d in with_job if d["kind"] == "RayJob"]
    name = job.command[job.command.index("--store") + 1].rpartition("/")[2]
    pod = box.add_pod(kuberay.head_pod(spec["rayClusterSpec"], pod_name or name, job.namespace))
    container, *_ = pod.spec["containers"]
    container |= {"command": shlex.split(spec["entrypoint"]), "args": []}
    if not by_hand:
        variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
        container["env"] += [{"name": name, "value": text} for name, text in variables.items()]
    return pod, pod.start(container, images(job)[container["image"]])


def _finish(box: Box, pod: Pod, container: Container, timeout_s: float = 400) -> tuple[bool, str]:
    container.process.wait(timeout_s)
    said = container.log.read_text()
    box.remove_pod(pod)
    return container.exit_code == 0, said


def test_the_job_makes_of_a_bucket_what_a_laptop_makes_of_a_folder(
    box: Box, expected: list, tmp_path: Path
) -> None:
    done, said = _finish(box, *_start(box, _ingest("plain")))
    assert done, said
    get(box, "plain", tmp_path / "there")
    assert _features(str(tmp_path / "there")) == expected


@pytest.mark.cluster
def test_storage_that_refuses_requests_and_goes_away_changes_nothing(
    box: Box, expected: list, tmp_path: Path
) -> None:
    box.ask_storage("faults?0.05")
    try:
        pod, container = _start(box, _ingest("unsteady"))
        begun = "unsteady/features/"
        until(lambda: container.tail(), lambda: begun in box.ask_storage("names?bucket"), 300)
        box.node.cut(box.storage)
        time.sleep(AWAY_S)  # what is tested, not waited for
        box.node.heal(box.storage)
        done, said = _finish(box, pod, container)
    finally:
        refused = int(box.ask_storage("faults?0").split()[1])
    assert done, said
    assert refused > 0
    get(box, "unsteady", tmp_path / "there")
    assert _features(str(tmp_path / "there")) == expected


@pytest.mark.cluster
def test_a_pod_that_was_cut_off_and_came_back_commits_nothing_any_more(
    box: Box, expected: list, tmp_path: Path
) -> None:
    """Each takes the other for dead: the one that was silent has lost the store. Shards that it was
    about to put away still come; nothing points at them, `store vacuum` removes them. So
    may its last heartbeat, of a generation that is over."""
    job = _ingest("cut", "--ingest.lease-stale-s", "9")
    pod, first = _start(box, job, "first")
    until(lambda: first.tail(), lambda: "cut/features/" in box.ask_storage("names?bucket"), 300)
    box.node.cut(pod.machine)
    cut_at = time.monotonic()
    done, said = _finish(box, *_start(box, job, "second"))
    assert done, said
    time.sleep(max(0.0, cut_at + CUT_S - time.monotonic()))  # what is tested, not waited for
    assert first.exit_code is None, first.tail()
    before = digests(box, "cut")
    box.node.heal(pod.machine)
    came_back, said = _finish(box, pod, first)
    assert not came_back
    assert first.exit_code == 4, said
    after = digests(box, "cut")
    assert {name: after.get(name) for name in before} == before
    late = ("features/", "lease/00000001.json")
    assert not [name for name in after.keys() - before.keys() if not name.startswith(late)]
    get(box, "cut", tmp_path / "there")
    assert _features(str(tmp_path / "there")) == expected


@pytest.mark.cluster
def test_after_a_kill_the_jobs_next_attempt_waits_and_a_person_is_refused_at_once(
    box: Box, expected: list, tmp_path: Path
) -> None:
    """Refused, too, the attempt would have used up one of the job's retries."""
    job = _ingest("killed", "--ingest.lease-stale-s", "60")
    box.ask_storage("hold?killed/features/")
    pod, first = _start(box, job, "first")
    until(lambda: first.tail(), lambda: box.ask_storage("held") != "", 300)
    box.remove_pod(pod)
    box.ask_storage("hold?")
    refused, said = _finish(box, *_start(box, job, "person", by_hand=True))
    assert not refused
    assert "locked by" in said
    done, said = _finish(box, *_start(box, job, "second"))
    assert done, said
    assert "an earlier attempt of this job: waiting for it" in said
    get(box, "killed", tmp_path / "there")
    assert _features(str(tmp_path / "there")) == expected


@pytest.mark.parametrize(
    ("secret", "found"),
    [
        pytest.param(None, "credentials", id="no storage secret"),
        # A name that is not known yet may be known soon: it is asked for again for half a minute.
        pytest.param(
            KEYS | {"AWS_ENDPOINT_URL": S3_URL.replace("s3.", "s4.")},
            "s4.storage.test",
            id="wrong name of the storage",
            marks=pytest.mark.cluster,
        ),
    ],
)
def test_storage_that_cannot_be_reached_is_one_line_of_the_job(
    box: Box, secret: dict[str, str] | None, found: str
) -> None:
    box.secrets = {k: v for k, v in SECRETS.items() if k != "diccae-storage"}
    if secret is not None:
        box.secrets = {**box.secrets, "diccae-storage": secret}
    try:
        done, said = _finish(box, *_start(box, _ingest("none")))
    finally:
        box.secrets = SECRETS
    assert not done
    assert found in said
    assert "Traceback" not in said
