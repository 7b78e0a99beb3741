"""chosen_variants: which ways to train an ablation compares, and the config of each.

Knows nothing of how they are trained. Invariant: every change is refused by the config's own rules,
with the key named, before anything is trained.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from diccae.config import RunConfig, explain, laid_over
from diccae.errors import UsageError
from training.evaluation.variants import DEFAULT_VARIANTS, VARIANTS, Variant

WARMUP = "warmup"
"""Folder of a seed's warm-up, beside those of its variants."""


def chosen_variants(
    names: Sequence[str], file: str | None, sweeps: Sequence[str], sweep_of: Sequence[str]
) -> dict[str, Variant]:
    """Variants by name: the named ones, then those of the file, then the points of the sweeps.

    Args: names: if none, with neither a file nor a sweep, DEFAULT_VARIANTS. file: a YAML file of
    `name: {section: {key: value}}`; all of it unless some of it is named. sweeps, sweep_of: see
    `swept`.
    Raises: UsageError for an unknown name, or a file that does not hold variants.
    """
    own = {} if file is None else _own_variants(file)
    known = {**VARIANTS, **own}
    unknown = [name for name in (*names, *sweep_of) if name not in known]
    if unknown:
        where = "; --variants-file can hold others" if file is None else ""
        raise UsageError(f"no variant {', '.join(unknown)}; there are {', '.join(known)}{where}")
    if not names and file is None and not sweeps:
        names = DEFAULT_VARIANTS
    if own.keys().isdisjoint(names):
        names = [*names, *own]
    swept_variants = {name: known[name] for name in sweep_of}
    return {name: known[name] for name in names} | swept(sweeps, swept_variants)


def _own_variants(file: str) -> dict[str, Variant]:
    try:
        content = yaml.safe_load(Path(file).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: not readable as YAML: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise UsageError(f"{file}: expected NAME: {{section: {{key: value}}}} for each variant")
    for name in map(str, content):
        if name in VARIANTS or name == WARMUP or not re.fullmatch(r"[\w-]+", name):
            raise UsageError(
                f"{file}: variant {name!r}: a name is letters, digits, _ and -, and none of "
                f"{', '.join([*VARIANTS, WARMUP])}"
            )
    return {str(name): Variant(f"of {Path(file).name}", c) for name, c in content.items()}


def variant_config(config: RunConfig, name: str, variant: Variant, seed: int) -> RunConfig:
    """The recipe with a variant's changes. Raises: UsageError naming the key that is wrong."""
    content = laid_over(config, {"seed": seed, **variant.changes})
    try:
        made = RunConfig.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"variant {name}: {explain(error, RunConfig)}") from None
    if made.encoder.init is None:
        return made
    init = made.encoder.init.replace("{seed}", str(seed))
    return made.model_copy(update={"encoder": made.encoder.model_copy(update={"init": init})})


def swept(sweeps: Sequence[str], variants: Mapping[str, Variant]) -> dict[str, Variant]:
    """One variant for each value of each sweep and each variant that is swept.

    Args: sweeps: `section.key=value,value,...`. variants: their other changes stay.
    Raises: UsageError for a sweep that is not one.
    """
    made: dict[str, Variant] = {}
    for sweep in sweeps:
        key, _, values = sweep.partition("=")
        path = key.split(".")
        if len(path) < 2 or not all(path) or not values:
            raise UsageError(
                f"--sweep {sweep}: expected section.key=value,value,... such as "
                "confusion.gamma=0,0.5,1,2"
            )
        for name, variant in variants.items():
            for value in values.split(","):
                changes = _with(variant.changes, path, yaml.safe_load(value))
                question, dose = f"{name}, {key} = {value}", (name, key, value)
                made[point_name(name, key, value)] = Variant(question, changes, dose)
    return made


def point_name(name: str, key: str, value: str) -> str:
    """What a point of a sweep is called, and its folder."""
    return f"{'' if name == 'full' else f'{name}@'}{key}={re.sub(r'[^-+.,A-Za-z0-9_]', '_', value)}"


def _with(changes: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """The changes with one more, at a dotted place."""
    first, *rest = path
    if not rest:
        return {**changes, first: value}
    return {**changes, first: _with(changes.get(first, {}), rest, value)}
