"""docs/results.md, written from the records of benchmarks/accuracy.py alone."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from accuracy_runs import (
    MAIN,
    NORMALIZATIONS,
    PROTOCOLS,
    RUNS,
    Protocol,
    Record,
    main_seeds,
)

_HEAD = """# Results

Written by `python benchmarks/accuracy.py --report` from the records in docs/results, not by hand.
Accuracies are percentages. A_T is the accuracy over all test images after the last task, average
the mean of A_1 ... A_T, forgetting the mean over the earlier tasks of best minus last accuracy.
"a ± b" is mean ± standard error over the seeds; a seed also decides the class order. Input is
`none`, pixels in [0, 1], or `weights`, normalised by the mean and standard deviation of the
backbone's pretraining.
"""

# Pairs of runs whose difference is shown.
COMPARED = (
    ("corrected", "release"),
    ("corrected", "simple-cil"),
    ("lorac-ipc-plain", "lorac-plain"),
    ("lorac-ipc", "lorac"),
    ("lorac-ipc", "lorac-ipc-plain"),
    ("lorac-ipc", "corrected"),
    ("lorac-ipc", "simple-cil"),
    ("raa-amalgamation", "raa-nothing"),
    ("raa-sam", "raa-nothing"),
    ("raa-sam+", "raa-nothing"),
    ("raa", "raa-nothing"),
    ("raa", "raa-code"),
    ("raa", "raa-release"),
    ("raa", "raa-no-drift"),
    ("raa", "raa-no-alignment"),
    ("raa", "simple-cil"),
    ("raa", "corrected"),
    ("raa", "lorac-ipc"),
    ("corrected", "corrected-no-drift"),
    ("corrected-raa-drift", "corrected-no-drift"),
    ("corrected-raa-drift", "corrected"),
    ("corrected-alignment", "corrected"),
    ("lorac-ipc-last", "lorac-ipc"),
    ("lorac-ipc-last-drift", "lorac-ipc-last"),
    ("lorac-ipc-raa-alignment", "lorac-ipc"),
)


def render(tests: Sequence[Record], validations: Sequence[Record]) -> str:
    """The page, of records on test images and of records on held-out training images."""
    sections = [_HEAD]
    for protocol in PROTOCOLS.values():
        own = _latest(record for record in tests if record["protocol"] == protocol.name)
        held_out = _latest(record for record in validations if record["protocol"] == protocol.name)
        if own or protocol.name == "cpu":
            sections += _test_sections(protocol, own)
        if held_out:
            sections.append(_validation_section(protocol, held_out))
    return "\n".join(sections)


def missing_runs(protocol: Protocol, records: Sequence[Record]) -> dict[str, list[int]]:
    """Seeds of the main comparison that are not recorded, by run and normalisation."""
    present = {(record["name"], record["normalize"], record["seed"]) for record in records}
    seeds = {
        f"{name} {normalize}": [
            seed for seed in main_seeds(name, protocol) if (name, normalize, seed) not in present
        ]
        for name, normalizations in MAIN.items()
        for normalize in normalizations
    }
    return {run: absent for run, absent in seeds.items() if absent}


def mean_and_error(values: Sequence[float]) -> str:
    """ "62.85 ± 0.41"; one value has no standard error."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.2f} (one seed)"
    return f"{mean:.2f} ± {_standard_error(values):.2f}"


def _test_sections(protocol: Protocol, records: list[Record]) -> list[str]:
    main = [record for record in records if record["name"] in MAIN]
    other = [record for record in records if record["name"] not in MAIN]
    sections = [
        f"## Protocol {protocol.name}\n\n{protocol.about}.\n",
        _completeness(protocol, main),
    ]
    if not main:
        return sections
    sections += [_summary_table(main), _differences(main), _curves(main)]
    if other:
        sections += ["### Other settings, on the test images\n", _summary_table(other)]
    return [*sections, _matrices(main), _provenance(main + other)]


