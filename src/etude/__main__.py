"""Entry point of the ``etude`` command; says which extra is missing where the command line cannot be loaded."""

import importlib.util
import sys

NEEDED = ("typer", "rich", "joblib", "filelock", "jinja2")


def main() -> None:
    """Run the command line, or say in one line what to install for it."""
    if any(importlib.util.find_spec(package) is None for package in NEEDED):
        print('etude: the command line needs the lab extra: pip install "etude[lab]"', file=sys.stderr)
        sys.exit(2)
    try:
        from etude import cli

        code = cli.main()
    except KeyboardInterrupt:  # while it was still loading
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
