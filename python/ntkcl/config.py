"""One validated configuration: the same keys in Python, in a TOML file and on the command line.

The keys of training, loading, transforms and methods are described by the C++ core
(`_C.describe_options`); those that only Python reads are fields of `Config`. A configuration is
made in layers, each winning over the one before:

    defaults < variant < preset < file < keywords

The defaults follow the method, the data set and the backbone where it has its own (the core's
`defaults`, `presets.DATASET_DEFAULTS` and `METHOD_DEFAULTS`, the backbone's image size).
"""

from __future__ import annotations

import functools
import json
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, Field

from ntkcl import _C, presets
from ntkcl.backbones import DEFAULT_BACKBONE, backbone_info, list_backbones
from ntkcl.datasets import KNOWN_DATASETS
from ntkcl.methods import check_method
from ntkcl.names import did_you_mean, shown

ARRAYS = "arrays"  # the value of `dataset` that stands for arrays in memory
SEEDS_FILE = "seeds.toml"  # of a folder of runs that differ in their seed, see seeds.py
# Keys of places, of what is shown and of the loader's speed: a result depends on none of them.
PLACE_KEYS = frozenset(
    {
        *("output", "resume", "progress", "tensorboard", "data_root"),
        *("loader_threads", "prefetch", "augment_on", "checkpoint_minutes", "checkpoint_steps"),
    }
)
_VARIANT_NORMALIZE = {"release": "none", "corrected": "weights"}


class Normalization(BaseModel):
    """Mean and standard deviation of the three colour channels, for pixels in [0, 1]."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]


class Config(BaseModel):
    """The resolved configuration of a run, made by `resolve`, which adds the core's keys."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True
    )

    method: str = Field("ntk-cl", description="method to train; see list_methods()")
    variant: str = Field(
        "corrected", description="'release': as published; 'corrected': with its defects repaired"
    )
    preset: str | None = Field(None, description="published settings by name; see list_presets()")
    dataset: str = Field(
        "digits",
        description="name, see list_datasets(); or folder or zip with {train,test}/<class>/*",
    )
    data_root: str | None = Field(None, description="folder that holds the named data sets")
    train_per_class: Annotated[int, Field(ge=1)] | None = Field(
        None, description="first training images used of each class; none: all"
    )
    test_per_class: Annotated[int, Field(ge=1)] | None = Field(
        None, description="first test images used of each class; none: all"
    )
    backbone: str = Field(
        DEFAULT_BACKBONE, description="timm name with its tag; see list_backbones()"
    )
    weights: str | None = Field(
        None, description="safetensors file of the backbone; none: the package or the hub's cache"
    )
    normalize: Literal["none", "weights"] | Normalization = Field(
        "weights",
        description="'none': pixels in [0, 1]; 'weights': the backbone's; or {mean, std}",
    )
    class_order: Literal["seed", "natural"] | list[int] = Field(
        "seed",
        description="'seed': permuted by the seed; 'natural': as the data set; or class indices",
    )
    class_order_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None, description="seed that permutes the classes; none: as `seed`"
    )
    seeds: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="seeds of several runs, a folder `seed-<seed>` each; none: one, `seed`"
    )
    output: str | None = Field(None, description="run folder; none: runs/<method>-<dataset>-<time>")
    resume: bool = Field(
        False, description="go on with the run in `output`, or begin it where there is none"
    )
    progress: bool = Field(True, description="show progress")
    tensorboard: bool = Field(
        False, description="write for TensorBoard, too; needs `pip install ntkcl[tensorboard]`"
    )

    @property
    def dataset_name(self) -> str:
        """The data set for titles: of a path its last part."""
        path = Path(self.dataset)
        return path.name if path.is_absolute() else self.dataset

    def train_options(self) -> dict[str, Any]:
        """Options of the task loop under their C++ names."""
        return self._group("train")

    def transform_options(self) -> dict[str, Any]:
        """Options of the image transform under their C++ names."""
        return self._group("transform")

    def loader_options(self) -> dict[str, Any]:
        """Options of the image loader under their C++ names."""
        return self._group("loader")

    def method_options(self) -> dict[str, Any]:
        """Options of the method under their C++ names."""
        section = getattr(self, method_section(self.method), None)
        return section.model_dump() if isinstance(section, BaseModel) else {}

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation by which the pixels' channels are normalised."""
        if isinstance(self.normalize, Normalization):
            return self.normalize.mean, self.normalize.std
        if self.normalize == "weights":
            backbone = backbone_info(self.backbone)
            return list(backbone.mean), list(backbone.std)
        return [0.0] * 3, [1.0] * 3

    def flat(self) -> dict[str, Any]:
        """Every key with its value; a method's keys are dotted ("ntk_cl.eta")."""
        return flatten(self.model_dump())

    def _group(self, group: str) -> dict[str, Any]:
        infos = _C.describe_options()[group]
        return {info["key"]: getattr(self, info["key"]) for info in infos}

    def __getattr__(
        self, name: str
    ) -> Any:  # keys of the C++ core: fields that a checker cannot see
        return super().__getattr__(name)  # type: ignore[misc]


