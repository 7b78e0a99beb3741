"""Checks of what is installed: Python, the packages, torch's devices, BLAS kernels, codecs.

Knows nothing of stores or clusters.
"""

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from diccae.doctor import child
from diccae.doctor.check import Check, never_raises
from pipeline.cores import usable_cores
from pipeline.decode import choice


def check_python() -> Check:
    """Python 3.11, the only one that all dependencies have wheels for."""
    found = platform.python_version()
    ok = sys.version_info[:2] == (3, 11)
    return Check("python", ok, f"{found} at {sys.executable}", "" if ok else "install Python 3.11")


@never_raises("packages", "install the project: pip install -c constraints.txt -e .")
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
    file = Path(__file__).parents[2] / "constraints.txt"
    if not file.exists():
        return {}
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)", file.read_text(), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in lines}


DEVICES = """
import json, torch
names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([torch.__version__, [[p.name, p.total_memory] for p in names]]))
"""


@never_raises("devices", "reinstall torch: pip install -c constraints.txt --force-reinstall torch")
def check_devices() -> Check:
    """GPUs that torch can use; a driver that torch cannot use is a failure, a CPU is not."""
    version, gpus = json.loads(child.run(DEVICES, 120))
    cpus = usable_cores()
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


@never_raises("blas", "reinstall numpy and faiss: pip install -c constraints.txt --force-reinstall")
def check_blas() -> Check:
    """Which kernels OpenBLAS chose: an old copy may not know this CPU and be four times slower."""
    cores = json.loads(child.run(_BLAS, 120))
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


@never_raises("codecs", "reinstall PyAV: pip install -c constraints.txt --force-reinstall av")
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


@never_raises("decord", "reinstall decord, or ingest with --features.decoder pyav (slower)")
def check_decord() -> Check:
    """What decord's own ffmpeg decodes, tried on clips made here; PyAV takes the rest."""
    if not choice.has_decord() and platform.machine() != "x86_64":
        here = f"no wheel for {platform.machine()}: PyAV decodes all, features.decoder = pyav"
        return Check("decord", True, here)
    version, *worked = child.run(_DECORD, 120, env={"SVT_LOG": "0"}).split()
    names = [_CODEC_OF[name] for name in worked]
    if "h264" not in names:
        hint = "reinstall decord, or ingest with --features.decoder pyav (slower)"
        return Check("decord", False, f"decord {version} cannot decode h264", hint)
    rest = [name for name in _CODEC_OF.values() if name not in names]
    through = f"; through PyAV: {', '.join(rest)}" if rest else ""
    return Check("decord", True, f"decord {version}: {', '.join(names)}{through}")
