"""Train: `python3 train.py --c configs/tiny.json [--r CHECKPOINT]`, the same as `onevoice train`."""

import sys

from onevoice.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
