"""Entry points of the commands: `advprop`, `advprop-export` and `python -m advprop`."""

from __future__ import annotations

from advprop.shadowing import prefer_own_packages


def main() -> None:
    """Run `advprop`."""
    prefer_own_packages()
    from advprop.cli import main as command

    command()


def export() -> None:
    """Run `advprop-export`."""
    prefer_own_packages()
    from export.cli import main as command

    command()


if __name__ == "__main__":
    main()
