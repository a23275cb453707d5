"""What two runs of one configuration must agree in, to the bit: all but times and places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Of result.json and of events; memory is also what the process holds beside the run.
TIMES = {"seconds", "training_seconds", "images_per_second", "peak_memory"}
FILES = ("state.safetensors", "predictions.safetensors", "accuracy_matrix.csv", "config.toml")


def differences(run: Path, other: Path) -> list[str]:
    """What differs between two finished runs; empty if nothing does."""
    found = [f"{name} differs" for name in FILES if _content(run / name) != _content(other / name)]
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (run, other)]
    found += [f"{name} is in one of them alone" for name in sorted(names[0] ^ names[1])]
    found += ["result.json differs"] * (_result(run) != _result(other))
    return found + ["events.jsonl differs"] * (_events(run) != _events(other))


def _content(path: Path) -> bytes:
    """Without the lines of config.toml that say where the run is."""
    lines = path.read_bytes().splitlines(keepends=True)
    return b"".join(line for line in lines if not line.startswith(b"output = "))


def _result(run: Path) -> dict[str, Any]:
    return _timeless(json.loads((run / "result.json").read_text()))


def _events(run: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [_timeless(event) for event in events if event["event"] != "resume"]


def _timeless(of: Any) -> Any:
    if isinstance(of, dict):
        return {key: _timeless(value) for key, value in of.items() if key not in TIMES}
    return [_timeless(value) for value in of] if isinstance(of, list) else of
