"""`python -m parity` is `dora-parity`."""

from parity.commands.cli import main

if __name__ == "__main__":
    main()
