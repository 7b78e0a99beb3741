"""Looks whether this machine, a cluster, a store and an MLflow server can do what diccae asks.

Knows nothing of how the answers are shown, and changes nothing: what it starts (a child process, an
embedded Ray) is gone when it returns. Invariant: no check raises, and each one that fails names the
next step.
"""

import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

_FREE_GB = 5.0
_SHM_MB = 256.0
_SOCKET_PATH = 107  # longest path of a Unix socket
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"


class Check(NamedTuple):
    """The answer to one question."""

    name: str
    ok: bool
    detail: str
    hint: str = ""
    """What to do; never empty if not ok."""


def run_doctor(
    store: str | None = None, mlflow_uri: str | None = None, address: str | None = None
) -> list[Check]:
    """Check the machine, and whatever of store, MLflow server and cluster is named.

    Returns: checks in the order in which their failures should be mended; about 20 s.
    """
    checks = [check_python(), check_versions(), check_devices(), check_blas(), check_codecs()]
    checks += [check_decord(), check_shared_memory(), check_ray_folder(), check_token()]
    checks += [check_ray_start(), check_disk(store)]
    if store:
        checks.append(check_store(store))
    if mlflow_uri:
        checks.append(check_mlflow(mlflow_uri))
    if address:
        checks.append(check_cluster(address))
    return checks


def _never_raises(name: str, hint: str) -> Callable[[Callable[..., Check]], Callable[..., Check]]:
    """Turn an exception of a check into its failure."""

    def decorate(check: Callable[..., Check]) -> Callable[..., Check]:
        @functools.wraps(check)
        def wrapped(*args: str | None) -> Check:
            try:
                return check(*args)
            except Exception as error:
                return Check(name, False, f"{type(error).__name__}: {error}", hint)

        return wrapped

    return decorate


def _run(code: str, timeout_s: float, *args: str, env: dict[str, str] | None = None) -> str:
    """The last line that a child Python prints: what it loads cannot crash or stain this one."""
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **(env or {})},
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"exit status {done.returncode}: {last}")
    return done.stdout.strip().splitlines()[-1]


def check_python() -> Check:
    """Python 3.11, the only one that all dependencies have wheels for."""
    found = platform.python_version()
    ok = sys.version_info[:2] == (3, 11)
    return Check("python", ok, f"{found} at {sys.executable}", "" if ok else "install Python 3.11")


@_never_raises("packages", "install the project: pip install -c constraints.txt -e .")
def check_versions() -> Check:
    """Every dependency is installed, at the version of constraints.txt where that is at hand."""
    pins = _pins()
    wrong, right = [], 0
    for line in importlib.metadata.requires("diccae") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            found = Version(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        # A local part (2.11.0+cu130) is the same release built for another device.
        if name in pins and Version(found.public) != pins[name]:
            wrong.append(f"{name} {found}, pinned {pins[name]}")
        elif not requirement.specifier.contains(found.public, prereleases=True):
            wrong.append(f"{name} {found}, wanted {requirement.specifier}")
        else:
            right += 1
    detail = "; ".join(wrong) if wrong else f"{right} as pinned"
    hint = "pip install -c constraints.txt -e ." if wrong else ""
    return Check("packages", not wrong, detail, hint)


def _pins() -> dict[str, Version]:
    """Versions of constraints.txt, which lies beside the packages in a checkout."""
    file = Path(__file__).parents[1] / "constraints.txt"
    if not file.exists():
        return {}
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)", file.read_text(), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in lines}


_DEVICES = """
import json, torch
names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([torch.__version__, [[p.name, p.total_memory] for p in names]]))
"""


@_never_raises("devices", "reinstall torch: pip install -c constraints.txt --force-reinstall torch")
def check_devices() -> Check:
    """GPUs that torch can use; a driver that torch cannot use is a failure, a CPU is not."""
    version, gpus = json.loads(_run(_DEVICES, 120))
    cpus = len(os.sched_getaffinity(0))
    if gpus:
        names = ", ".join(f"{name} ({memory / 2**30:.0f} GiB)" for name, memory in gpus)
        return Check("devices", True, f"torch {version}, {len(gpus)} GPU: {names}, {cpus} CPUs")
    if (
        shutil.which("nvidia-smi")
        and not subprocess.run(["nvidia-smi"], capture_output=True).returncode
    ):
        hint = "the driver is older than torch's CUDA: update it, or run on the CPU"
        return Check("devices", False, f"an NVIDIA GPU that torch {version} cannot use", hint)
    return Check("devices", True, f"torch {version}, no GPU, {cpus} CPUs")


