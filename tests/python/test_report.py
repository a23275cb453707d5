"""Runs beside each other: the arithmetic of what is shown, which runs share a table, and files that
are whole, escaped and readable by others."""

import csv
import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import fake_core
import ntkcl
from ntkcl import figures, reporting
from ntkcl.cli import main
from ntkcl.comparison import (
    Group,
    Table,
    calibration_error,
    compare,
    mean_std,
    task_confusion,
)
from ntkcl.config import resolve, to_toml
from ntkcl.result import result_of

HOSTILE = '<script>alert("1")</script> $x_{ & 50%\n\\input{y}'
CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox"]  # as learned: three tasks of two
# The images of each class after the last task: one fox is taken for an ant, one elk for a fox.
LABELS = np.repeat(np.arange(6), 2)
PREDICTIONS = np.where(np.arange(12) == 11, 0, np.where(np.arange(12) == 8, 5, LABELS))


def write_run(
    folder: Path,
    numbers: dict[str, Any] | None = None,
    confidences: np.ndarray | None = None,
    environment: dict[str, Any] | None = None,
    tasks: int = 3,
    **keywords: Any,
) -> Path:
    """The folder of a finished run of known accuracies."""
    core = fake_core.FakeTrainer("", {})
    core.tasks = tasks
    raw = core._result() | (numbers or {})
    config = resolve({"dataset": "pets", "initial_classes": 2, "increment": 2, **keywords})
    known = {"dataset_manifest": "d" * 64, "weights_sha256": "e" * 64, "classes": CLASSES}
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "environment.json").write_text(json.dumps(known | (environment or {})))
    (folder / "result.json").write_text(json.dumps(result_of(raw, folder, config).to_dict()))
    tensors = {"task_2.labels": LABELS, "task_2.predictions": PREDICTIONS}
    if confidences is not None:
        tensors["task_2.confidences"] = confidences.astype(np.float32)
    save_file(tensors, folder / "predictions.safetensors")
    return folder


def only_group(tables: list[Table]) -> Group:
    assert len(tables) == 1
    assert len(tables[0].groups) == 1
    return tables[0].groups[0]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- arithmetic ----------------------------------------------------------------------------------


def test_confusion_counts_the_tasks_of_the_predicted_classes() -> None:
    # Tasks {0, 1}, {2, 3, 4}: of four images of the first one goes to the second.
    labels, predictions = np.array([0, 0, 1, 1, 2, 3]), np.array([1, 0, 4, 1, 3, 0])
    expected = [[75.0, 25.0], [50.0, 50.0]]
    np.testing.assert_array_equal(task_confusion(labels, predictions, [2, 3]), expected)


def test_a_task_without_test_images_has_no_confusion() -> None:
    found = task_confusion(np.array([0]), np.array([1]), [1, 1])
    np.testing.assert_array_equal(found, [[0.0, 100.0], [math.nan, math.nan]])


@pytest.mark.parametrize(
    ("right", "confidences", "expected"),
    [
        ([1, 0, 1, 1], [0.95, 0.95, 0.5, 0.5], 100 * (0.5 * 0.45 + 0.5 * 0.5)),
        ([1, 0, 1, 1], [0.95, 0.97, 0.99, 0.75], 100 * (0.75 * abs(2 - 2.91) / 3 + 0.25 * 0.25)),
        ([1, 1], [1.0, 1.0], 0.0),
        ([1, 0], [0.0, 0.0], 50.0),
        ([1, 0], [math.nan, 0.5], math.nan),
        ([], [], math.nan),
    ],
)
def test_calibration_error_against_hand_made_bins(
    right: list[int], confidences: list[float], expected: float
) -> None:
    labels, predictions = np.zeros(len(right), np.int64), 1 - np.array(right, np.int64)
    found = calibration_error(labels, predictions, np.array(confidences, np.float32))
    assert found == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_the_spread_is_the_sample_standard_deviation() -> None:
    mean, std = mean_std([[80.0, 1.0], [82.0, 1.0], [87.0, 1.0]])
    np.testing.assert_allclose(mean, [83.0, 1.0])
    np.testing.assert_allclose(std, [math.sqrt(13), 0.0])
    np.testing.assert_array_equal(mean_std([80.0])[1], math.nan)


