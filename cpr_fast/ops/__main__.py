"""`python -m cpr_fast.ops --cmake-dir`: prints where C++ programs find the kernels."""

import argparse

from cpr_fast.ops import cmake_dir, include_dir


def main() -> None:
    """Prints the directory that the option asks for; exits with 1 if it does not exist."""
    parser = argparse.ArgumentParser(prog="python -m cpr_fast.ops", description="Where C++ programs find the kernels.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--cmake-dir", action="store_true", help="print the directory of cpr_fast-config.cmake")
    which.add_argument("--include-dir", action="store_true", help="print the directory of cpr_fast.h")
    arguments = parser.parse_args()
    try:
        print(cmake_dir() if arguments.cmake_dir else include_dir())
    except FileNotFoundError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