_BLAS = """
import json, numpy, faiss, threadpoolctl
found = [i for i in threadpoolctl.threadpool_info() if i["internal_api"] == "openblas"]
print(json.dumps([[i["filepath"], i["version"], i["architecture"]] for i in found]))
"""
_NO_AVX = {
    "Barcelona",
    "Core2",
    "Nehalem",
    "Prescott",
    "generic",
    "Penryn",
    "Dunnington",
    "Opteron",
}


@_never_raises(
    "blas", "reinstall numpy and faiss: pip install -c constraints.txt --force-reinstall"
)
def check_blas() -> Check:
    """Which kernels OpenBLAS chose: an old copy may not know this CPU and be four times slower."""
    cores = json.loads(_run(_BLAS, 120))
    named = [f"{'faiss' if 'faiss' in path else 'numpy'} {arch}" for path, _, arch in cores]
    flags = _cpu_flags()
    hint = "export OPENBLAS_CORETYPE=SkylakeX (with AVX-512) or Haswell before starting Ray"
    if "avx2" in flags and any(arch in _NO_AVX for _, _, arch in cores):
        return Check("blas", False, f"{', '.join(named)} on a CPU with AVX2", hint)
    slower = "avx512f" in flags and any(arch in {"Haswell", "Zen"} for _, _, arch in cores)
    return Check(
        "blas", True, ", ".join(named), f"clustering may gain 2x: {hint}" if slower else ""
    )


def _cpu_flags() -> set[str]:
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return set(found.group(1).split()) if found else set()


_CODECS = ("h264", "hevc", "vp9", "av1", "aac")


@_never_raises("codecs", "reinstall PyAV: pip install -c constraints.txt --force-reinstall av")
def check_codecs() -> Check:
    """The ffmpeg inside PyAV decodes what clips come in."""
    import av

    missing = [name for name in _CODECS if not _has_decoder(name)]
    version = ".".join(map(str, av.library_versions["libavcodec"]))
    detail = f"PyAV {av.__version__}, libavcodec {version}: "
    detail += f"no {', '.join(missing)}" if missing else ", ".join(_CODECS)
    hint = "use PyAV's own wheel, not one built against a reduced ffmpeg" if missing else ""
    return Check("codecs", not missing, detail, hint)


def _has_decoder(name: str) -> bool:
    import av

    try:
        return bool(av.codec.Codec(name, "r"))
    except av.FFmpegError:
        return False


_DECORD = """
import sys, tempfile, av, decord, numpy as np
worked = []
for codec in ("libx264", "libx265", "libvpx-vp9", "libsvtav1"):
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        with av.open(file.name, "w") as out:
            video = out.add_stream(codec, rate=12, options={"x265-params": "log-level=none"})
            video.width = video.height = 128
            video.pix_fmt = "yuv420p"
            for i in range(6):
                image = np.full((128, 128, 3), 40 * i, np.uint8)
                out.mux(video.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            out.mux(video.encode())
        try:
            if len(decord.VideoReader(file.name)) == 6:
                worked.append(codec)
        except Exception:
            pass
print(decord.__version__, *worked)
"""
_CODEC_OF = {"libx264": "h264", "libx265": "hevc", "libvpx-vp9": "vp9", "libsvtav1": "av1"}


@_never_raises("decord", "reinstall decord, or ingest with --features.decoder pyav (slower)")
def check_decord() -> Check:
    """What decord's own ffmpeg decodes, tried on clips made here; PyAV takes the rest."""
    version, *worked = _run(_DECORD, 120, env={"SVT_LOG": "0"}).split()
    names = [_CODEC_OF[name] for name in worked]
    if "h264" not in names:
        hint = "reinstall decord, or ingest with --features.decoder pyav (slower)"
        return Check("decord", False, f"decord {version} cannot decode h264", hint)
    rest = [name for name in _CODEC_OF.values() if name not in names]
    through = f"; through PyAV: {', '.join(rest)}" if rest else ""
    return Check("decord", True, f"decord {version}: {', '.join(names)}{through}")


def check_shared_memory() -> Check:
    """Room for Ray's object store in /dev/shm; without it Ray falls back to disk."""
    free_mb = shutil.disk_usage("/dev/shm").free / 2**20 if os.path.isdir("/dev/shm") else 0.0
    ok = free_mb >= _SHM_MB
    hint = "" if ok else "in Docker: --shm-size=2g; in Kubernetes: an emptyDir of medium Memory"
    return Check("shared memory", ok, f"{free_mb:.0f} MB free in /dev/shm", hint)


def check_ray_folder() -> Check:
    """A folder that Ray can put sockets in: writable, and its path short enough."""
    folder = os.environ.get("RAY_TMPDIR") or "/tmp"
    longest = len(folder) + len(_RAY_SOCKET)
    writable = os.access(folder, os.W_OK | os.X_OK)
    ok = writable and longest <= _SOCKET_PATH
    problem = "" if writable else ", not writable"
    if longest > _SOCKET_PATH:
        problem += f", {longest - _SOCKET_PATH} characters too long for a socket"
    hint = "" if ok else "set RAY_TMPDIR to a short folder you may write to, such as /tmp/$USER"
    return Check("ray folder", ok, folder + problem, hint)


