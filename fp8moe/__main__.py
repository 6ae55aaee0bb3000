"""`python -m fp8moe`: the command, also where it is not installed."""

from fp8moe.cli import main

main()