def test_numbers_of_a_run_and_over_seeds(tmp_path: Path) -> None:
    for seed, final in enumerate((80.0, 82.0, 87.0)):
        matrix = fake_core.FakeTrainer("", {})._result()["accuracy_matrix"].numpy()
        matrix[0, 0] = 84.0 + seed
        numbers = {"final_accuracy": final, "accuracy_matrix": matrix}
        write_run(tmp_path / str(seed), numbers, np.full(12, 0.5), seed=seed)
    group = only_group(compare(tmp_path))
    assert group.seeds == "0, 1, 2"
    assert group.statistics("final_accuracy") == pytest.approx((83.0, math.sqrt(13)))
    assert group.statistics("new_classes") == pytest.approx((265 / 3, 1 / 3))
    assert group.statistics("ece") == pytest.approx((100 * (10 / 12 - 0.5), 0.0))
    assert group.statistics("minutes") == pytest.approx((0.05, 0.0))
    assert group.accuracy_matrix[0, 0] == 85.0
    assert np.isnan(group.accuracy_matrix[0, 1])
    np.testing.assert_array_equal(
        group.task_confusion, [[100.0, 0.0, 0.0], [0.0, 100.0, 0.0], [25.0, 0.0, 75.0]]
    )
    np.testing.assert_allclose(group.curve[0], [90.0, 88.75, 87.5])


def test_metrics_that_a_run_has_not_kept_are_undefined(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "predictions.safetensors").unlink()
    group = only_group(compare(tmp_path / "run"))
    assert math.isnan(group.statistics("ece")[0])
    assert np.isnan(group.task_confusion).all()
    assert "no predictions kept" in figures.matrices_figure(group).axes[1].texts[0].get_text()


def test_real_runs(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (24, 8, 8, 3), np.uint8)
    labels = np.repeat(["ant", "bee", "cat", "dog"], 6)
    arrays = {"train": (images, labels), "test": (images[::2], labels[::2])}
    keywords = {"initial_classes": 2, "increment": 2, "transform": "resize", "progress": False}
    results = [
        ntkcl.train(
            dataset=arrays, method="simple-cil", seed=seed, output=tmp_path / str(seed), **keywords
        )
        for seed in range(2)
    ]
    group = only_group(compare(results))
    # The core counts the same share, over all tasks.
    for run, result in zip(group.runs, results, strict=True):
        diagonal = np.diagonal(run.task_confusion).mean()
        assert diagonal == pytest.approx(result.evaluations[-1].task_id)
    path = ntkcl.report(results, tmp_path / "report.html")
    assert [float(row["final_accuracy"]) for row in rows_of(path.with_suffix(".csv"))] == [
        result.final_accuracy for result in results
    ]


# ---- which runs go together ----------------------------------------------------------------------


def test_runs_that_differ_in_seed_places_and_speed_are_one_group(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0, loader_threads=1, output="here", data_root="x")
    write_run(tmp_path / "b", seed=1, loader_threads=4, output="there", device="cpu")
    write_run(tmp_path / "c", seed=2, weights="moved.safetensors", checkpoint_steps=7)
    assert only_group(compare(tmp_path)).name == "ntk-cl corrected"


def test_groups_of_a_table_are_named_by_what_differs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", epochs=3)
    write_run(tmp_path / "b", epochs=5, ntk_cl={"eta": 0.5})
    write_run(tmp_path / "c", method="simple-cil")
    [table] = compare(tmp_path)
    assert [group.name for group in table.groups] == [
        "ntk-cl corrected, epochs 3, eta 0.2",
        "ntk-cl corrected, epochs 5, eta 0.5",
        "simple-cil corrected",
    ]