@_never_raises("ray token", "see the message; unset RAY_AUTH_TOKEN_PATH or name a readable file")
def check_token() -> Check:
    """Whether the token a cluster may ask for is here; a machine without one is no failure."""
    from deploy.submit import find_token

    mode = os.environ.get("RAY_AUTH_MODE", "unset")
    token, source = find_token()
    if token:
        return Check("ray token", True, f"from {source}; RAY_AUTH_MODE {mode}")
    if mode == "token":
        hint = "ray get-auth-token --generate, or set RAY_AUTH_TOKEN"
        return Check("ray token", False, "RAY_AUTH_MODE=token and no token", hint)
    return Check("ray token", True, "none here; needed only for clusters that ask for one")


_RAY = """
import sys, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
         object_store_memory=80 * 2**20, _temp_dir=sys.argv[1])
print(ray.__version__, ray.get(ray.remote(num_cpus=1)(lambda: 6 * 7).remote()))
"""


@_never_raises(
    "ray start", "read the log in RAY_TMPDIR; often memory, /dev/shm or a firewall on lo"
)
def check_ray_start() -> Check:
    """An embedded Ray starts, runs a task and stops, in a child process and a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="ddr", ignore_cleanup_errors=True) as folder:
        # With a token of its own it does not write one to the user's home.
        version, answer = _run(_RAY, 120, folder, env={"RAY_AUTH_TOKEN": "0" * 64}).split()
    return Check("ray start", answer == "42", f"Ray {version} started, ran a task and stopped")


@_never_raises("disk", "free some space")
def check_disk(store: str | None) -> Check:
    """Room where runs, temporary files and a local store are written."""
    places = [os.getcwd(), tempfile.gettempdir()]
    if store and "://" not in store:
        near = Path(store).absolute()
        places.append(str(next(p for p in (near, *near.parents) if p.exists())))
    by_device: dict[int, list[str]] = {}
    for place in dict.fromkeys(places):
        by_device.setdefault(os.stat(place).st_dev, []).append(place)
    found, low = [], []
    for here in by_device.values():
        free = shutil.disk_usage(here[0]).free / 1e9
        found.append(f"{free:.0f} GB free in {', '.join(here)}")
        low += here if free < _FREE_GB else []
    hint = f"make room in {', '.join(low)}: less than {_FREE_GB:.0f} GB is left" if low else ""
    return Check("disk", not low, "; ".join(found), hint)


@_never_raises("store", "check the URI and your keys (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...)")
def check_store(uri: str) -> Check:
    """The feature store can be opened and its clips table read."""
    from pipeline.store.store import FeatureStore

    snapshot = FeatureStore.open(uri).snapshot()
    rows = snapshot.rows(None)
    return Check(
        "store", True, f"{uri}: version {snapshot.version}, {len(rows)} clips with features"
    )


@_never_raises("mlflow", "start it (deploy/mlflow), or leave tracking.uri out for a local file")
def check_mlflow(uri: str) -> Check:
    """The MLflow server answers, or the database file can be used."""
    if uri.startswith(("http://", "https://")):
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10) as answer:
            body = answer.read(100).decode(errors="replace").strip()
        ok = body == "OK"
        hint = "" if ok else "something else answers here: check host and port"
        return Check("mlflow", ok, f"{uri}: {body or 'empty answer'}", hint)
    if not uri.startswith("sqlite:///"):
        return Check("mlflow", True, f"{uri}: not tried; MLflow opens it when a run starts")
    file = Path(uri.removeprefix("sqlite:///"))
    folder = file.parent if file.parent.is_dir() else Path.cwd()
    ok = os.access(file if file.exists() else folder, os.W_OK)
    state = "exists" if file.exists() else "will be made"
    hint = "" if ok else f"make {folder} writable or choose another tracking.uri"
    return Check("mlflow", ok, f"{file} {state}", hint)


@_never_raises("cluster", "see the message")
def check_cluster(address: str) -> Check:
    """The job server of a cluster lets us in, and runs this Ray."""
    from deploy.submit import connect

    cluster = connect(address)
    ours = importlib.metadata.version("ray")
    ok = cluster.ray_version == ours
    hint = "" if ok else "use images built from this constraints.txt (deploy/Dockerfile)"
    auth = "token accepted" if cluster.headers else "no token asked"
    return Check(
        "cluster", ok, f"{cluster.url}: Ray {cluster.ray_version}, here {ours}; {auth}", hint
    )
