"""Compare methods on the same tasks: mean and standard deviation over seeds, in percent.

A seed sets the order of the classes and every random draw, and is the same for all methods.

  python examples/compare_methods.py --seeds 0 1 2
  python examples/compare_methods.py --set epochs=5 learning_rate=0.05
"""

import argparse
import tomllib
from typing import Any

import ntkcl

COLUMNS = ("final accuracy", "average accuracy", "forgetting")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods", nargs="+", default=["lorac-ipc", "ntk-cl", "raa", "simple-cil"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="any key of ntkcl.train"
    )
    return parser.parse_args()


def value_of(text: str) -> Any:
    """Numbers, lists, true and false as TOML writes them; anything else is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def main() -> None:
    args = arguments()
    settings = {key: value_of(text) for key, _, text in (pair.partition("=") for pair in args.set)}
    rows = []
    for method in args.methods:
        numbers = ntkcl.train(method=method, seeds=args.seeds, **settings).headline()
        rows.append(method.ljust(12) + "".join(numbers[column].rjust(20) for column in COLUMNS))
    print("method".ljust(12) + "".join(column.rjust(20) for column in COLUMNS))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
