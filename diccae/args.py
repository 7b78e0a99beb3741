"""Command lines to typed arguments: `--config FILE` first, then `--section.key value` on top.

Knows nothing of what a command does with them. Invariant: a value that a config file would refuse
is refused on the command line too, with exit code 2.
"""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import tyro
from pydantic import ValidationError, create_model

from diccae.config import RunConfig, explain, load_config
from diccae.errors import UsageError

Args = TypeVar("Args")


def parse(
    command: str,
    arguments: type[Args],
    argv: Sequence[str],
    sections: Sequence[str] | None = None,
    base: Callable[[Args], RunConfig | None] | None = None,
) -> Args:
    """Parse `argv` into the dataclass `arguments`.

    A field named `run` holds the config: the file named by `--config`, with `--section.key value`
    of the command line on top.
    Args: sections: the only parts of the config this command has options for; None: all. base: the
        config that the options go on top of instead, where that hangs on other arguments (a store's
        own spec, a run's own config); None leaves it at `--config`.
    Raises: UsageError for a value out of range; SystemExit(2) for a malformed command line.
    """
    try:
        if not any(field.name == "run" for field in dataclasses.fields(arguments)):  # type: ignore[arg-type]
            return _cli(arguments, command, argv)
        names = list(sections) if sections is not None else list(RunConfig.model_fields)
        parsed = _on_top(load_config(_config_path(argv)), command, arguments, argv, names)
        under = base(parsed) if base is not None else None
        # The same options are read on top of the other config: each of them still counts.
        return parsed if under is None else _on_top(under, command, arguments, argv, names)
    except ValidationError as error:
        raise UsageError(explain(error, RunConfig)) from None


def _on_top(
    base: RunConfig, command: str, arguments: type[Args], argv: Sequence[str], names: list[str]
) -> Args:
    part = _part_of(base, names)
    shown: Any = dataclasses.dataclass(frozen=True)(
        type(
            arguments.__name__,
            (arguments,),
            {
                "__annotations__": {"run": Annotated[type(part), tyro.conf.arg(name="")]},
                "__doc__": arguments.__doc__,
                "run": dataclasses.field(default_factory=lambda: part),
            },
        )
    )
    parsed = _cli(shown, command, argv)
    chosen = {name: getattr(parsed.run, name) for name in names}
    whole = RunConfig.model_validate(base.model_copy(update=chosen).model_dump())
    values = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(arguments)}  # type: ignore[arg-type]
    return arguments(**{**values, "run": whole})


def _cli(arguments: type[Args], command: str, argv: Sequence[str]) -> Args:
    def parsed() -> Args:
        return tyro.cli(
            arguments,
            args=list(argv),
            prog=f"diccae {command}",
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
        )

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return parsed()
    except SystemExit as stopped:
        _refuse_out_of_range(stopped)
        if not stopped.code:
            raise
    return parsed()  # Again and aloud: what is malformed tyro tells best itself.


def _refuse_out_of_range(stopped: SystemExit) -> None:
    """Raises: UsageError if it was a value that its config class refuses; tyro knows no ranges and
    draws a box around pydantic's text."""
    section, cause = "", stopped.__context__
    while cause is not None and not isinstance(cause, ValidationError):
        section, cause = str(getattr(cause, "arg", section)), cause.__context__
    if cause is not None:
        raise UsageError(explain(cause, RunConfig, section.removeprefix("run."))) from None


def _part_of(base: RunConfig, names: Sequence[str]) -> Any:
    """The named fields of the config as a model of their own, holding the values of `base`."""
    fields: dict[str, Any] = {
        name: (RunConfig.model_fields[name].annotation, getattr(base, name)) for name in names
    }
    return create_model("Config", **fields).model_construct(**{n: getattr(base, n) for n in names})


def _config_path(argv: Sequence[str]) -> str | None:
    for i, arg in enumerate(argv):
        if arg == "--config" and i + 1 < len(argv):
            return argv[i + 1]
        if arg.startswith("--config="):
            return arg.removeprefix("--config=")
    return None
