"""`python -m advprop`."""

from advprop.cli import main

main()
