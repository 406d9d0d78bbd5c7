"""`python -m onevoice` and the command `onevoice`."""

from onevoice.cli import main

if __name__ == "__main__":
    main()
