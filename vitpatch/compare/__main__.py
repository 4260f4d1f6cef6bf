"""``python -m vitpatch.compare``."""

from vitpatch.compare.compare import main

main()
