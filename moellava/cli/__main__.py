"""`python -m moellava.cli`."""

from moellava.cli import main

main()