def _validation_section(protocol: Protocol, records: list[Record]) -> str:
    shares = sorted({record["validation"] for record in records})
    parts = [
        f"## Choices, protocol {protocol.name}\n\nOn held-out training images; no test image was "
        "looked at.\n",
        _choice_of_mode(records),
    ]
    for share in shares:
        own = [record for record in records if record["validation"] == share]
        parts += [f"{share:.0%} of the training images held out:\n", _summary_table(own)]
    return "\n".join([*parts, _commands(records)])


def _choice_of_mode(records: list[Record]) -> str:
    """What the variant `corrected` trains, and why."""
    alone, both = (
        _column([record for record in records if record["name"] == name], "final_accuracy")
        for name in ("corrected", "corrected-both")
    )
    if not alone or not both:
        return ""
    return (
        "`corrected` trains the channel sub-network alone: A_T "
        f"{mean_and_error(alone)}, against {mean_and_error(both)} with both sub-networks.\n"
    )


def _completeness(protocol: Protocol, main: list[Record]) -> str:
    missing = missing_runs(protocol, main)
    total = sum(len(inputs) * len(main_seeds(name, protocol)) for name, inputs in MAIN.items())
    if not missing:
        return f"All {total} runs of the main comparison are recorded.\n"
    count = sum(len(seeds) for seeds in missing.values())
    listed = "; ".join(
        f"{run} seed{'s'[: len(seeds) > 1]} {', '.join(map(str, seeds))}"
        for run, seeds in missing.items()
    )
    return (
        f"**Incomplete: {count} of the {total} runs of the main comparison are missing**, so means "
        f"are over the seeds that are there, and no conclusion is final. Missing: {listed}.\n"
    )


def _summary_table(records: list[Record]) -> str:
    # No times: the runs share their machine with other work, and may be paused.
    head = ("run", "input", "seeds", "A_T", "average", "forgetting")
    rows = []
    for name, normalize, group in _groups(records):
        rows.append(
            (
                _title(name),
                normalize,
                ", ".join(str(record["seed"]) for record in group),
                mean_and_error(_column(group, "final_accuracy")),
                mean_and_error(_column(group, "average_accuracy")),
                mean_and_error(_column(group, "forgetting")),
            )
        )
    return _table(head, rows) + _mixed_settings(records)


def _mixed_settings(records: list[Record]) -> str:
    """A warning where the seeds of a run were not run with the same settings."""
    notes = [
        f"\n**{name}, input {normalize}: its seeds differ in {', '.join(keys)}.**\n"
        for name, normalize, group in _groups(records)
        if (keys := _differing_settings(group))
    ]
    return "".join(notes)


def _differing_settings(group: list[Record]) -> list[str]:
    shared = set.intersection(*(set(record["settings"]) for record in group)) - {"seed"}
    first = group[0]["settings"]
    return sorted(
        key for key in shared if any(record["settings"][key] != first[key] for record in group)
    )


def _differences(main: list[Record]) -> str:
    """One run minus another, seed by seed: the class order is then the same on both sides."""
    keys = ("final_accuracy", "average_accuracy", "forgetting")
    rows = [
        (
            f"{one} - {other}",
            normalize,
            ", ".join(str(seed) for seed in seeds),
            *(mean_and_error(_paired(main, normalize, one, other, key, seeds)) for key in keys),
        )
        for normalize in NORMALIZATIONS
        for one, other in COMPARED
        if (seeds := _common_seeds(main, normalize, one, other))
    ]
    if not rows:
        return ""
    title = "Differences, seed by seed (the standard error is that of the differences):\n\n"
    return title + _table(("difference", "input", "seeds", "A_T", "average", "forgetting"), rows)