@dataclass(frozen=True)
class Option:
    """One key as a user meets it."""

    key: str  # "epochs", "ntk_cl.eta"
    type: str  # "int", "list[float]", "str"...
    default: Any
    allowed: str  # ">= 1", "one of: a, b"; empty where everything of the type is allowed
    doc: str
    field: Any  # what pydantic validates

    @property
    def is_list(self) -> bool:
        return self.type.startswith("list")


def options(method: str | None = None) -> list[Option]:
    """All keys with type, default, what is allowed and doc; of every method, or of one."""
    described = _C.describe_options()
    own = [
        Option(key, *_own_type(key), doc=field.description or "", field=field)
        for key, field in Config.model_fields.items()
    ]
    common = [
        _option(info["key"], info)
        for group in ("train", "transform", "loader")
        for info in described[group]
    ]
    special = [
        _option(f"{method_section(name)}.{info['key']}", info)
        for name in ([method] if method else described["methods"])
        for info in _described(name)["options"]
    ]
    return own + common + special


def _described(method: str) -> dict[str, Any]:
    """What the core says of its method, or what holds for an own one, which has no keys."""
    variants: dict[str, Any] = {name: {} for name in _VARIANT_NORMALIZE}
    own = {"section": method, "options": [], "variants": variants, "defaults": {}}
    return dict(_C.describe_options()["methods"].get(method, own))


def method_section(method: str) -> str:
    """Name of the section that holds a method's keys ("ntk-cl" -> "ntk_cl")."""
    return str(_described(method)["section"])


def resolve(
    keywords: Mapping[str, Any] | None = None,
    file: str | os.PathLike[str] | None = None,
    *,
    any_method: bool = False,
) -> Config:
    """Makes the configuration of a run from a TOML file and keywords.

    Method options stand in a section (`ntk_cl={"eta": 0.03}`) or are dotted (`"ntk_cl.eta"`).

    Args:
      any_method: a name that is not known here is that of an own method: for what was run already,
        which can be read without its class.

    Raises:
      ValueError: unknown key, value that is not allowed, or impossible combination.
      TypeError: value of the wrong type.
      FileNotFoundError: no such file.
    """
    given = override(flatten(read_toml(file)) if file is not None else {}, flatten(keywords or {}))
    _check_known(given)

    preset_name = _select(given, "preset", presets.list_presets())
    preset = flatten(presets.PRESETS[preset_name]) if preset_name is not None else {}
    chosen = preset | given
    method = _select(chosen, "method", None)
    if not any_method:
        check_method(method)
    described = _described(method)
    variants = described["variants"]
    variant = _select(chosen, "variant", list(variants) or list(_VARIANT_NORMALIZE))
    _check_sections(given, method)
    if given.get("seeds") is not None and "seed" in given:
        raise ValueError(
            f"[config] 'seeds': expected either seeds or a seed, got {shown(given['seeds'])} and "
            f"seed {shown(given['seed'])}"
        )

    backbone = _select(chosen, "backbone", list_backbones())
    dataset = _select(chosen, "dataset", None)
    section = described["section"]
    layers: list[Mapping[str, Any]] = [
        {"image_size": backbone_info(backbone).image_size},
        described["defaults"],
        flatten(presets.DATASET_DEFAULTS.get(dataset, {})),
        flatten(presets.METHOD_DEFAULTS.get((dataset, method), {})),
        {"normalize": _VARIANT_NORMALIZE.get(variant, "weights")},
        {f"{section}.{key}": value for key, value in variants.get(variant, {}).items()},
        preset,
        given,
    ]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= {key: v for key, v in layer.items() if _belongs(key, section)}
    config = _with_absolute_paths(_validate(_nest(merged), method))
    _check_combinations(config)
    return config


