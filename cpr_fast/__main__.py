"""Runs the command line: `python -m cpr_fast COMMAND ...` is the same as `cpr-fast COMMAND ...`."""

import sys


def run() -> int:
    """Runs one command and returns the exit code; a Ctrl-C while the command line itself is imported ends in one line,
    too."""
    try:
        from cpr_fast.cli import main

        return main()
    except KeyboardInterrupt:
        import shlex

        again = shlex.join(["cpr-fast", *sys.argv[1:]])
        print(f"cpr-fast: interrupted; nothing had begun; to start again: {again}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())
