"""Checks of a config before its first GPU hour: its own sense, its memory, its place.

Composes what pretraining refuses, the budget of `--dry-run` and the table of who wants what; starts
nothing. Knows nothing of how a run goes. Invariant: what fails here would have failed, or waited
for ever, in the run.
"""

import json
from typing import NamedTuple

import psutil

from diccae.doctor import child
from diccae.doctor.check import Check, never_raises
from diccae.doctor.libraries import DEVICES
from pipeline.cores import usable_cores

_SLACK = 0.9
"""Share of a card's memory that a step may take: the rest is the allocator's, and CUDA's own."""
_CLASSES = 309
"""VGGSound's: a classifier of any other number is as small beside its encoder."""
_PER_NODE = "scale.num_workers, scale.cpus_per_worker, scale.reader_tasks or pool.n_actors"


@never_raises("recipe", "change the config as the message says")
def check_recipe(file: str, store: str | None, init: str | None) -> Check:
    """The config is one that pretraining would not refuse; with a store, on its clips."""
    from diccae.config import load_config
    from diccae.stages.statistics import spec_as_asked
    from training.data.order import BatchPlan
    from training.run.pinned import check, check_alone, pin

    config = load_config(file)
    if init is not None:
        encoder = config.encoder.model_copy(update={"init": init})
        config = config.model_copy(update={"encoder": encoder})
    batch_size = config.pretrain.batch_size
    plan = BatchPlan.of(batch_size, batch_size, config.data)
    check_alone(config)
    BatchPlan.of_finetuning(config.finetune.batch_size, config)
    rows = max(plan.rows_of_workers(config.scale.num_workers))
    detail = f"{file}: batches of {batch_size}, {rows} clips a worker"
    if store is None:
        return Check("recipe", True, f"{detail}; no --store to compare K and features with")
    spec_as_asked(file, config.data.version, store)
    data = pin(store, config.data.version, config)
    check(config, data)
    steps = BatchPlan.of(len(data.train), batch_size, config.data).steps(len(data.train))
    return Check("recipe", True, f"{detail}, {steps:,} steps an epoch of {store}")


@never_raises("memory", "see the message")
def check_memory(file: str, store: str | None) -> Check:
    """A step of pretraining and of fine-tuning fits the card, or on a CPU the machine."""
    from diccae.config import load_config
    from pipeline.store.store import FeatureStore
    from training.run.dry_run import fewest_workers, step_bytes

    config = load_config(file)
    spec = config.features
    if store is not None:
        spec = FeatureStore.open(store).snapshot(config.data.version).spec
    needed = step_bytes(config, spec, _CLASSES)
    told = f"pretraining {_gib(needed.pretrain)}, fine-tuning {_gib(needed.finetune)} a worker"
    most, workers = max(needed), fewest_workers(config.scale)
    if workers < config.scale.num_workers:
        told = f"with scale.min_workers = {workers}: {told}"
    if config.scale.use_gpu:
        card = _card(config.scale.gpu_memory_gib)
        if card is None:
            told = f"{told}; no GPU here to compare with: set scale.gpu_memory_gib in the config"
            return Check("memory", True, told)
        room, where = _SLACK * card.n_bytes, f"{_SLACK:.0%} of {card.what}"
    else:
        # Without GPUs all workers are on this machine, unless a cluster has others.
        there = psutil.virtual_memory().total
        room, where = there / workers, f"{_gib(there)} of memory here"
        told = f"{workers} workers: {told}"
    if most <= room:
        return Check("memory", True, f"{told}; {where}")
    hint = "set pretrain.micro_batch (cached gradients, the same result), lower batch_size"
    return Check("memory", False, f"{told}; {where}", f"{hint}, or use more workers")


class _Card(NamedTuple):
    n_bytes: float
    what: str
    """Its size and how that is known."""


def _card(given_gib: float | None) -> _Card | None:
    """The card a run has to fit: the one its config names, else the smallest here."""
    if given_gib is not None:
        return _Card(given_gib * 2**30, f"{given_gib:g} GiB (scale.gpu_memory_gib)")
    _, cards = json.loads(child.run(DEVICES, 120))
    if not cards:
        return None
    name, n_bytes = min(cards, key=lambda card: card[1])
    return _Card(n_bytes, f"the {_gib(n_bytes)} of this machine's {name}")


@never_raises("place", "see the message")
def check_place(file: str, address: str | None) -> Check:
    """Workers, readers and actors find a place on the cluster, or on this machine."""
    from diccae.config import load_config
    from diccae.resources import EMBEDDED_SPARE_CPUS, Node, embedded_cores, left_over, named
    from diccae.resources import training_demands as demands_of

    config = load_config(file)
    labels = config.rounds.labels != "none"
    demands = demands_of(config, config.pool.groups(config.clustering) if labels else None)
    if address:
        from deploy.connect import connect, nodes_of

        nodes = [Node(*node) for node in nodes_of(connect(address))]
        where = f"{len(nodes)} node(s) of {address}"
    else:
        _, cards = json.loads(child.run(DEVICES, 120))
        cores = embedded_cores() or usable_cores()
        nodes = [Node(float(cores + EMBEDDED_SPARE_CPUS), float(len(cards)))]
        where = "this machine"
    cpus, gpus = sum(d.n * d.cpus for d in demands), sum(d.n * d.gpus for d in demands)
    has = f"{sum(n.cpus for n in nodes):g} CPUs and {sum(n.gpus for n in nodes):g} GPUs"
    detail = f"needs {cpus:g} CPUs and {gpus:g} GPUs; {where}: {has}"
    missing = left_over(demands, nodes)
    if not missing:
        return Check("place", True, detail)
    lacking = named(missing, nodes)
    hint = f"lower {_PER_NODE}, add nodes, or name the cluster it is for with --address"
    return Check("place", False, f"{detail}: no room for {lacking}", hint)


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
