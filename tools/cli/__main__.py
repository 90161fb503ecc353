"""`python -m tools.cli` is `recipe`."""

from tools.cli.main import main

main()
