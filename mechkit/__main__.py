"""The command `mechkit`, also as `python -m mechkit`."""

import sys


def main() -> None:
    """Runs the command line; says what to install where a package that it needs is missing."""
    try:
        from mechkit.cli import app
    except ModuleNotFoundError as error:
        sys.exit(f"mechkit: {error}")
    app(prog_name="mechkit")


if __name__ == "__main__":
    main()
