"""Learn the handwritten digits two at a time, with the backbone that ships with ntkcl."""

import argparse

import ntkcl

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--train-per-class", type=int, help="training images of each class; else all")
result = ntkcl.train(**vars(parser.parse_args()))
print(result)
print(result.accuracy_matrix.round(1))
