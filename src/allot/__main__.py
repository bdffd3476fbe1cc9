"""`python -m allot` is the same command as `allot`."""

from allot.cli.main import main

if __name__ == "__main__":
    main()
