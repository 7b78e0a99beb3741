"""The subcommands: what there is, and the file of each.

Imports none of them until one is asked for.
"""

import difflib
import importlib
from types import ModuleType

from diccae.errors import UsageError

COMMANDS = {
    "demo": "generate clips, ingest, pretrain, fine-tune, evaluate, report: all of it, once",
    "synth": "write labelled clips in confusable pairs",
    "ingest": "raw clips -> feature store, only what is new or changed",
    "store": "status, versions, pins, failures, quality, stats, verify, compact, vacuum, export",
    "pretrain": "feature store -> encoder, with clustering rounds beside it",
    "finetune": "encoder -> classifier",
    "evaluate": "top-1, probes, retrieval, confusions -> results.json",
    "predict": "clips -> classes, how sure, what they are confused with; no store needed",
    "compare": "two runs, or a run and another project's predictions, clip by clip",
    "ablate": "what each part of DICCAE is worth: variants, seeds, paired differences",
    "weights": "published weights -> run, encoder or classifier -> CAV-MAE's layout",
    "embed": "feature store + encoder -> Parquet of vectors",
    "cluster": "exact distributed k-means over any Parquet of vectors",
    "register": "run -> MLflow's registry, as a model that others load and serve",
    "report": "run folder -> one HTML page",
    "submit": "run any of these as a job on a Ray cluster",
    "render": "manifests of a cluster that runs any of these (Kubernetes, cloud machines)",
    "jobs": "what runs on a cluster, and what ran there",
    "logs": "what a job says, while it runs and after",
    "stop": "end a job; what it has done is kept",
    "doctor": "check this machine, the cluster, the store and MLflow",
}


def module_of(name: str) -> ModuleType:
    """The file of a subcommand. Raises: UsageError if there is none of that name."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"no command {name!r}.{hint} Commands: {', '.join(COMMANDS)}")
    return importlib.import_module(f"diccae.commands.{name}")
