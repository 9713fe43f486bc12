"""`python -m ktransformers` is the command line."""

from ktransformers.cli import main

main(prog_name="ktransformers")