@pytest.mark.parametrize(
    ("keywords", "environment", "difference"),
    [
        ({"normalize": "none"}, {}, "normalize: none here, weights there"),
        ({"transform": "cifar"}, {}, "transform: cifar here, inception there"),
        ({"initial_classes": 4}, {}, "initial_classes: 4 here, 2 there"),
        ({"train_per_class": 5}, {}, "train_per_class: 5 here, none there"),
        ({"image_size": 64}, {}, "image_size: 64 here, 32 there"),
        ({"validation_fraction": 0.5}, {}, "validation_fraction: 0.5 here, 0.0 there"),
        ({}, {"weights_sha256": "f" * 64}, "weights sha256: ffffffffffff here, eeeeeeeeeeee there"),
        (
            {"dataset": "other"},
            {"dataset_manifest": "a" * 64},
            "images: other (aaaaaaaaaaaa) here, pets (dddddddddddd) there",
        ),
        (
            {"class_order": "natural"},
            {},
            "class order: natural here, by the run's seed there",
        ),
    ],
)
def test_different_protocols_have_tables_of_their_own_that_say_why(
    tmp_path: Path, keywords: dict[str, Any], environment: dict[str, Any], difference: str
) -> None:
    first = write_run(tmp_path / "a")
    second = write_run(tmp_path / "b", environment=environment, **keywords)
    apart = compare([first, second])
    assert [table.differences for table in apart] == [(), (difference,)]
    [together] = compare([first, second], together=True)
    assert len(together.groups) == 2
    assert len({group.name for group in together.groups}) == 2
    assert together.differences == (f"{together.groups[1].name}: {difference}",)


def test_where_the_data_lies_is_no_difference(tmp_path: Path) -> None:
    write_run(tmp_path / "a", dataset="one/pets", seed=0)
    write_run(tmp_path / "b", dataset="other/pets", seed=1)
    only_group(compare(tmp_path))


def test_fixed_class_orders_are_compared_as_orders(tmp_path: Path) -> None:
    backwards = {"classes": CLASSES[::-1]}
    write_run(tmp_path / "a", class_order="natural")
    write_run(tmp_path / "b", class_order=[0, 1, 2, 3, 4, 5], method="simple-cil")
    write_run(tmp_path / "c", class_order=[5, 4, 3, 2, 1, 0], environment=backwards)
    first, second = compare(tmp_path)
    assert [group.config.method for group in first.groups] == ["ntk-cl", "simple-cil"]
    [difference] = second.differences
    assert re.fullmatch(r"class order: given \(\w{12}\) here, natural there", difference)


def test_class_orders_with_seeds_of_their_own(tmp_path: Path) -> None:
    orders = {1: {"classes": CLASSES}, 2: {"classes": CLASSES[::-1]}}
    for order, environment in orders.items():
        folder = tmp_path / f"a{order}"
        write_run(folder, class_order_seed=order, environment=environment)
    write_run(tmp_path / "b", method="raa", class_order_seed=2, environment=orders[2])
    write_run(tmp_path / "c", method="raa", seed=2, environment=orders[2])
    first, second = compare(tmp_path)
    assert [group.seeds for group in first.groups] == [
        "0, 0 (class order 1, 2)",
        "0 (class order 2)",
    ]
    assert second.differences == (
        "class order: by the run's seed here, class_order_seed 1, 2 there",
    )


