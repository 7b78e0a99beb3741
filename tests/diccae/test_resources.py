"""A run that cannot fit is refused with who wants what; Ray would wait for it in silence."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from support.runs import SMOKE
from support.stores import noise_store

from diccae.cli import main
from diccae.config import SHIPPED, load_config
from diccae.resources import Demand, Node, left_over

SPEC = load_config(SMOKE).features


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch):
    """Say which nodes Ray is connected to; a run that would start is stopped."""

    def give(*nodes: tuple[float, float], roles: tuple[str, ...] = ()) -> None:
        said = [
            {"Alive": True, "Resources": {"CPU": c, "GPU": g}, "Labels": {"diccae.io/role": role}}
            for (c, g), role in zip(nodes, roles or ("",) * len(nodes), strict=True)
        ]
        dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}, "Labels": {}}
        monkeypatch.setattr(ray, "nodes", lambda: [*said, dead])

    for command in ("stages.backend", "commands.cluster"):
        monkeypatch.setattr(f"diccae.{command}.start_ray", lambda: None)
        monkeypatch.setattr(f"diccae.{command}.check_reach", lambda *_: None)
    monkeypatch.setattr("diccae.stages.backend.tracking_run", lambda *_: 1 / 0)
    return give


def _pretrain(folder: Path, *options: str) -> int:
    store = folder / "store"
    if not store.exists():
        noise_store(store, SPEC, 64)
    out = ["--out", str(folder / "run"), "--store", str(store)]
    return main(["pretrain", "--config", SMOKE, *out, "--encoder.dim", "32", *options])


MAXIMA = '[{"nodes": 2, "cpus": 8, "gpus": 0}, {"nodes": 1, "cpus": 16, "gpus": 2}]'


def test_a_pretraining_waits_while_the_groups_grow_from_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cluster
) -> None:
    """The head takes no work, the group that trains has no node yet."""
    head, decode, train = (0.0, 0.0), (8.0, 0.0), (16.0, 2.0)
    monkeypatch.setenv("DICCAE_AUTOSCALING_GROUPS", MAXIMA)
    monkeypatch.setattr("diccae.resources._POLL_NODES_S", 0.0)
    asked: list[list[dict[str, float]]] = []

    def request_resources(
        bundles: list[dict[str, float]], bundle_label_selectors: tuple[dict[str, str], ...] = ()
    ) -> None:
        asked.append(bundles)
        kept_off.append(
            sum(labels == {"diccae.io/role": "!train"} for labels in bundle_label_selectors)
        )

    def grow(seconds: float) -> None:
        cluster(*((head, decode) if len(asked) == 1 and not grown else (head, decode, train)))
        grown.append(seconds)

    grown: list[float] = []
    kept_off: list[int] = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", request_resources)
    monkeypatch.setattr("diccae.resources.time.sleep", grow)
    cluster(head)
    with pytest.raises(ZeroDivisionError):  # It goes on.
        _pretrain(tmp_path, "--scale.num-workers", "2", "--scale.use-gpu")
    assert len(grown) == 2
    assert [bundle for bundle in asked[0] if bundle.get("GPU")] == [{"CPU": 1.0, "GPU": 1.0}] * 2
    assert kept_off == [4, 0], "two compute actors, a bank and the coordinator"
    assert asked[1:] == [[]], "what was asked for is given back"
    said = [line for line in capsys.readouterr().err.splitlines() if "waiting" in line]
    assert "2 of the training workers" in said[0]
    assert "2 node(s) are up" in said[-1]


def test_what_the_groups_can_never_hold_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cluster
) -> None:
    monkeypatch.setenv("DICCAE_AUTOSCALING_GROUPS", MAXIMA)
    cluster((0.0, 0.0))
    assert _pretrain(tmp_path, "--scale.num-workers", "3", "--scale.use-gpu") == 1
    said = capsys.readouterr().err
    assert "can grow to 32 CPUs and 2 GPUs" in said
    assert "No room for 1 of the training workers" in said
    assert "raise max_nodes" in said


@pytest.mark.parametrize(
    ("nodes", "options", "said"),
    [
        (
            [(64.0, 1.0)],
            ["--clustering.device", "cuda", "--pool.n-actors", "3"],
            "2 of the clustering actors",
        ),
        # Five actors have three banks, and a coordinator: 13 CPUs with all that trains.
        (
            [(12.9, 0.0)],
            ["--pool.n-actors", "5", "--pool.cpus-per-bank", "2"],
            "1 of the clustering actors",
        ),
        (
            [(2.0, 0.0)] * 8,
            ["--scale.num-workers", "2", "--scale.cpus-per-worker", "4"],
            "2 of the training workers",
        ),
    ],
)
def test_a_pretraining_that_no_nodes_can_hold_is_refused(
    cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], nodes, options, said: str
) -> None:
    cluster(*nodes)
    assert _pretrain(tmp_path, *options) == 1
    assert f"No room for {said}" in capsys.readouterr().err


def test_room_on_nodes_that_train_is_none_for_the_pool(
    cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray would keep its actors waiting for ever: they are not placed there."""
    sizes, options = (
        [(2.0, 0.0), (64.0, 0.0)],
        ["--pool.n-actors", "8", "--pool.cpus-per-actor", "1"],
    )
    cluster(*sizes, roles=("decode", "train"))
    assert _pretrain(tmp_path, *options) == 1
    said = capsys.readouterr().err
    assert "No room for 6 of the clustering actors off the nodes that train" in said
    cluster(*sizes)
    with pytest.raises(ZeroDivisionError):
        _pretrain(tmp_path, *options)
    # By size the worker would come first, and take the CPUs of the pool.
    cluster((8.0, 0.0), (8.0, 0.0), roles=("decode", "train"))
    with pytest.raises(ZeroDivisionError):
        _pretrain(tmp_path, *options[:1], "4", *options[2:], "--scale.cpus-per-worker", "6")


