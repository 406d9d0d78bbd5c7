"""Evaluate: `python3 eval.py --c configs/test_config.json --r CHECKPOINT`, the same as `onevoice eval`."""

import sys

from onevoice.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
