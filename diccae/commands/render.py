"""`diccae render`: the manifests of a cluster that runs one command."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diccae.args import parse
from diccae.config import SHIPPED, RunConfig
from diccae.errors import ResourceError
from diccae.screen import say

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


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options, command = list(argv), []
    if "--" in options:
        cut = options.index("--")
        options, command = options[:cut], options[cut + 1 :]
    args = parse("render", RenderArgs, options)
    from deploy.config import read_config
    from deploy.render import write_manifests

    config = read_config(args.config, command)
    refuse_what_never_fits(config)
    for path in write_manifests(config, args.out):
        print(path)
    return 0


def refuse_what_never_fits(config: "ClusterConfig") -> None:
    """Compare the command with all the nodes its groups can have.

    Raises: ResourceError, in one line: the job would only say so after its cluster was built.
    """
    from deploy.render import maxima
    from diccae.resources import left_over, nodes_of

    demands = demands_of(config.command)
    if demands is None:
        say(f"not compared with the groups: {config.command[0]}, whose config is not known here")
        return
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


def demands_of(command: Sequence[str]) -> list["Demand"] | None:
    """What `diccae <command>` reserves when it has most; None for a command that takes what there
    is, or whose config is not on this machine (that of a run, or a file of the image's own).

    Raises: UsageError, SystemExit(2) for a command line that the job would refuse, too.
    """
    name, argv = command[0], [_here(word) for word in command[1:]]
    given = _value_of(argv, "--config")
    if name not in _DEMANDS or (given is not None and not Path(given).exists()):
        return None
    if given is None and name in _RUNS_OWN:
        return None
    return _DEMANDS[name](argv)


def _here(word: str) -> str:
    """A path of the image as one of this machine, where the shipped configs hold it."""
    option, equals, value = word.rpartition("=")
    shipped = SHIPPED / value.removeprefix(_IN_THE_IMAGE)
    if value.startswith(_IN_THE_IMAGE) and not Path(value).exists() and shipped.exists():
        return f"{option}{equals}{shipped}"
    return word


def _value_of(argv: Sequence[str], option: str) -> str | None:
    for i, word in enumerate(argv):
        if word == option:
            return argv[i + 1] if i + 1 < len(argv) else None
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _pretraining(config: RunConfig) -> list["Demand"]:
    from diccae.resources import training_demands

    labels = config.rounds.labels != "none"
    return training_demands(config, config.pool.groups(config.clustering) if labels else None)


def _pretrain(argv: Sequence[str]) -> list["Demand"]:
    from diccae.commands.pretrain import SECTIONS, PretrainArgs

    return _pretraining(parse("pretrain", PretrainArgs, argv, SECTIONS).run)


def _finetune(argv: Sequence[str]) -> list["Demand"]:
    from diccae.commands.finetune import FinetuneArgs
    from diccae.resources import training_demands

    args = parse("finetune", FinetuneArgs, argv, ("finetune", "scale", "data"))
    return training_demands(args.run, None)


def _embed(argv: Sequence[str]) -> list["Demand"]:
    from diccae.commands.embed import EmbedArgs
    from diccae.stages.evaluate import inference_demands

    args = parse("embed", EmbedArgs, argv, ("data", "evaluate", "scale"))
    return inference_demands(args.run.scale)


_DEMANDS: dict[str, Callable[[Sequence[str]], list["Demand"]]] = {
    "pretrain": _pretrain,
    "finetune": _finetune,
    "embed": _embed,
}
_RUNS_OWN = ("finetune",)
"""Commands whose config is that of their run, unless one is given."""
