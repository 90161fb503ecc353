"""`python -m common` is `recipe`."""

from common.cli import main

main()
