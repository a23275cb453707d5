"""Learn your own images, a few classes at a time.

The images lie in <data>/train/<class>/ and <data>/test/<class>/, where <data> is a folder or a zip
file of one. Without a preset the small backbone that ships with ntkcl is used, on 32 x 32 pixels.

  python examples/folder_of_images.py flowers/ --initial-classes 4 --increment 2
  python examples/folder_of_images.py flowers.zip --preset ntk-cl/imagenet-r-in21k \\
      --weights vit_base_patch16_224.safetensors --increment 5
"""

import argparse

import ntkcl


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", metavar="data", help="folder or zip of images")
    parser.add_argument("--preset", choices=ntkcl.list_presets(), metavar="NAME")
    parser.add_argument("--method", choices=ntkcl.list_methods())
    parser.add_argument("--backbone", choices=ntkcl.list_backbones(), metavar="NAME")
    parser.add_argument("--weights", help="safetensors file of the backbone")
    parser.add_argument("--image-size", type=int, help="pixels; default: the backbone's")
    parser.add_argument("--initial-classes", type=int, help="classes of the first task")
    parser.add_argument("--increment", type=int, help="classes of each later task")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", help="run folder")
    return parser.parse_args()


def main() -> None:
    # What is not given follows the preset, then the defaults.
    given = {key: value for key, value in vars(arguments()).items() if value is not None}
    result = ntkcl.train(**given)
    print(result)
    for evaluation in result.evaluations:
        on_each = "  ".join(f"{accuracy:6.2f}" for accuracy in evaluation.per_task)
        print(f"after task {evaluation.task + 1}: {evaluation.top1:6.2f} %   by task: {on_each}")
    print(f"everything else is in {result.output}")


if __name__ == "__main__":
    main()
