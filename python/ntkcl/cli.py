"""The command `ntkcl`.

    ntkcl train                      the embedded default
    ntkcl train --preset ntk-cl/cifar100-in21k --data-root ~/data --epochs 5
    ntkcl train --config c.toml --ntk-cl.eta 0.03
    ntkcl train --seeds 0 1 2                mean and standard deviation over seeds
    ntkcl train --output runs/a --resume     go on with the run there, or begin it
    ntkcl resume runs/a
    ntkcl evaluate runs/a
    ntkcl predict runs/a cat.jpg folder/
    ntkcl report runs/a runs/b --output report.html
    ntkcl sweep GRID.toml --jobs 2           every point of a grid, or what is left of it
    ntkcl methods | datasets | presets | backbones | info

What is wrong in what was given ends as one line on stderr with exit code 2, Ctrl-C with 130.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import keyword
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

import ntkcl
from ntkcl import _C, config, ranks, reporting, sweeping
from ntkcl.api import run
from ntkcl.backbones import backbone_info
from ntkcl.comparison import Comparison, compare
from ntkcl.datasets import KNOWN_DATASETS
from ntkcl.datasets.loose_images import image_paths, other_files
from ntkcl.methods import import_modules
from ntkcl.names import did_you_mean
from ntkcl.presets import PRESETS, PUBLISHED, PUBLISHED_TASK_MEANS
from ntkcl.progress import result_table, results_table
from ntkcl.result import HEADLINE, Result, Results, percent
from ntkcl.sweeping import SweepError

_USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


class _BadImages(Exception):
    """Some images could not be read; the others were."""


_UNSET = type("Unset", (str,), {})("")  # told from an empty text by identity
_UNSET_LIST: list[str] = []
_Modules = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]],
    tyro.conf.arg(
        name="import",
        metavar="MODULE",
        help="module that registers own methods, here or installed; may be repeated",
        help_behavior_hint="",
    ),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process with its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    runs = words[:1] in (["train"], ["resume"])
    with _sigterm_as_stop() if runs else contextlib.nullcontext():
        code = _exit_code(words)
    sys.exit(code)


def _exit_code(words: list[str]) -> int:
    try:
        return _dispatch(words)
    except KeyboardInterrupt as stop:
        return _fail(stop, 130)
    except (FloatingPointError, SweepError, _BadImages) as error:
        return _fail(error, 1)
    except _USER_ERRORS as error:
        return _fail(error, 2)


@contextlib.contextmanager
def _sigterm_as_stop() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, with a message; the task loop has a handler of its
    own. An error on its way out comes first: torchrun sends SIGTERM when another rank is gone."""

    def stop(*_: object) -> None:
        if sys.exception() is None:
            raise KeyboardInterrupt("[ntkcl] stopped by SIGTERM")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        _print_help()
        return 0
    if words[0] == "--version":
        print(ntkcl.__version__)
        return 0
    command = _COMMANDS.get(words[0])
    if command is None:
        hint = did_you_mean(words[0], _COMMANDS)
        raise ValueError(
            f"[ntkcl] expected a command ({', '.join(_COMMANDS)}), got '{words[0]}'{hint}"
        )
    command(words[1:])
    return 0


def _fail(error: BaseException, code: int) -> int:
    message = "; ".join([str(error) or "stopped", *getattr(error, "__notes__", [])])
    print("ntkcl: " + " ".join(message.split()), file=sys.stderr)
    return code


# ---- ntkcl train ---------------------------------------------------------------------------------


def _train(words: list[str]) -> None:
    """Train a method on a sequence of tasks and write a run folder."""
    file, given, modules = parse_train(words)
    import_modules(modules)
    _show(run(config.resolve(given, file)))


def _show(result: Result | Results) -> None:
    if not ranks.join().leads:
        return
    made = result[0].config if isinstance(result, Results) else result.config
    console = Console()
    if isinstance(result, Results):
        console.print(results_table(result))
        speed = f"{sum(one.seconds for one in result):.1f} s"
    else:
        console.print(result_table(result))
        speed = f"{result.seconds:.1f} s"
        if result.images_per_second:  # a method may have no training steps
            speed += f", {result.images_per_second:.0f} training images/s"
    console.print(
        f"\n  {made.method} on {made.dataset_name}: {speed}, in {result.output}",
        soft_wrap=True,
        highlight=False,
    )


