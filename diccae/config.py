"""The root config: one YAML file describes a run from raw clips to report.

Composes the configs of the packages; holds no field of its own but the name.
Invariant: an unknown key is refused with the nearest known one named; what is saved with a run
loads to the same config.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from clustering.config import PoolConfig
from diccae.errors import UsageError
from pipeline.config import FeatureSpec, IngestConfig
from training.cluster_config import NOT_DECIDING
from training.config import TrainingConfig
from training.presets import with_sizes

SHIPPED = Path(__file__).resolve().parents[1] / "configs"
"""The recipes: beside the packages in a checkout, and in a wheel, too."""
DEMO_TRAIN, DEMO_TEST = 360, 120
"""Clips that `demo` makes, and `synth` where it is not told: the demo is `smoke.yaml` on these."""
_SECTIONS_NOT_DECIDING = tuple(key for key in NOT_DECIDING if key.endswith("."))
"""What earlier versions left out of a digest."""


class RunConfig(TrainingConfig):
    """Everything a run depends on, from raw clips to report."""

    features: FeatureSpec = FeatureSpec()
    ingest: IngestConfig = IngestConfig()

    def digest(self) -> str:
        """SHA-256 of what decides the result."""
        return _digest(self.model_dump(mode="json"))


def digests_of_text(text: str) -> tuple[str, str]:
    """What the version which wrote a config as YAML may have given it, of the keys it knew: this
    one's digest, or the one of before single keys were left out."""
    content = _of_yaml(text)
    return _digest(content), _digest(content, _SECTIONS_NOT_DECIDING)


def _of_yaml(text: str) -> Any:
    """By libyaml, a tenth of the time: a command reads a config of hundreds of lines thrice."""
    return yaml.load(text, Loader=yaml.CSafeLoader)


def _digest(content: dict[str, Any], left_out: tuple[str, ...] = NOT_DECIDING) -> str:
    deciding = {
        name: {k: v for k, v in section.items() if f"{name}.{k}" not in left_out}
        if isinstance(section, dict)
        else section
        for name, section in content.items()
        if f"{name}." not in left_out
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def load_config(path: str | Path | None) -> RunConfig:
    """Read a YAML config, a path or a URI; None gives the defaults.

    Raises: UsageError naming the file, the key, what was found and what is allowed.
    """
    if path is None:
        return RunConfig()
    try:
        return parse_config(_text_at(path), path)
    except (FileNotFoundError, IsADirectoryError):
        known = ", ".join(sorted(p.name for p in SHIPPED.glob("*.yaml")))
        raise UsageError(f"{path}: no such config file. In {SHIPPED}: {known}") from None


def _text_at(path: str | Path) -> str:
    if "://" not in str(path):
        return text_of(Path(path).read_bytes(), path)
    from pipeline.storage import place_of

    place, name = place_of(str(path))
    return text_of(place.read_bytes(name), path)


def text_of(content: bytes, where: str | Path) -> str:
    """The text of a config file. Raises: UsageError if it is none."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        found = f"byte {content[error.start]:#04x} at {error.start}"
        raise UsageError(f"{where}: found {found}, expected UTF-8; save it as UTF-8") from None


def parse_config(text: str, where: str | Path) -> RunConfig:
    """The config of a YAML file's text. Raises: as `load_config`."""
    try:
        content = _of_yaml(text) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not readable as YAML: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(
            f"{where}: found {type(content).__name__}, expected sections such as data:"
        )
    _move_pool_keys(content)
    _drop_keys_of_before(content, where)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{where}: {explain(error, RunConfig)}") from None


def _move_pool_keys(content: dict[str, Any]) -> None:
    """Before 0.2 the keys of `pool` were keys of `clustering`: a run of then goes on, in place."""
    clustering = content.get("clustering")
    if isinstance(clustering, dict):
        moved = {key: clustering.pop(key) for key in PoolConfig.model_fields if key in clustering}
        if not moved.get("gpus_per_actor", True):
            del moved["gpus_per_actor"]  # It was 0 without a GPU; `clustering.device` says that.
        # What is no section is refused with all other values.
        if moved and isinstance(content.get("pool") or {}, dict):
            content["pool"] = moved | (content.get("pool") or {})


def _drop_keys_of_before(content: dict[str, Any], where: str | Path) -> None:
    """What holds for one call alone, and what makes other features, are no keys of an ingest any
    more; each config saved before has them, as they make no difference.

    Raises: UsageError for one that would.
    """
    section = content.get("ingest")
    if not isinstance(section, dict):
        return
    extractor = section.pop("extractor", IngestConfig.extractor)
    if extractor != IngestConfig.extractor:
        raise UsageError(
            f"{where}: ingest.extractor: {extractor} is no key of a config any more, since another "
            f"one than {IngestConfig.extractor} makes other features under the same spec: leave it "
            "out; which decoder reads a clip is features.decoder"
        )
    for key in ("probe", "allow_mass_delete"):
        if section.pop(key, False):
            option = f"--{key.replace('_', '-')}"
            raise UsageError(
                f"{where}: ingest.{key} is no key of a config any more, since it is meant for one "
                f"call alone: leave it out, and give diccae ingest {option} when you mean it"
            )


def laid_over(config: RunConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config with changes on top, `{section: {key: value}}`, to be validated.

    Of a section, however deep, only the keys that are named change; an encoder's preset among them
    brings its sizes with it.
    """
    content = config.model_dump(mode="json")
    encoder = changes.get("encoder")
    if isinstance(encoder, Mapping):
        changes = {**changes, "encoder": with_sizes(encoder)}
    return _merged(content, changes)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(under[key], over[key])
        for key in under.keys() & over.keys()
        if isinstance(under[key], Mapping) and isinstance(over[key], Mapping)
    }
    return {**under, **over, **both}


def config_text(config: BaseModel) -> str:
    """The resolved config as YAML, every default included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differing_keys(old: BaseModel, new: BaseModel) -> list[str]:
    """Dotted keys whose values differ, as `key: old -> new`."""
    return list(_differences(old.model_dump(mode="json"), new.model_dump(mode="json"), ""))


def _differences(old: Any, new: Any, prefix: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        start = f"{prefix}." if prefix else ""
        return [
            line for key in keys for line in _differences(old.get(key), new.get(key), start + key)
        ]
    return [] if old == new else [f"{prefix}: {old} -> {new}"]


def explain(error: ValidationError, model: type[BaseModel], section: str = "") -> str:
    """A pydantic error in one line per key, with the nearest name for an unknown one.

    Args: section: the part of `model` that was validated alone, dotted; "" for all of it.
    """
    return "; ".join(_explain_one(item, model, section) for item in error.errors())


def _explain_one(item: Any, model: type[BaseModel], section: str) -> str:
    location = [part for part in section.split(".") if part] + [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "value_error":  # Ours, of several fields together: it names what it found.
        return f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
    if item["type"] != "extra_forbidden":
        return f"{key}: {item['msg']}, found {item['input']!r}"
    known = _fields_at(model, location[:-1])
    near = difflib.get_close_matches(location[-1], known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key {key}: {hint}"


def _of_each(annotation: Any) -> Any:
    """Of `tuple[T, ...]` T; else the annotation itself."""
    inner = get_args(annotation)
    return inner[0] if get_origin(annotation) is tuple and inner[1:] == (...,) else annotation


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        # The place in a list of models is no field of theirs.
        annotation = model if part.isdigit() else _of_each(model.model_fields[part].annotation)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
