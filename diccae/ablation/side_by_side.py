"""run_side_by_side: the runs of an ablation in processes of this machine, without Ray.

Composes `Runs` with the lab; knows nothing of losses. Invariant: a run gives the bits it gives on
Ray with one worker, whatever runs beside it.
"""

import shutil
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from diccae.ablation.processes import Work, run_all
from diccae.ablation.runs import Finished, Runs, measured_of
from diccae.ablation.variants import WARMUP
from diccae.run_folder import RunFolder
from diccae.screen import clock, say
from diccae.stages.backend import InLab
from diccae.stages.quality import run_fbank_stats
from diccae.stages.run_record import Say
from pipeline.cores import usable_cores
from pipeline.storage import Location
from pipeline.store.store import FeatureStore
from training.errors import TrainingError
from training.lab.features import decode_store, open_features
from training.lab.lab import Lab

_HAVE = ("diccae.ablation.side_by_side", "training.on_ray.evaluate", "torch._dynamo", "faiss")
"""What a run imports: the server that its process is forked from has it already. The first
optimiser of a process imports torch._dynamo."""


class SideBySide(NamedTuple):
    """What came of the runs."""

    done: list[Finished]
    failed: dict[str, str]
    """Why, by `seed-0/full`; their folders stay, and the same command tries them again."""


def run_side_by_side(runs: Runs, n_processes: int, say: Say) -> SideBySide:
    """Run what is not done yet, `n_processes` at a time.

    Raises: TrainingError if no run is done in the end, or the features do not fit into memory.
    """
    works = _works(runs)
    failed = _run(runs, works, n_processes, say) if works else {}
    done = [
        runs.finished(name, seed)
        for seed in runs.plan.seeds
        for name in runs.plan.variants
        if runs.is_done(name, seed)
    ]
    if not done:
        raise TrainingError(
            f"no run was finished; {'; '.join(f'{k}: {w}' for k, w in failed.items())}"
        )
    return SideBySide(done, failed)


def test_side_by_side(runs: Runs, done: list[Finished], n_processes: int, say: Say) -> SideBySide:
    """Measure finished runs on the test clips, once each."""
    on_test = runs.on_test()
    works = [
        Work(
            f"seed-{run.seed}/{run.variant}",
            None,
            partial(_test_in_process, runs, run.variant, run.seed),
            Path(on_test.folder(run.seed, run.variant).place.path),
        )
        for run in done
        if not on_test.is_done(run.variant, run.seed)
    ]
    failed = _run(runs, works, n_processes, say) if works else {}
    measured = [
        on_test.finished(run.variant, run.seed)
        for run in done
        if on_test.is_done(run.variant, run.seed)
    ]
    if not measured:
        raise TrainingError(f"no run was measured on the test clips: {failed}")
    return SideBySide(measured, failed)


def _works(runs: Runs) -> list[Work]:
    """Warm-ups first, then variants seed by seed."""
    warmups: dict[int, Work] = {}
    variants: list[Work] = []
    for seed in runs.plan.seeds:
        for name in runs.plan.variants:
            if runs.is_done(name, seed):
                continue
            after = None
            if runs.waits_for_warmup(name, seed):
                work = _work(runs, WARMUP, seed)
                warmups[seed], after = work, work.key
            variants.append(_work(runs, name, seed)._replace(after=after))
    return [*warmups.values(), *variants]


def _work(runs: Runs, name: str, seed: int) -> Work:
    folder = Path(runs.folder(seed, name).place.path)
    return Work(f"seed-{seed}/{name}", None, partial(_in_process, runs, name, seed), folder)


def _in_process(runs: Runs, name: str, seed: int) -> None:
    """What a process does: one run, or a seed's warm-up."""
    if name == WARMUP:
        runs.warm_up(seed, _lab(runs), say)
    else:
        runs.train(name, seed, _lab(runs), say)


def _test_in_process(runs: Runs, name: str, seed: int) -> None:
    runs.measure_test(name, seed, _lab(runs), say)


def _lab(runs: Runs) -> InLab:
    snapshot = FeatureStore.open(runs.store).snapshot(runs.config.data.version)
    return InLab(Lab(open_features(_features(runs.out), snapshot.spec)))


def _run(runs: Runs, works: list[Work], n_processes: int, say: Say) -> dict[str, str]:
    started, ended = time.monotonic(), 0
    snapshot = FeatureStore.open(runs.store).snapshot(runs.config.data.version)
    decode_store(snapshot, _features(runs.out))
    if runs.config.data.given_statistics is None:
        run_fbank_stats(snapshot, "train")  # Once, here: each run would look for them.
    seconds = time.monotonic() - started
    say(
        f"ablate    {len(works)} runs, {n_processes} at a time; features decoded in {seconds:.0f} s"
    )
    n_threads, n_cores = runs.config.scale.n_threads, usable_cores()
    if n_processes > 1 and n_processes * n_threads > n_cores:
        say(
            f"ablate    {n_processes} processes of {n_threads} threads share {n_cores} cores, and "
            "their threads wait for each other: --scale.threads-per-worker "
            f"{max(1, n_cores // n_processes)} is several times faster, with other last digits"
        )
    started = time.monotonic()

    def tell(work: Work, why: str) -> None:
        nonlocal ended
        ended += 1
        left = clock((time.monotonic() - started) / ended * (len(works) - ended))
        outcome = f"FAILED: {why}" if why else _shown(RunFolder(work.folder), runs.plan.metric)
        say(f"ablate    {ended}/{len(works)} {work.key}: {outcome}, left {left}")

    failed = run_all(works, n_processes, _HAVE, tell)
    if not failed:
        shutil.rmtree(_features(runs.out))  # A gigabyte that is decoded again in half a minute.
    return failed


def _shown(folder: RunFolder, metric: str) -> str:
    value = measured_of(folder).get(metric)
    return "done" if value is None else f"{metric} {100 * value:.1f}"


def _features(out: Location) -> Path:
    return Path(out.join("features"))
