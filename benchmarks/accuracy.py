"""Accuracy on real images: one training run after another, each recorded as it ends.

    python benchmarks/accuracy.py                             # the three methods, all seeds
    python benchmarks/accuracy.py --list                      # what there is, what is recorded
    python benchmarks/accuracy.py --validation 0.25 --only corrected corrected-both --seeds 0
    python benchmarks/accuracy.py --report                    # write docs/results.md

What is recorded is not run again, and a run that was stopped (Ctrl-C, SIGTERM) or killed goes on
from its last checkpoint, so the benchmark can be stopped and continued at any time. Choices are
made with --validation, which holds out training images and records to a file of its own; the test
images are used once.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import accuracy_report
from accuracy_runs import (
    MAIN,
    NORMALIZATIONS,
    PROTOCOLS,
    RUNS,
    Case,
    Protocol,
    Record,
    append_record,
    find_record,
    main_seeds,
    read_records,
)

import ntkcl

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ASSETS = Path(os.environ.get("NTKCL_ASSETS_DIR", ROOT.parent / "shared" / "assets"))
RECORDED_VERSIONS = ("ntkcl", "torch", "numpy", "python", "cpu", "gpu", "git_commit")
RECORDED_HASHES = ("weights_sha256", "dataset_manifest")


@dataclasses.dataclass(frozen=True)
class Places:
    """Where things are, and how many CPU threads to use: nothing that an accuracy depends on."""

    data: Path  # the zip
    weights: Path | None  # safetensors file; none: the package's own
    records: Path
    runs: Path  # gets a run folder for each run
    threads: int = 2
    device: str = "auto"


def main() -> None:
    arguments = parse()
    if arguments.report:
        write_report(DOCS)
        return
    protocol = PROTOCOLS[arguments.protocol]
    data = arguments.data or ASSETS / protocol.dataset
    protocol = dataclasses.replace(protocol, dataset=data.name)
    places = places_of(protocol, data, arguments)
    cases = cases_of(
        protocol,
        arguments.only or (RUNS if arguments.list else MAIN),
        arguments.normalize,
        arguments.seeds or protocol.seeds,
        arguments.validation,
    )
    if not arguments.only and not arguments.list:
        cases = [
            case
            for case in cases
            if case.normalize in MAIN[case.name] and case.seed in main_seeds(case.name, protocol)
        ]
    if arguments.list:
        show(cases, places)
        return
    stop_on_signals()
    try:
        diverged = run_all(cases, places)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on with the run under way") from None
    if diverged:
        raise SystemExit("not finite: " + ", ".join(label(case) for case in diverged))


def places_of(protocol: Protocol, data: Path, arguments: argparse.Namespace) -> Places:
    return Places(
        data=data,
        weights=ASSETS / protocol.weights if protocol.weights else None,
        records=records_file(DOCS, arguments.validation),
        runs=ROOT / "runs" / "accuracy",
        threads=arguments.threads,
        device="cpu" if protocol.name == "cpu" else "auto",
    )


def records_file(docs: Path, validation: float) -> Path:
    return docs / "results" / ("validation.jsonl" if validation else "accuracy.jsonl")


def write_report(docs: Path) -> None:
    """Writes results.md from the records beside it."""
    tests, validations = (read_records(records_file(docs, share)) for share in (0.0, 0.5))
    (docs / "results.md").write_text(accuracy_report.render(tests, validations), encoding="utf-8")


def stop_on_signals() -> None:
    """Ctrl-C and SIGTERM both raise KeyboardInterrupt, after the step under way."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="show the runs and what is recorded")
    parser.add_argument("--report", action="store_true", help="write docs/results.md")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="cpu")
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="NAME", help="see --list")
    parser.add_argument("--normalize", nargs="+", choices=NORMALIZATIONS, default=NORMALIZATIONS)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument(
        "--validation",
        type=fraction,
        default=0.0,
        metavar="SHARE",
        help="test on this share of the training images, which are not trained on then",
    )
    parser.add_argument("--data", type=Path, help="zip file of the images")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    return parser.parse_args()


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text}")
    return value