def test_a_pretraining_that_fits_exactly_is_started(cluster, tmp_path: Path) -> None:
    cluster((13.0, 0.0))
    with pytest.raises(ZeroDivisionError):
        _pretrain(tmp_path, "--pool.n-actors", "5", "--pool.cpus-per-bank", "2")


def test_more_actors_than_processors_are_refused_by_diccae_cluster(
    cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    pq.write_table(pa.table({"embedding": x.tolist()}), tmp_path / "v.parquet")
    cluster((4.0, 0.0))
    where = ["--vectors", str(tmp_path / "v.parquet"), "--out", str(tmp_path / "out")]
    assert main(["cluster", *where, "--k", "2", "--actors", "12"]) == 1
    assert "No room for 4 of the clustering actors. Lower --actors" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["cluster", *where, "--k", "2", "--pool.n-bank", "1"])
    assert stopped.value.code == 2


def test_the_largest_are_placed_first_and_where_least_is_left() -> None:
    nodes = [Node(4, 0), Node(2, 1), Node(8, 0)]
    demands = [Demand("small", 6, 1, 0), Demand("large", 1, 8, 0), Demand("gpu", 1, 0.5, 1)]
    assert left_over(demands, nodes) == [Demand("small", 1, 1, 0)]
    assert left_over(demands[1:], nodes) == []


RENDERED = ("--store", "s3://b/store", "--out", "/shared/run")


def _render(folder: Path, *command: str, groups: str = "") -> int:
    config = folder / "cluster.yaml"
    config.write_text(f"shared_claim: disk\n{groups}")
    out = str(folder / "manifests")
    return main(["render", "--config", str(config), "--out", out, "--", *command, *RENDERED])


def test_what_the_groups_can_never_hold_is_refused_at_rendering(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ("pretrain", "--config", "/app/configs/vggsound.yaml")
    too_small = "train: {cpus: 32, gpus: 4, max_nodes: 1}"
    assert _render(tmp_path, *recipe, groups=too_small) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no room for 4 of the training workers (4 CPU, 1 GPU each)" in said
    assert "train 1 x (32 CPU, 4 GPU)" in said
    assert not (tmp_path / "manifests").exists()

    no_room_to_cluster = "decode: {cpus: 4, max_nodes: 1}"
    assert _render(tmp_path, *recipe, groups=no_room_to_cluster) == 1
    said = capsys.readouterr().err
    assert "of the clustering actors (1 CPU, 0 GPU each, not on nodes that train)" in said

    fewer = ("--scale.num-workers", "4")
    assert _render(tmp_path, *recipe, *fewer, groups=too_small) == 0
    assert _render(tmp_path, *recipe) == 0
    assert (tmp_path / "manifests" / "rayjob.yaml").exists()
    assert capsys.readouterr().err == ""


def test_a_training_that_leaves_the_gpus_of_its_group_idle_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _render(tmp_path, "pretrain") == 0
    said = capsys.readouterr().err
    assert (
        "warning: pretrain asks for no GPU (scale.use_gpu), and group train-gpu has up to 8" in said
    )
    assert said.count("\n") == 1
    assert _render(tmp_path, "pretrain", groups="train: {gpus: 0}") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["pretain", "--store", "s3://b/s", "--out", "s3://b/o"], "Did you mean pretrain?"),
        (["evaluate", "--out", "s3://b/o", "--evaluate.spilt", "test"], "--evaluate.spilt"),
        (["ingest", "--store", "s3://b/s", "--bogus", "3"], "--bogus"),
        (["pretrain", "--config", str(SHIPPED / "vggsound.yaml")], "--store"),
        (["pretrain", "--store", "s", "--out", "o", "--optim.lr", "-1"], "optim.lr: "),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else "",
)
def test_a_command_that_could_never_start_is_neither_rendered_nor_submitted(
    command: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It would cost a cluster, as often as the job is tried again."""

    def exit_code(*words: str) -> object:
        try:
            return main([*words, "--", *command])
        except SystemExit as stopped:
            return stopped.code

    monkeypatch.chdir(tmp_path)
    for words in (["render", "--out", "manifests"], ["submit", "--address", "http://127.0.0.1:9"]):
        assert exit_code(*words) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "manifests").exists()


def test_a_config_that_only_this_machine_has_is_said_to_be_missing_in_the_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("scale: {num_workers: 1, use_gpu: true}\n")
    assert _render(tmp_path, "pretrain", "--config", str(own)) == 0
    said = capsys.readouterr().err
    assert f"--config {own}: a job brings no files, so its image must hold this one" in said
    assert _render(tmp_path, "pretrain", "--config", "s3://b/mine.yaml") == 0
    assert "must hold" not in capsys.readouterr().err


def test_a_command_whose_config_is_not_here_is_rendered_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _render(tmp_path, "pretrain", "--config", "/app/mine.yaml") == 0
    assert "not compared with the groups: pretrain" in capsys.readouterr().err