def test_the_same_seed_must_mean_the_same_class_order(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", method="raa", environment={"classes": CLASSES[::-1]})
    assert len(compare(tmp_path)) == 2


def test_a_repeated_seed_and_a_method_that_looks_at_labels_are_pointed_out(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    write_run(tmp_path / "c", method="lorac-ipc", lorac_ipc={"inference": "vote_by_test_task"})
    text = ntkcl.report(tmp_path, tmp_path / "r.html").read_text()
    assert "Caution, ntk-cl corrected: a seed stands here for several runs" in text
    assert "Caution, lorac-ipc corrected: lorac_ipc.inference = " in text
    assert "% Caution, lorac-ipc corrected" in (tmp_path / "r.tex").read_text()


# ---- what is read --------------------------------------------------------------------------------


def test_a_folder_of_runs_stands_for_them_and_each_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (10, 9):
        write_run(Path("runs") / f"seed-{seed}", seed=seed)
    (tmp_path / "runs" / "notes").mkdir()
    group = only_group(compare(["runs", tmp_path / "runs" / "seed-9", "runs/seed-10/../seed-10"]))
    assert [run.folder for run in group.runs] == [Path("runs/seed-9"), Path("runs/seed-10")]


def test_runs_are_found_however_deep_and_none_is_dropped(tmp_path: Path) -> None:
    mix = tmp_path / "mix"
    expected = [write_run(mix / "one")]
    for seed in (0, 1):
        expected.append(write_run(mix / "two" / f"seed-{seed}", seed=seed))
    expected.append(write_run(mix / "zoo" / "sweep" / "eta=1" / "seed-0"))
    (mix / "two" / "seeds.toml").write_text("seeds = [0, 1]\n")
    (mix / "config.toml").write_text("seeds = [0, 1]\n")  # somebody's: it makes no run
    (mix / "zoo" / "up").symlink_to(mix)
    (mix / "zz latest").symlink_to(mix / "one")
    write_run(mix / ".trash" / "old", seed=5)
    write_run(mix / "one" / "copy", seed=6)  # in a run is no other
    runs = [run for group in compare(mix)[0].groups for run in group.runs]
    assert [run.folder for run in runs] == expected


def unfinished(folder: Path, **keywords: Any) -> Path:
    (write_run(folder, **keywords) / "result.json").unlink()
    return folder


def model(folder: Path) -> Path:
    """What is read of the folder of an exported model, or of an extended one."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(resolve()))
    (folder / "model.json").write_text("{}")
    return folder


def test_unfinished_runs_of_a_folder_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("swp/1/seed-0"))
    unfinished(Path("swp/1/seed-1"), seed=1)
    unfinished(Path("swp/2"), epochs=3)
    model(Path("swp/given_away"))
    model(Path("swp/1/seed-0/task-4"))
    assert command("swp") == 0
    assert only_group(compare("swp")).seeds == "0"
    shown = capsys.readouterr().out
    latex = Path("report.tex").read_text()
    page = Page(Path("report.html").read_text())
    for folder in ("swp/1/seed-1", "swp/2"):
        assert f"  Left out: '{folder}' has not finished\n" in shown
        assert f"% Left out: '{folder}' has not finished\n" in latex
        assert f"Left out: '{folder}' has not finished\n" in page.words
    assert "given_away" not in shown + latex + page.words


def test_without_a_finished_run_nothing_is_written(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "runs" / "b")
    for folder, expected in (
        (run, rf"expected a finished run in '{run}', .*; go on with `ntkcl resume {run}`"),
        (run.parent, rf"expected finished runs .* got 1 unfinished; .*`ntkcl resume {run}`"),
        (model(tmp_path / "model"), r"one that holds some, got a model alone in '.*model'"),
    ):
        with pytest.raises(FileNotFoundError, match=expected):
            ntkcl.report([folder], tmp_path / "out" / "report.html")
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[report\] expected at least one run, got none"):
        ntkcl.report([])
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"\[report\] expected the folder of a run"):
            ntkcl.report(folder)
    with pytest.raises(ValueError, match=r"'output': expected a name that ends in \.html"):
        ntkcl.report(write_run(tmp_path / "a"), tmp_path / "report.csv")


@pytest.mark.parametrize("broken", [b"", b"no tensors", None])
def test_damaged_predictions_name_their_file(tmp_path: Path, broken: bytes | None) -> None:
    file = write_run(tmp_path / "a") / "predictions.safetensors"
    if broken is None:
        save_file({"task_2.labels": LABELS, "task_2.predictions": PREDICTIONS + 1}, file)
    else:
        file.write_bytes(broken)
    with pytest.raises(ValueError, match=r"\[report\] expected .*a/predictions\.safetensors"):
        compare(tmp_path / "a")


def test_a_damaged_result_names_its_run(tmp_path: Path) -> None:
    file = write_run(tmp_path / "a") / "result.json"
    file.write_text("{")
    with pytest.raises(ValueError) as caught:
        compare(tmp_path / "a")
    assert caught.value.__notes__ == [f"in the run '{tmp_path / 'a'}'"]
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"'.*a/result\.json' is damaged: '\w+': Field required"):
        compare(tmp_path / "a")


# ---- files ---------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """The tags of a page, what it loads, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_holds_all_it_shows(tmp_path: Path) -> None:
    write_run(tmp_path / "a", confidences=np.full(12, 0.5))
    write_run(tmp_path / "b", seed=1, confidences=np.full(12, 0.6))
    write_run(tmp_path / "c", normalize="none")
    page = Page(ntkcl.report(tmp_path, tmp_path / "report.html").read_text())
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert len(page.loads) == page.tags.count("img") == 6  # curve, bars, matrices; twice
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.loads)
    for words in (
        "Protocol 2: pets, 3 tasks of 2 classes",
        "Differs from protocol 1: normalize: none here, weights there",
        "87.50 ± 0.00",
        "28.33 ± 7.07",  # ECE of 33.3 and 23.3
        "forward transfer: Lopez-Paz and Ranzato 2017",
    ):
        assert words in page.words


@pytest.mark.parametrize(
    ("classes", "split", "expected"),
    [
        (10, (2, 5), "3 tasks of 2, then 5, then 3 classes"),
        (12, (2, 5), "3 tasks of 2, then 5 classes"),
        (8, (3, 3), "3 tasks of 3, then 2 classes"),
        (5, (5, 10), "1 task of 5 classes"),
        (0, (2, 2), "3 tasks"),  # names were not kept
    ],
)
def test_a_title_says_the_sizes_of_the_tasks(
    tmp_path: Path, classes: int, split: tuple[int, int], expected: str
) -> None:
    keywords = dict(zip(("initial_classes", "increment"), split, strict=True))
    environment = {"classes": [str(index) for index in range(classes)]}
    tasks = int(expected[0])
    folder = write_run(tmp_path / "a", environment=environment, tasks=tasks, **keywords)
    (folder / "predictions.safetensors").unlink()
    assert reporting.table_title(1, compare(folder)) == f"pets, {expected}"


def test_the_legend_says_that_scores_are_no_probabilities(tmp_path: Path) -> None:
    page = Page(ntkcl.report(write_run(tmp_path / "a"), tmp_path / "r.html").read_text())
    assert "Cosines, distances and ridge outputs are no logits" in page.words


def test_a_column_of_nothing_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    shown = re.findall(r"<th>(.*?)</th>", ntkcl.report(tmp_path, tmp_path / "r.html").read_text())
    assert "backward transfer" in shown
    assert not {"forward transfer", "ECE"} & set(shown[: shown.index("memory")])
    write_run(tmp_path / "b", seed=1, numbers={"forward_transfer": 1.5})
    page = ntkcl.report(tmp_path, tmp_path / "r.html").read_text()
    assert "forward transfer" in re.findall(r"<th>(.*?)</th>", page)


def test_names_are_text_wherever_they_come_from(tmp_path: Path) -> None:
    # Protects: data set names and folders are made by others.
    folder = write_run(tmp_path / "<b>$a_&", dataset=HOSTILE)
    other = write_run(tmp_path / "_x", dataset=HOSTILE + "2", environment={"weights_sha256": "<i>"})
    path = ntkcl.report([folder, other], tmp_path / "r.html", together=True)
    page = Page(path.read_text())
    assert not {"script", "b", "i"} & set(page.tags)
    assert '<script>alert("1")</script>' in page.words
    rows = [line for line in path.with_suffix(".tex").read_text().splitlines() if line[0] != "%"]
    assert len(rows) == 2
    assert all(row.startswith("ntk-cl corrected, images <script>") for row in rows)
    assert all(r"\$x\_\{ \& 50\% \textbackslash{}input\{y\}" in row for row in rows)
    assert {row["dataset"] for row in rows_of(path.with_suffix(".csv"))} == {HOSTILE, HOSTILE + "2"}


def test_the_csv_has_every_metric_of_every_run(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"forgetting": math.nan, "final_accuracy": 100 / 3})
    write_run(tmp_path / "b", seed=1, confidences=np.full(12, 0.5))
    rows = rows_of(ntkcl.report(tmp_path, tmp_path / "r.html").with_suffix(".csv"))
    stored = json.loads((tmp_path / "a" / "result.json").read_text())
    metrics = {key for key, value in stored.items() if isinstance(value, (int, float))}
    assert metrics <= set(rows[0])
    assert [row["run"] for row in rows] == [str(tmp_path / name) for name in "ab"]
    assert [row["seed"] for row in rows] == ["0", "1"]
    assert float(rows[0]["final_accuracy"]) == 100 / 3
    assert rows[0]["forgetting"] == rows[0]["ece"] == ""
    assert float(rows[1]["ece"]) == pytest.approx(100 * (10 / 12 - 0.5))
    assert rows[0]["trainable_parameters"] == "1234"


