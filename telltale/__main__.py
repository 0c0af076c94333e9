"""`python -m telltale` is the console script `telltale`."""

from telltale.cli import main

if __name__ == "__main__":
    main()
