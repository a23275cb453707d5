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
    rank = ntkcl.ranks.join().rank
    for name, keywords in cases.items():
        # The others need not see the run's folder.
        output = folder / name if rank == 0 else Path("/nowhere") / name
        found = run(keywords, output, rank)
        (folder / f"{name}.rank{rank}.json").write_text(json.dumps(found))


def run(keywords: dict[str, Any], output: Path, rank: int) -> dict[str, Any]:
    stop_at = keywords.pop("stop_at", None)
    go_on = keywords.pop("go_on", False)
    raise_at = keywords.pop("raise_at", None)
    data = dataset_of(keywords.pop("data", {}).get(str(rank), "usual"), Path(tempfile.mkdtemp()))

    def stop(event: dict[str, Any]) -> bool:
        place = [event["task"], event["step"]] if event["event"] == "step" else []
        if place and place == raise_at:
            raise RuntimeError("a callback's own")
        return bool(place) and place == stop_at

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