def test_latex_has_a_row_for_each_method(tmp_path: Path) -> None:
    for seed, final in enumerate((80.0, 82.0, 87.0)):
        write_run(tmp_path / str(seed), {"final_accuracy": final}, seed=seed)
    write_run(tmp_path / "x", {"forgetting": math.nan}, method="simple-cil", variant="release")
    (tmp_path / "x" / "config.toml").write_text(
        (tmp_path / "x" / "config.toml").read_text().replace('"none"', '"weights"')
    )
    ntkcl.report(tmp_path, tmp_path / "r.html")
    assert (tmp_path / "r.tex").read_text().splitlines()[2:] == [
        r"ntk-cl corrected & $83.00 \pm 3.61$ & $88.75 \pm 0.00$ & $3.75 \pm 0.00$ \\",
        r"simple-cil release & $87.50$ & $88.75$ & -- \\",
    ]


def test_the_same_runs_give_the_same_files(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    paths = [ntkcl.report(tmp_path / "a", tmp_path / name / "r.html") for name in "xy"]
    for suffix in (".html", ".csv", ".tex"):
        first, second = (path.with_suffix(suffix).read_bytes() for path in paths)
        assert first == second
    assert {path.name for path in paths[0].parent.iterdir()} == {"r.html", "r.csv", "r.tex"}


# ---- figures -------------------------------------------------------------------------------------


def test_the_curve_shows_mean_and_spread(tmp_path: Path) -> None:
    for seed, drop in enumerate((1.0, 3.0)):
        raw = fake_core.FakeTrainer("", {})._result()
        evaluations = [e | {"top1": e["top1"] - drop} for e in raw["evaluations"]]
        write_run(tmp_path / str(seed), {"evaluations": evaluations}, seed=seed)
    [table] = compare(tmp_path)
    [axes] = figures.curves_figure(table.groups).axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 88], [2, 86.75], [3, 85.5]])
    band = axes.collections[0].get_paths()[0].vertices
    for task, mean in ((1, 88.0), (3, 85.5)):
        edges = band[band[:, 0] == task, 1]
        np.testing.assert_allclose([edges.min(), edges.max()], [mean - 2**0.5, mean + 2**0.5])


