"""``python -m vitpatch.compare``."""

from vitpatch.cli.compare import main

main()
