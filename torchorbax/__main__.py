"""`python -m torchorbax` and the `torchorbax` command."""

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from torchorbax._src.cli.app import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"the torchorbax command needs {error.name}: pip install 'torchorbax[cli]'")
    run()


if __name__ == "__main__":
    main()