def parse_train(words: Sequence[str]) -> tuple[str | None, dict[str, Any], Sequence[str]]:
    """The configuration file, the keys under their dotted names and the modules to import that a
    command line gives."""
    options = {option.key: option for option in config.options()}
    words = _with_flags(words, {key for key, o in options.items() if o.type == "bool"})
    _check_values(words, {"config", "import", *(k for k, o in options.items() if not o.is_list)})
    parsed, unknown = tyro.cli(
        _arguments(),
        args=words,
        prog="ntkcl train",
        description=(
            f"{_train.__doc__} Variant, preset, data set and backbone change some of the "
            "defaults below; with no arguments: digits on the embedded backbone."
        ),
        return_unknown_args=True,
    )
    if unknown:
        _refuse(unknown[0], list(options))
    file = None if parsed.config is _UNSET else str(parsed.config)
    texts = {key: _attribute(parsed, key) for key in options}
    given = {
        key: config.from_text(options[key], text)
        for key, text in texts.items()
        if text is not _UNSET and text is not _UNSET_LIST
    }
    return file, given, _attribute(parsed, "import")


def _with_flags(words: Sequence[str], keys: Iterable[str]) -> list[str]:
    """`--resume` alone means `--resume true`."""
    whole = []
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        whole.append(word)
        if word[:2] == "--" and _key(word) in keys and "=" not in word and following[:2] == "--":
            whole.append("true")
    return whole


def _check_values(words: Sequence[str], keys: Iterable[str]) -> None:
    """Every key but a list needs a value: tyro would complain in a box of several lines."""
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        key = _key(word)
        if word.startswith("--") and key in keys and "=" not in word and following[:2] == "--":
            raise ValueError(f"[config] '{key}': expected a value after '{word}', got none")


def _arguments() -> type[Any]:
    """Every key as an argument that is unset by default, so that only what is given wins over
    presets; a method's keys stand in a group of their own."""
    fields: list[Any] = [
        ("config", _argument("config", "FILE", "TOML file with these keys"), _UNSET),
        (_attribute_name("import"), _Modules, ()),
    ]
    groups: dict[str, list[Any]] = {}
    for option in config.options():
        section, _, name = option.key.rpartition(".")
        (groups.setdefault(section, []) if section else fields).append(_field(name, option))
    for section, members in groups.items():
        group = dataclasses.make_dataclass(f"{section}_options", members)
        fields.append((section, group, dataclasses.field(default_factory=group)))
    return dataclasses.make_dataclass("Train", fields)


def _field(name: str, option: config.Option) -> Any:
    """One argument of the dataclass that tyro reads. Values stay text: the configuration says what
    is wrong with them in the same words everywhere."""
    metavar, allowed = option.type.upper(), option.allowed
    if option.is_list:
        metavar = option.type[5:-1].upper() + " ..."
    if allowed.startswith("one of: "):
        metavar, allowed = "{" + allowed.removeprefix("one of: ").replace(", ", ",") + "}", ""
    hint = "; ".join(filter(None, (allowed, f"default: {_default_text(option.default)}")))
    kind = _argument(name, metavar, option.doc, f"({hint})", list[str] if option.is_list else str)
    unset = dataclasses.field(default_factory=lambda: _UNSET_LIST) if option.is_list else _UNSET
    return (_attribute_name(name), kind, unset)


def _argument(name: str, metavar: str, doc: str, hint: str = "", kind: Any = str) -> Any:
    about = tyro.conf.arg(name=name, help=doc, metavar=metavar, help_behavior_hint=hint)
    return Annotated[kind, about]


def _attribute_name(name: str) -> str:
    return name + "_" if keyword.iskeyword(name) else name