def _curves(main: list[Record]) -> str:
    tasks = max(len(record["accuracy"]) for record in main)
    rows = [
        (
            name,
            normalize,
            *(
                f"{statistics.fmean(record['accuracy'][task] for record in group):.2f}"
                for task in range(tasks)
            ),
        )
        for name, normalize, group in _groups(main)
    ]
    head = ("run", "input", *(str(task + 1) for task in range(tasks)))
    return "### A_t after each task, mean over the seeds\n\n" + _table(head, rows)


def _matrices(main: list[Record]) -> str:
    parts = ["### Accuracy matrices, seed 0\n\nRow: after task; column: accuracy on task.\n"]
    for name, normalize, group in _groups(main):
        for record in group:
            if record["seed"] == 0:
                parts += [f"{name}, input {normalize}:\n", _matrix(record["accuracy_matrix"])]
    return "\n".join(parts) if len(parts) > 1 else "No run of seed 0 is recorded.\n"


def _matrix(rows: list[list[float | None]]) -> str:
    head = ("", *(str(task + 1) for task in range(len(rows))))
    cells = [
        (str(task + 1), *("" if value is None else f"{value:.1f}" for value in row))
        for task, row in enumerate(rows)
    ]
    return _table(head, cells)


def _provenance(records: list[Record]) -> str:
    """Where the numbers come from: commands, machines, versions."""

    def distinct(read: Callable[[Record], object]) -> str:
        return ", ".join(sorted({str(read(record)) for record in records}))

    dates = sorted(record["date"][:10] for record in records)
    versions = {key: distinct(lambda r, k=key: r["versions"][k]) for key in records[0]["versions"]}
    hashes = {key: distinct(lambda r, k=key: r["hashes"][k]) for key in records[0]["hashes"]}
    lines = [
        f"- dates: {dates[0]} to {dates[-1]}",
        f"- device: {distinct(lambda r: r['device'])}; "
        f"CPU threads: {distinct(lambda r: r['torch_threads'])}",
        f"- test images: {distinct(lambda r: r['test_images'])}",
        *(f"- {key}: {value}" for key, value in (versions | hashes).items()),
    ]
    return "\n".join(["### Where the numbers come from\n", *lines, "", _commands(records)])


def _commands(records: list[Record]) -> str:
    commands = "\n".join(record["command"] for record in records)
    return f"Commands:\n\n```sh\n{commands}\n```\n"


def _latest(records: Iterable[Record]) -> list[Record]:
    """One record of each run, the last one written, in the order of the table of runs."""
    last = {
        (record["validation"], record["name"], record["normalize"], record["seed"]): record
        for record in records
    }
    return sorted(last.values(), key=_order)


def _order(record: Record) -> tuple[int, str, int, int]:
    names = list(RUNS)
    name = record["name"]
    place = names.index(name) if name in names else len(names)
    return place, name, NORMALIZATIONS.index(record["normalize"]), record["seed"]


def _groups(records: list[Record]) -> list[tuple[str, str, list[Record]]]:
    """Seeds of one run and one normalisation."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["name"], record["normalize"]), []).append(record)
    return [(*key, group) for key, group in groups.items()]


def _by_seed(records: list[Record], name: str, normalize: str) -> dict[int, Record]:
    return {
        record["seed"]: record
        for record in records
        if (record["name"], record["normalize"]) == (name, normalize)
    }


def _common_seeds(main: list[Record], normalize: str, one: str, other: str) -> list[int]:
    ours, theirs = (_by_seed(main, name, normalize) for name in (one, other))
    return sorted(ours.keys() & theirs.keys())


def _paired(
    main: list[Record], normalize: str, one: str, other: str, key: str, seeds: list[int]
) -> list[float]:
    ours, theirs = (_by_seed(main, name, normalize) for name in (one, other))
    return [ours[seed][key] - theirs[seed][key] for seed in seeds]


def _column(group: list[Record], key: str) -> list[float]:
    return [math.nan if record[key] is None else record[key] for record in group]


def _title(name: str) -> str:
    return f"{name}: {RUNS[name].about}" if name in RUNS else name


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
