"""`diccae render`: the manifests of a cluster that runs one command."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from diccae.args import Options, config_in, split_at_command
from diccae.config import SHIPPED, RunConfig, explain
from diccae.errors import ResourceError, UsageError
from diccae.screen import say
from diccae.subcommands import module_of
from pipeline.passwords import without_passwords

if TYPE_CHECKING:
    from deploy.config import ClusterConfig
    from diccae.resources import Demand

_IN_THE_IMAGE = "/app/configs/"
"""Where the images hold the shipped configs, which are here, too."""


@dataclass(frozen=True)
class RenderArgs:
    """Write manifests for KubeRay and `ray up`; refuse a command that their groups cannot hold.

    Everything after `--` is the command: diccae render --out DIR -- pretrain --config FILE ...
    """

    out: str
    """Folder for the manifests."""
    config: str | None = None
    """YAML of deploy.config.ClusterConfig; default: its own."""
    name: str | None = None
    """Name of the job and its cluster, another for each stage; default: the config's."""


OPTIONS = Options("render", RenderArgs)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options, command = split_at_command(argv)
    args = OPTIONS.parse(options)
    from deploy.render import write_manifests

    config = _cluster(args.config, command, args.name)
    if not config.command:
        raise UsageError(
            "nothing to run; end the line with: -- pretrain --store s3://... --out s3://... "
            f"--config {_IN_THE_IMAGE}vggsound.yaml"
        )
    _refuse_passwords(config)
    refuse_what_never_fits(config)
    for path in write_manifests(config, args.out):
        print(path)
    return 0


def _refuse_passwords(config: "ClusterConfig") -> None:
    """Raises: UsageError for a URL with a password: manifests are kept where others read them."""
    words = {f"env {key}": value for key, value in config.env.items()}
    words |= {"the command": " ".join(config.command)}
    for where, text in words.items():
        if without_passwords(text) != text:
            raise UsageError(
                f"{where}: {without_passwords(text)} holds a password, and manifests are no place "
                "for one: leave it out of the URL, and put MLFLOW_TRACKING_USERNAME and "
                f"MLFLOW_TRACKING_PASSWORD into the secret {config.storage_secret}"
            )


def _cluster(path: str | None, command: Sequence[str], name: str | None) -> "ClusterConfig":
    from deploy.config import ClusterConfig, read_config

    try:
        return read_config(path, command, name)
    except ValidationError as error:
        raise UsageError(f"{path or 'the command'}: {explain(error, ClusterConfig)}") from None


def refuse_what_never_fits(config: "ClusterConfig") -> None:
    """Compare the command with all the nodes its groups can have; say so if it leaves GPUs idle.

    Raises: ResourceError, in one line: the job would only say so after its cluster was built.
    """
    from deploy.render import maxima
    from diccae.resources import left_over, nodes_of

    demands = demands_of(config.command)
    if demands is None:
        return
    _say_if_gpus_idle(config, demands)
    groups = maxima(config)
    if missing := left_over(demands, nodes_of(groups)):
        lacking = ", ".join(
            f"{d.n} of the {d.part} ({d.cpus:g} CPU, {d.gpus:g} GPU each"
            f"{', not on nodes that train' * d.keeps_off})"
            for d in missing
        )
        has = " and ".join(
            f"{g['role']} {g['nodes']} x ({g['cpus']} CPU, {g['gpus']} GPU)" for g in groups
        )
        raise ResourceError(
            f"{config.command[0]} can never run on these groups: at most {has}, and there is no "
            f"room for {lacking}; raise max_nodes, cpus or gpus of a group, or lower "
            "scale.num_workers, scale.cpus_per_worker or pool.n_actors"
        )


def _say_if_gpus_idle(config: "ClusterConfig", demands: Sequence["Demand"]) -> None:
    has = config.train.gpus * config.train.max_nodes
    if has and not any(demand.gpus for demand in demands):
        say(
            f"warning: {config.command[0]} asks for no GPU (scale.use_gpu), and group train-gpu "
            f"has up to {has}: name a config that does, such as --config "
            f"{_IN_THE_IMAGE}vggsound.yaml, or set train.gpus to 0"
        )


def demands_of(command: Sequence[str]) -> list["Demand"] | None:
    """What `diccae <command>` reserves when it has most; None for a command that takes what there
    is, or whose config is not on this machine (that of a run, or a file of the image's own).

    Raises: UsageError, SystemExit(2) for a command line that the job would refuse, too.
    """
    name, argv = command[0], [_here(word) for word in command[1:]]
    options: Options[Any] = module_of(name).OPTIONS
    named, given = config_in(command[1:]), config_in(argv)
    if given is not None and given == named and "://" not in given:
        say(
            f"--config {given}: a job brings no files, so its image must hold this one; the "
            f"shipped configs are in {_IN_THE_IMAGE}, one of your own can be in a bucket"
        )
    if given is not None and not Path(given).exists():
        say(f"not compared with the groups: {name}, whose config is not on this machine")
        return None
    args = options.parse(argv)
    if name not in _DEMANDS or (given is None and name in _RUNS_OWN):
        return None
    return _DEMANDS[name](args)


def _here(word: str) -> str:
    """A path of the image as one of this machine, where the shipped configs hold it."""
    option, equals, value = word.rpartition("=")
    shipped = SHIPPED / value.removeprefix(_IN_THE_IMAGE)
    if value.startswith(_IN_THE_IMAGE) and not Path(value).exists() and shipped.exists():
        return f"{option}{equals}{shipped}"
    return word


def _training(args: Any) -> list["Demand"]:
    from diccae.resources import training_demands

    config: RunConfig = args.run
    labels = config.rounds.labels != "none"
    return training_demands(config, config.pool.groups(config.clustering) if labels else None)


def _fine_tuning(args: Any) -> list["Demand"]:
    from diccae.resources import training_demands

    return training_demands(args.run, None)


def _embedding(args: Any) -> list["Demand"]:
    from diccae.resources import inference_demands

    return inference_demands(args.run.scale)


_DEMANDS: dict[str, Callable[[Any], list["Demand"]]] = {
    "pretrain": _training,
    "finetune": _fine_tuning,
    "embed": _embedding,
}
_RUNS_OWN = ("finetune",)
"""Commands whose config is that of their run, unless one is given."""