def override(given: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """Flat keys, of which those in `by` win; `seed` and `seeds` take each other's place."""
    gone = {"seed": "seeds", "seeds": "seed"}
    replaced = {gone[key] for key in by if key in gone and by[key] is not None}
    return {key: value for key, value in given.items() if key not in replaced} | dict(by)


def cautions(config: Config) -> list[str]:
    """What a reader of this run's accuracies must know."""
    if config.flat().get("lorac_ipc.inference") == "vote_by_test_task":
        return [
            "lorac_ipc.inference = 'vote_by_test_task' uses the labels of the test images: these "
            "accuracies are no result and compare with no other"
        ]
    if config.method == "joint":
        return ["joint keeps the images of all tasks and trains on them again: an upper bound"]
    return []


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a configuration file; FileNotFoundError, or ValueError with the line that is wrong."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"[config] expected a TOML file, got '{path}': no such file")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # too many digits, too deep: also no TOML
        raise ValueError(f"[config] '{path}' is not valid TOML: {error!s:.200}") from None


def to_toml(config: Config) -> str:
    """The configuration as TOML, each key below its doc; `resolve(file=...)` gives it back."""
    values = config.flat()
    lines: list[str] = []
    section = ""
    for option in options(config.method):
        value = values[option.key]
        *parents, key = option.key.split(".")
        if value is None:  # TOML has no null; such keys are none by default
            continue
        if key == "seed" and config.seeds is not None:
            continue
        if parents and parents[0] != section:
            section = parents[0]
            lines += ["", f"[{section}]"]
        lines += [f"# {option.doc}", f"{key} = {toml_value(value)}"]
    return "\n".join(lines) + "\n"


def from_text(option: Option, text: str | Sequence[str]) -> Any:
    """The value that a command line means by `text`; what does not fit is left to `resolve`."""
    try:
        if option.is_list:
            return pydantic.TypeAdapter(_TYPES[option.type]).validate_python(list(text))
        if isinstance(text, str) and text[:1] in ("[", "{"):
            return tomllib.loads(f"value = {text}")["value"]
        if option.type in _TYPES:
            return pydantic.TypeAdapter(_TYPES[option.type]).validate_python(text)
    except (pydantic.ValidationError, tomllib.TOMLDecodeError):
        pass
    return text


_TYPES: dict[str, Any] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "list[int]": list[int],
    "list[float]": list[float],
}


def _own_type(key: str) -> tuple[str, Any, str]:
    """Type, default and what is allowed of a key of `Config`."""
    default = Config.model_fields[key].default
    special = {
        "train_per_class": ("int", default, ">= 1"),
        "test_per_class": ("int", default, ">= 1"),
        "normalize": ("str", "by variant", "none, weights or {mean, std}"),
        "class_order": ("str", default, "seed, natural or class indices"),
        "class_order_seed": ("int", default, ">= 0"),
        "seeds": ("list[int]", default, ">= 0"),
        "method": ("str", default, "one of: " + ", ".join(_C.describe_options()["methods"])),
        "variant": ("str", default, "one of: " + ", ".join(_VARIANT_NORMALIZE)),
    }
    return special.get(key, (type(default).__name__ if default is not None else "str", default, ""))


def _option(key: str, info: Mapping[str, Any]) -> Option:
    return Option(key, info["type"], info["default"], info["allowed"], info["doc"], _field(info))


def _field(info: Mapping[str, Any]) -> Any:
    """An option of the C++ core as pydantic's (annotation, field)."""
    kind: Any = _TYPES[info["type"]]
    if info["choices"]:
        kind = Literal[tuple(info["choices"])]
    bounds = {
        bound: info[side]
        for side, closed, opened in (("low", "ge", "gt"), ("high", "le", "lt"))
        if math.isfinite(info[side])
        for bound in (opened if info[f"{side}_open"] else closed,)
    }
    if bounds and info["type"].startswith("list"):
        element: Any = Annotated[_TYPES[info["type"][5:-1]], Field(**bounds)]
        kind = list[element]
    elif bounds:
        kind = Annotated[kind, Field(**bounds)]
    return (kind, Field(info["default"], description=info["doc"]))


@functools.cache
def _model(method: str) -> type[Config]:
    described = _C.describe_options()
    fields = {
        info["key"]: _field(info)
        for group in ("train", "transform", "loader")
        for info in described[group]
    }
    special = _described(method)
    section = pydantic.create_model(
        special["section"],
        __config__=Config.model_config,
        **{info["key"]: _field(info) for info in special["options"]},
    )
    if special["options"]:
        fields[special["section"]] = (section, Field(default_factory=section))
    return pydantic.create_model("Config", __base__=Config, **fields)


def _validate(values: dict[str, Any], method: str) -> Config:
    try:
        return _model(method).model_validate(values)
    except pydantic.ValidationError as error:
        known = {option.key: option for option in options(method)}
        problems = {_key_of(item["loc"], known): item for item in reversed(error.errors())}
        wrong_type = any(_is_type_error(item["type"]) for item in problems.values())
        text = "; ".join(
            f"'{key}': expected {_expected(known[key])}, got {shown(_lookup(values, key))}"
            for key in reversed(problems)
        )
    raise (TypeError if wrong_type else ValueError)(f"[config] {text}")