def cases_of(
    protocol: Protocol,
    names: Sequence[str],
    normalizations: Sequence[str],
    seeds: Sequence[int],
    validation: float = 0.0,
) -> list[Case]:
    """Cases seed by seed, so that a sitting that ends early leaves comparable runs."""
    return [
        Case(protocol, name, normalize, seed, validation)
        for seed in seeds
        for normalize in normalizations
        for name in names
    ]


def show(cases: Sequence[Case], places: Places) -> None:
    """Prints each case with its final accuracy, where it is recorded."""
    records = read_records(places.records)
    for case in cases:
        record = find_record(case, records)
        result = f"{record['final_accuracy']:6.2f}" if record else "     -"
        print(f"{result}  {label(case):42}  {RUNS[case.name].about}")


def run_all(cases: Sequence[Case], places: Places) -> list[Case]:
    """Runs what is not recorded yet; returns the cases whose loss was not finite."""
    diverged = []
    for number, case in enumerate(cases, start=1):
        if find_record(case, read_records(places.records)):
            continue
        print(f"[{number}/{len(cases)}] {label(case)}", flush=True)
        try:
            record = run_case(case, places)
        except FloatingPointError as error:
            print(f"    {error}", flush=True)
            diverged.append(case)
            continue
        append_record(places.records, record)
        print(
            f"    final {record['final_accuracy']:.2f} %, average {record['average_accuracy']:.2f}"
            f" %, {record['wall_seconds']:.0f} s",
            flush=True,
        )
    return diverged


def run_case(case: Case, places: Places) -> Record:
    """Trains once, or goes on with what was begun, and says what came out."""
    about = json.dumps(case.settings(), sort_keys=True, default=str)
    digest = hashlib.sha256(about.encode()).hexdigest()[:8]
    name = f"{case.protocol.name}-{case.name}-{case.normalize}-{case.seed}-{digest}"
    output = places.runs / name
    begun = time.monotonic()
    result = ntkcl.train(
        **case.keywords()
        | {
            "dataset": str(places.data),
            "weights": places.weights,
            "output": output,
            "resume": True,
            "device": places.device,
            "threads": places.threads,
            "loader_threads": places.threads,
            "progress": False,
        }
    )
    environment = json.loads((output / "environment.json").read_text())
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    output.rename(output.with_name(f"{name}-{stamp}"))  # done: another time it is run anew
    return {
        **describe(case, places),
        **outcome(result),
        "wall_seconds": round(max(time.monotonic() - begun, result.seconds), 2),
        "versions": {key: environment[key] for key in RECORDED_VERSIONS},
        "hashes": {key: environment[key] for key in RECORDED_HASHES},
        "torch_threads": places.threads,
    }


def describe(case: Case, places: Places) -> Record:
    """What was asked for."""
    return {
        "protocol": case.protocol.name,
        "name": case.name,
        "normalize": case.normalize,
        "seed": case.seed,
        "validation": case.validation,
        "command": case.command(places.threads),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": places.device,
        "settings": case.settings(),
    }


def outcome(result: ntkcl.Result) -> Record:
    """What came out; null where undefined."""
    rows = result.accuracy_matrix.tolist()
    return {
        "final_accuracy": result.final_accuracy,
        "average_accuracy": result.average_accuracy,
        "forgetting": defined(result.forgetting),
        "accuracy": list(result.accuracy),
        "task_id": [evaluation.task_id for evaluation in result.evaluations],
        "accuracy_matrix": [[defined(value) for value in row] for row in rows],
        "test_images": result.evaluations[-1].count,
        "trainable_parameters": result.trainable_parameters,
        "seconds": result.seconds,
        "training_seconds": result.training_seconds,
        "images_per_second": result.images_per_second,
    }


def defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def label(case: Case) -> str:
    return f"{case.protocol.name} {case.name} {case.normalize} seed {case.seed}"


if __name__ == "__main__":
    main()
