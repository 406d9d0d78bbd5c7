"""The command `onevoice`, also as `python -m onevoice`."""

from onevoice.cli import main

if __name__ == "__main__":
    main()
