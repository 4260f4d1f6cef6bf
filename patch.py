"""One patching run, or with ``-m`` a sweep: ``python patch.py -m corruption=gray,noise window=1,3,5``."""

from vitpatch.cli.commands import patch

if __name__ == "__main__":
    patch()