def _default_text(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _attribute(parsed: Any, key: str) -> Any:
    for part in key.split("."):
        parsed = getattr(parsed, _attribute_name(part))
    return parsed


def _key(word: str) -> str:
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def _refuse(word: str, known: list[str]) -> None:
    key = _key(word)
    near = did_you_mean(key, known)
    raise ValueError(f"[config] unknown key '{key}'{near or '; see `ntkcl train --help`'}")


# ---- A run's life --------------------------------------------------------------------------------

_Run = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN", help="folder of the run")]
_DataRoot = Annotated[str | None, tyro.conf.arg(metavar="FOLDER", help="named data sets are there")]
_Weights = Annotated[
    str | None, tyro.conf.arg(metavar="FILE", help="weights of the backbone, if they have moved")
]


def _resume(words: list[str]) -> None:
    """Go on with a run that was stopped or killed."""

    def resume(
        run: _Run,
        dataset: Annotated[
            str | None, tyro.conf.arg(metavar="PATH", help="the run's images, if they have moved")
        ] = None,
        data_root: _DataRoot = None,
        weights: _Weights = None,
        modules: _Modules = (),
    ) -> None:
        import_modules(modules)
        _show(ntkcl.resume(run, dataset=dataset, data_root=data_root, weights=weights))

    _call(resume, words, "resume", _resume.__doc__)


def _evaluate(words: list[str]) -> None:
    """Test a run's model, on its own or another data set."""

    def evaluate(
        run: _Run,
        dataset: Annotated[
            str | None, tyro.conf.arg(metavar="NAME", help="name, folder or zip; none: the run's")
        ] = None,
        data_root: _DataRoot = None,
        weights: _Weights = None,
        modules: _Modules = (),
    ) -> None:
        import_modules(modules)
        found = ntkcl.load(run, weights=weights).evaluate(dataset, data_root=data_root)
        rows = [[name, percent(getattr(found, name))] for name in _ACCURACIES]
        _print_table(["", ""], [["test images", str(found.count)], *rows])

    _call(evaluate, words, "evaluate", _evaluate.__doc__)


_ACCURACIES = ("top1", "top5", "new_classes", "old_classes", "task_id", "within_task")


def _predict(words: list[str]) -> None:
    """Predict the class of images: a line with file, class and score of each."""

    def predict(
        run: _Run,
        files: Annotated[
            tyro.conf.Positional[tuple[str, ...]],
            tyro.conf.arg(metavar="FILES", help="images, or folders of images"),
        ],
        weights: _Weights = None,
        modules: _Modules = (),
    ) -> None:
        import_modules(modules)
        model = ntkcl.load(run, weights=weights)
        paths = list(image_paths(files))
        if others := Counter(map(_suffix, other_files(files))):
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
            print(f"ntkcl: skipped files that are no images by name: {kinds}", file=sys.stderr)
        size = model.config.evaluation_batch_size
        bad = sum(
            _print_predictions(model, paths[i : i + size]) for i in range(0, len(paths), size)
        )
        if bad:
            raise _BadImages(f"[predict] {bad} of {len(paths)} images could not be read")

    _call(predict, words, "predict", _predict.__doc__)


def _print_predictions(model: ntkcl.Model, paths: Sequence[str]) -> int:
    """Prints a line of each image; how many could not be read."""
    try:
        labels, scores = model.predict(list(paths))
    except _USER_ERRORS as error:
        if len(paths) > 1:
            return sum(_print_predictions(model, [path]) for path in paths)
        _fail(error, 1)
        return 1
    for path, label, score in zip(paths, labels, scores.max(1), strict=True):
        print(f"{path}\t{label}\t{score:.4f}")
    sys.stdout.flush()
    return 0


def _suffix(path: Path) -> str:
    return path.suffix.lower() or "without a suffix"


def _sweep(words: list[str]) -> None:
    """Run every point of a grid of settings, or what is left of it."""

    def sweep(
        grid: Annotated[
            tyro.conf.Positional[str],
            tyro.conf.arg(metavar="GRID", help="TOML file with [base], [grid] and [[points]]"),
        ],
        jobs: Annotated[
            int | None, tyro.conf.arg(metavar="INT", help="processes at a time; none: 1")
        ] = None,
        ray: Annotated[
            tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help="run each point as a Ray task")
        ] = False,
        slurm: Annotated[
            str | None,
            tyro.conf.arg(metavar="FILE", help="write a job array for Slurm, run nothing"),
        ] = None,
        list: Annotated[
            tyro.conf.FlagCreatePairsOff[bool],
            tyro.conf.arg(help="show the points and how far they are, run nothing"),
        ] = False,
        point: Annotated[
            int | None,
            tyro.conf.arg(metavar="INT", help="run this one alone, numbered as in --list"),
        ] = None,
        modules: _Modules = (),
    ) -> None:
        import_modules(modules)
        ways = {"jobs": jobs, "ray": ray, "slurm": slurm, "list": list, "point": point}
        given = [f"--{name}" for name, v in ways.items() if v is not None and v is not False]
        if len(given) > 1:
            raise ValueError(f"[sweep] expected one way to run it, got {' and '.join(given)}")
        points, _ = sweeping.read_grid(grid)
        if list:
            _print_points(points)
        elif slurm is not None:
            sweeping.write_slurm_script(grid, slurm)
            print(f"{len(points)} points: sbatch {shlex.quote(slurm)}")
        elif point is not None:
            if not 0 <= point < len(points):
                raise ValueError(f"[sweep] 'point': expected 0 ... {len(points) - 1}, got {point}")
            _show(run(points[point].config))
        else:
            _run_points(grid, points, jobs=1 if jobs is None else jobs, ray=ray)

    _call(sweep, words, "sweep", _sweep.__doc__)


def _run_points(grid: str, points: Sequence[sweeping.Point], jobs: int, ray: bool) -> None:
    try:
        ntkcl.sweep(grid, jobs=jobs, ray=ray)
    except SweepError as error:
        _print_points(points, error.failures)
        raise
    _print_points(points)


def _print_points(points: Sequence[sweeping.Point], failed: Iterable[str] = ()) -> None:
    columns = [name.replace("_", " ") for name in HEADLINE[:3]]
    rows = []
    for number, point in enumerate(points):
        state = point.state
        numbers = point.load().headline() if state == "finished" else {}
        texts = [numbers.get(column, "-") for column in columns]
        rows.append([str(number), point.name, "failed" if point.name in failed else state, *texts])
    _print_table(["", "point", "state", *columns], rows)


