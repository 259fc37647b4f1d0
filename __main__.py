"""`python -m depthmill`."""

from depthmill.cli import main

main()