def _with_absolute_paths(config: Config) -> Config:
    """So that a run goes on, and is tested, from any working directory."""
    given = {key: getattr(config, key) for key in ("data_root", "weights")}
    if config.dataset != ARRAYS and config.dataset not in KNOWN_DATASETS:
        given["dataset"] = config.dataset
    # os.path takes names that no file and no user can have: whoever reads them says what is wrong.
    paths = {
        key: Path(os.path.expanduser(value)).absolute()  # noqa: PTH111
        for key, value in given.items()
        if value is not None
    }
    if "dataset" in paths and not os.path.exists(paths["dataset"]):  # noqa: PTH110
        del paths["dataset"]  # a name in `data_root`, or nothing
    return config.model_copy(update={key: str(path) for key, path in paths.items()})


def _key_of(location: tuple[int | str, ...], known: Mapping[str, Option]) -> str:
    dotted = ".".join(str(part) for part in location[:2])
    return dotted if dotted in known else str(location[0])


def _is_type_error(kind: str) -> bool:
    return kind.endswith("_type") or kind in ("int_from_float",)


def _expected(option: Option) -> str:
    if option.allowed.startswith("one of: "):
        return option.allowed
    if option.key in ("normalize", "class_order"):
        return option.allowed
    return f"{option.type} {option.allowed}".strip()


def _check_known(given: Mapping[str, Any]) -> None:
    known = [option.key for option in options()]
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known) or "; see `ntkcl train --help`"
            raise ValueError(f"[config] unknown key '{key}'{hint}")


def _select(values: Mapping[str, Any], key: str, known: list[str] | None) -> Any:
    """A key that other defaults depend on, checked before the rest."""
    default = Config.model_fields[key].default
    value = values.get(key, default)
    if value is None and default is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"[config] '{key}': expected str, got {shown(value)}")
    if known is not None and value not in known:
        raise ValueError(
            f"[config] '{key}': expected one of: {', '.join(known)}, got '{value}'"
            + did_you_mean(value, known)
        )
    return value


def _check_sections(given: Mapping[str, Any], method: str) -> None:
    section = method_section(method)
    for key in given:
        if not _belongs(key, section):
            raise ValueError(
                f"[config] '{key}': the method is '{method}', which does not read this section"
            )


def _belongs(key: str, section: str) -> bool:
    return "." not in key or key.startswith(section + ".")


def _check_combinations(config: Config) -> None:
    patch = backbone_info(config.backbone).patch_size
    if config.image_size % patch:
        raise ValueError(
            f"[config] 'image_size': expected a multiple of the patch size {patch} of "
            f"'{config.backbone}', got {config.image_size}"
        )
    if config.milestones and config.schedule != "multistep":
        raise ValueError(
            "[config] 'milestones': expected schedule 'multistep', "
            f"got schedule '{config.schedule}'"
        )
    seeds = [config.seed] if config.seeds is None else config.seeds
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"[config] 'seeds': expected one or more, each once, got {shown(seeds)}")
    order = config.class_order
    if order == "seed" and config.class_order_seed is None and max(seeds) >= 2**32:
        raise ValueError(
            f"[config] '{'seed' if config.seeds is None else 'seeds'}': expected less than 2**32 "
            f"where it permutes the classes (class_order 'seed'), got {max(seeds)}"
        )
    if isinstance(order, list) and sorted(order) != list(range(len(order))):
        raise ValueError(
            f"[config] 'class_order': expected each of 0 ... {max(len(order) - 1, 0)} once, "
            f"got {shown(order)}"
        )


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections become dotted keys; values become plain Python values."""
    sections = {special["section"] for special in _C.describe_options()["methods"].values()}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in sections:
            if not isinstance(value, Mapping):
                raise TypeError(
                    f"[config] '{key}': expected a table of options, got {shown(value)}"
                )
            pairs = {f"{key}.{inner}": plain_value(v) for inner, v in value.items()}
        else:
            pairs = {key: plain_value(value)}
        for name, plain in pairs.items():
            if name in flat:
                raise ValueError(f"[config] '{name}': given twice")
            flat[name] = plain
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        table = nested.setdefault(parents[0], {}) if parents else nested
        table[last] = value
    return nested


def _lookup(values: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def plain_value(value: Any) -> Any:
    """Paths, sequences and numpy values as str, list and Python numbers."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain_value(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain_value(inner) for inner in value]
    return value


def toml_value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        inner = ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items())
        return "{" + inner + "}"
    return repr(value)