def _report(words: list[str]) -> None:
    """Compare finished runs: tables, plots, CSV and LaTeX."""

    def report(
        runs: Annotated[
            tyro.conf.Positional[tuple[str, ...]],
            tyro.conf.arg(metavar="RUN ...", help="run folders, or folders that hold some"),
        ],
        output: Annotated[
            str, tyro.conf.arg(metavar="FILE", help="HTML file; .csv and .tex go beside it")
        ] = "report.html",
        together: Annotated[
            tyro.conf.FlagCreatePairsOff[bool],
            tyro.conf.arg(help="one table for runs of different protocols"),
        ] = False,
    ) -> None:
        path = reporting.checked_output(output)
        tables = compare(runs, together)
        reporting.write(tables, path)
        _show_tables(tables)
        print(f"  in {path}, {path.with_suffix('.csv')}, {path.with_suffix('.tex')}")

    _check_values(words, {"output"})
    _call(report, words, "report", _report.__doc__)


def _show_tables(tables: Comparison) -> None:
    console = Console()
    say = functools.partial(console.print, soft_wrap=True, highlight=False, markup=False)
    columns = reporting.quoted_columns()
    for number, table in enumerate(tables, start=1):
        for line in (reporting.table_title(number, tables), *reporting.notes(tables, number)):
            say(line)
        _print_table(
            ["method", "seeds", *(column.title for column in columns)],
            [
                [group.name, group.seeds, *(reporting.spread_text(group, c) for c in columns)]
                for group in table.groups
            ],
        )
    for line in reporting.left_out(tables):
        say(f"  {line}")


def _call(function: Callable[..., None], words: list[str], name: str, doc: str | None) -> None:
    """Calls it with the arguments in `words`, if it knows them all."""

    @functools.wraps(function)
    def bind(*values: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(function, *values, **named)

    bound, unknown = tyro.cli(
        bind, args=words, prog=f"ntkcl {name}", description=doc, return_unknown_args=True
    )
    if unknown:
        raise ValueError(f"[ntkcl] unknown argument '{unknown[0]}'; see `ntkcl {name} --help`")
    bound()


# ---- What there is -------------------------------------------------------------------------------


def _info(_: list[str]) -> None:
    """Print versions, devices and build options."""
    _print_table(["", ""], [[key, value] for key, value in ntkcl.info().items()])


def _methods(_: list[str]) -> None:
    """List the methods."""
    described = _C.describe_options()["methods"]
    _print_table(
        ["method", "what it is", "variants"],
        [[name, entry["doc"], ", ".join(entry["variants"])] for name, entry in described.items()],
    )


def _datasets(_: list[str]) -> None:
    """List the data sets that are known by name, and where they come from."""
    _print_table(["data set", "how to get it"], [list(known) for known in KNOWN_DATASETS.items()])


def _presets(_: list[str]) -> None:
    """List the published settings, with the accuracies published for them."""
    rows = []
    for name, preset in PRESETS.items():
        classes = f"{preset['initial_classes']}+{preset['increment']}"
        keys = ("learning_rate", "batch_size", "epochs")
        mean, final = PUBLISHED.get(name, (None, None))
        if name in PUBLISHED_TASK_MEANS:
            final, _forgetting = PUBLISHED_TASK_MEANS[name]
        accuracies = ("-" if value is None else f"{value:.2f}" for value in (mean, final))
        rows.append([name, classes, *(f"{preset[key]:.4g}" for key in keys), *accuracies])
    _print_table(["preset", "classes", "rate", "batch", "epochs", "mean", "final"], rows)


def _backbones(_: list[str]) -> None:
    """List the backbones."""
    rows = []
    for name in ntkcl.list_backbones():
        known = backbone_info(name)
        sizes = (known.depth, known.width, known.heads, known.patch_size, known.image_size)
        rows.append([name, *map(str, sizes)])
    _print_table(["backbone", "blocks", "width", "heads", "patch", "image"], rows)


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "resume": _resume,
    "evaluate": _evaluate,
    "predict": _predict,
    "sweep": _sweep,
    "report": _report,
    "info": _info,
    "methods": _methods,
    "datasets": _datasets,
    "presets": _presets,
    "backbones": _backbones,
}


def _print_help() -> None:
    print("usage: ntkcl COMMAND [OPTIONS]\n\ncommands:")
    for name, command in _COMMANDS.items():
        print(f"  {name:<11}{command.__doc__}")
    print("\n`ntkcl train --help` lists every key of the configuration.")


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_header=any(head), padding=(0, 1, 0, 0))
    for column, name in enumerate(head):
        table.add_column(name, no_wrap=column == 0)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width
        console.width = 120
    console.print(table)
