"""`dure`, and `python -m serve`: the command line, from its first moment on."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command that sys.argv names, and exit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules are imported there is nothing to clear up
    from serve.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    main.main()


if __name__ == "__main__":
    main()
