"""Command lines to typed arguments: `--config FILE` first, then `--section.key value` on top.

Knows nothing of what a command does with them. Invariant: a value that a config file would refuse
is refused on the command line too, with exit code 2.
"""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import tyro
from pydantic import BaseModel, ValidationError, create_model

from deploy.command_line import values_of
from diccae.config import RunConfig, explain, laid_over, load_config
from diccae.errors import UsageError

Args = TypeVar("Args")


@dataclasses.dataclass(frozen=True)
class Options(Generic[Args]):
    """What a command can be told."""

    command: str
    arguments: type[Args]
    """Dataclass of its options. A field named `run` holds the config: the file named by `--config`,
    with `--section.key value` of the command line on top."""
    sections: Sequence[str] | None = None
    """The only parts of the config it has options for; None: all."""

    def parse(
        self, argv: Sequence[str], base: Callable[[Args], RunConfig | None] | None = None
    ) -> Args:
        """The command line as `arguments`.

        Args: base: the config that the options go on top of instead, where that hangs on other
            arguments (a store's own spec, a run's own config); None leaves it at `--config`.
        Raises: UsageError for a value out of range; SystemExit(2) for a malformed command line.
        """
        command, arguments = self.command, self.arguments
        try:
            if not any(field.name == "run" for field in dataclasses.fields(arguments)):  # type: ignore[arg-type]
                return _cli(arguments, command, argv)
            names = list(RunConfig.model_fields if self.sections is None else self.sections)
            named = load_config(config_in(argv))
            parsed = _on_top(named, command, arguments, argv, names)
            under = base(parsed) if base is not None else None
            # The same options are read on top of the other config: each of them still counts.
            return parsed if under is None else _on_top(under, command, arguments, argv, names)
        except ValidationError as error:
            raise UsageError(explain(error, RunConfig)) from None


def _on_top(
    base: RunConfig, command: str, arguments: type[Args], argv: Sequence[str], names: list[str]
) -> Args:
    presets = values_of(argv, "--encoder.preset")
    if presets:
        # Before tyro fills in what is not given: it cannot tell that from what `base` says.
        change = {"encoder": {"preset": presets[-1]}}
        base = RunConfig.model_validate(laid_over(base, change))
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
    words = _gathered(argv, set(_of_any_number(get_type_hints(arguments))))
    shown = _with_own_switches_single(arguments)

    def parsed() -> Args:
        return tyro.cli(
            shown,
            args=words,
            prog=f"diccae {command}",
            config=(tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues),
        )

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return parsed()
    except SystemExit as stopped:
        _refuse_out_of_range(stopped)
        if not stopped.code:
            raise
    return parsed()  # Again and aloud: what is malformed tyro tells best itself.


def _with_own_switches_single(arguments: type[Args]) -> type[Args]:
    """The arguments with one spelling for each switch of the command itself, which is off at first.

    A key of the config keeps two, `--section.key` and `--section.no-key`: the words are read before
    the config is known that they go on top of, and any of its keys may be on or off there.
    """
    kinds = get_type_hints(arguments)
    own: dict[str, Any] = {
        field.name: field.default
        for field in dataclasses.fields(arguments)  # type: ignore[arg-type]
        if kinds[field.name] is bool
    }
    own["__annotations__"] = {name: tyro.conf.FlagCreatePairsOff[bool] for name in own}
    own["__doc__"] = arguments.__doc__
    single: Any = type(arguments.__name__, (arguments,), own)
    return dataclasses.dataclass(frozen=True)(single)


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


def refuse_negative_seed(seed: int) -> None:
    """Of a command whose seed is no key of the config. Raises: UsageError."""
    if seed < 0:
        raise UsageError(f"--seed = {seed}: 0 or more")


def split_at_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first `--`, and those after it, which a job runs; none without it."""
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]


def config_in(words: Sequence[str]) -> str | None:
    """The file that a command line names with `--config`."""
    found = values_of(words, "--config")
    return found[-1] if found else None


def _gathered(argv: Sequence[str], several: Collection[str]) -> list[str]:
    """A repeated option of any number of values as one with all of them: `--env A --env B` as
    `--env A B`, of which tyro would take B alone."""
    kept: list[str] = []
    values: dict[str, list[str]] = {}
    taking: list[str] | None = None
    for word in argv:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") in several:
            name = name.replace("_", "-")
            taking = values.setdefault(name, [])
            taking.extend([value] if equals else [])
        elif word.startswith("--"):
            taking = None
            kept.append(word)
        else:
            (kept if taking is None else taking).append(word)
    return kept + [word for name, given in values.items() for word in (name, *given)]


def _of_any_number(fields: Mapping[str, Any], prefix: str = "--") -> Iterator[str]:
    """Options that take any number of values, by the types of their fields."""
    for name, kind in fields.items():
        option = prefix + name.replace("_", "-")
        if get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis:
            yield option
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            inner = {key: field.annotation for key, field in kind.model_fields.items()}
            # Sections of the config are options as they are, without `run.` before them.
            yield from _of_any_number(inner, prefix if name == "run" else f"{option}.")