@pytest.mark.parametrize("tasks", [1, 3, 100])
def test_figures_for_any_number_of_tasks(tmp_path: Path, tasks: int) -> None:
    numbers = {"forgetting": math.nan, "backward_transfer": math.nan} if tasks == 1 else {}
    environment = {"classes": [str(index) for index in range(2 * tasks)]}
    folder = write_run(tmp_path / "a", numbers, environment=environment, tasks=tasks)
    (folder / "predictions.safetensors").unlink()
    group = only_group(compare(folder))
    numbered = figures.matrices_figure(group).axes[0].texts
    assert len(numbered) == {1: 1, 3: 6, 100: 0}[tasks]
    for figure in (figures.curves_figure([group]), figures.forgetting_figure([group])):
        assert b"</svg>" in figures.svg(figure)


# ---- the command ---------------------------------------------------------------------------------


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["report", *words])
    return int(stop.value.code or 0)


def test_the_command_shows_the_tables_and_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"))
    write_run(Path("b"), normalize="none")
    assert command("a", "b") == 0
    printed = capsys.readouterr().out
    assert re.search(r"ntk-cl corrected +0 +87\.50 +88\.75 +3\.75", printed)
    assert "Differs from protocol 1: normalize: none here, weights there" in printed
    assert "in report.html, report.csv, report.tex" in printed
    assert command("a", "b", "--together", "--output", "new/all.html") == 0
    printed = capsys.readouterr().out
    assert "Protocol 2" not in printed
    assert "normalize: none here, weights there" in printed
    assert "in new/all.html, new/all.csv, new/all.tex" in printed
    assert Path("new/all.html").is_file()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "[report] expected at least one run, got none"),
        (["nowhere"], "[report] expected the folder of a run"),
        (["a", "--output", "x.csv"], "expected a name that ends in .html, got 'x.csv'"),
        (["a", "--output", "a/config.toml/x.html"], "[report] cannot write to"),
        (["a", "--outptu", "x"], "unknown argument '--outptu'"),
        (["a", "--output"], "'output': expected a value after '--output'"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"))
    assert command(*words) == 2
    errors = capsys.readouterr().err
    assert expected in errors
    assert errors.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
