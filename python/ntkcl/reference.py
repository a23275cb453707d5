"""The reference page of the configuration: `python -m ntkcl.reference > docs/configuration.md`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ntkcl import _C
from ntkcl.config import Option, options, toml_value
from ntkcl.presets import PRESETS, PUBLISHED, PUBLISHED_TASK_MEANS

_HEAD = """# Configuration

Every key in Python, in a TOML file and on the command line:

```python
ntkcl.train("c.toml", epochs=5, ntk_cl={"eta": 0.03})
```

```sh
ntkcl train --config c.toml --epochs 5 --ntk-cl.eta 0.03
```

```toml
epochs = 5

[ntk_cl]
eta = 0.03
```

What is given wins in this order: keywords or command line, file, preset, variant, defaults. Some
defaults follow the method, the data set (digits: 5 tasks of 2 classes) and the backbone
(`image_size`). The resolved configuration is stored with the run as `config.toml`;
`ntkcl train --config` of that file starts the same run again.

This page is written by `python -m ntkcl.reference`.
"""


# What the settings of a method differ in, by title; in the table of its presets.
_COLUMNS: Mapping[str, Mapping[str, Callable[[Mapping[str, Any]], float]]] = {
    "raa": {
        "first epochs": lambda preset: preset["initial_epochs"],
        "later epochs": lambda preset: preset["epochs"],
        "`rho`": lambda preset: preset["rho"],
        "`margin`": lambda preset: preset["raa"]["margin"],
    }
}
_USUAL_COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "rate": lambda preset: preset["learning_rate"],
    "batch": lambda preset: preset["batch_size"],
    "epochs": lambda preset: preset["epochs"],
}


def configuration_page() -> str:
    """The page as Markdown: a table of the common keys, and one per method."""
    described = _C.describe_options()["methods"]
    common = [option for option in options() if "." not in option.key]
    parts = [_HEAD, "## Common keys\n", _table(common)]
    for name, method in described.items():
        section = method["section"]
        own = [option for option in options(name) if option.key.startswith(section + ".")]
        if own:
            parts += [f"## `{name}`\n", f"{_sentence(method['doc'])}\n", _table(own)]
            if method["defaults"]:
                parts.append(f"Its defaults of common keys: {_pairs(method['defaults'])}.\n")
            parts += [
                _variant(variant, values)
                for variant, values in method["variants"].items()
                if values
            ]
    return "\n".join(parts)


def preset_table(method: str) -> str:
    """The published settings of a method as Markdown, for its page in docs/methods."""
    task_means = any(name.startswith(f"{method}/") for name in PUBLISHED_TASK_MEANS)
    head = ("final task mean", "forgetting") if task_means else ("average", "final")
    columns = _COLUMNS.get(method, _USUAL_COLUMNS)
    lines = [
        f"| {' | '.join(['preset', 'classes', *columns, *head])} |",
        f"|{'---|' * (4 + len(columns))}",
    ]
    for name, preset in PRESETS.items():
        if preset["method"] != method:
            continue
        published = (PUBLISHED_TASK_MEANS if task_means else PUBLISHED).get(name)
        cells = [
            f"`{name}`",
            f"{preset['initial_classes']}+{preset['increment']}",
            *(f"{value(preset):.4g}" for value in columns.values()),
            *(f"{value:.2f}" for value in published or ()),
            *(["-"] * 2 if published is None else []),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _table(rows: list[Option]) -> str:
    lines = ["| key | type | default | what it is |", "|---|---|---|---|"]
    for option in rows:
        allowed = option.allowed.removeprefix("one of: ")
        kind = f"{option.type}, {allowed}" if allowed else option.type
        value = str(option.default)
        value = value.lower() if isinstance(option.default, bool) else value
        default = "" if option.default is None else f"`{value}`"
        doc = option.doc.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{option.key}` | {kind} | {default} | {doc} |")
    return "\n".join(lines) + "\n"


def _variant(name: str, values: dict[str, Any]) -> str:
    return f"`variant = {name}` sets {_pairs(values)}.\n"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"`{key} = {toml_value(value)}`" for key, value in values.items())


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


if __name__ == "__main__":
    print(configuration_page(), end="")
