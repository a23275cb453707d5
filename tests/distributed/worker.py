"""One rank of a test: runs the cases of a file, one after the other, and writes what came.

worker.py CASES.json FOLDER
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from cases import dataset_of, register_own_method

import ntkcl


def main() -> None:
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    register_own_method()
    for name, keywords in cases.items():
        found = run(keywords, folder / name)
        rank = ntkcl.ranks.join("cpu").rank
        (folder / f"{name}.rank{rank}.json").write_text(json.dumps(found))


def run(keywords: dict[str, Any], output: Path) -> dict[str, Any]:
    stop_at = keywords.pop("stop_at", None)
    go_on = keywords.pop("go_on", False)
    rank = ntkcl.ranks.join("cpu").rank
    data = dataset_of(keywords.pop("data", {}).get(str(rank), "usual"), Path(tempfile.mkdtemp()))

    def stop(event: dict[str, Any]) -> bool:
        return event["event"] == "step" and (event["task"], event["step"]) == tuple(stop_at or ())

    try:
        if go_on:
            result = ntkcl.resume(output, dataset=data, callbacks=[stop])
        else:
            result = ntkcl.train(dataset=data, output=output, callbacks=[stop], **keywords)
    except (Exception, KeyboardInterrupt) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if isinstance(result, ntkcl.Results):
        return {"results": [one.to_dict() for one in result], "output": str(result.output)}
    return {"result": result.to_dict(), "output": str(result.output)}


main()
