"""``vitpatch-convert MODEL FOLDER``: a checkpoint that has only ``pytorch_model.bin`` → safetensors.

Weights are read with ``weights_only``: tensors, and no code.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vitpatch.errors import VitPatchError
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.models.formats import save_copy


def main(arguments: list[str] | None = None) -> None:
    """Converts; an error is one line."""
    parser = argparse.ArgumentParser(prog="vitpatch-convert", description=__doc__)
    parser.add_argument("model", help="a hub id, or a folder")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--revision", help="of a hub id")
    options = parser.parse_args(arguments)
    try:
        if options.folder.exists():
            raise VitPatchError(f"{options.folder}: is there already; name a new folder")
        checkpoint = Checkpoint(options.model, options.revision, allow_bin=True)
        written = save_copy(checkpoint, options.folder)
    except VitPatchError as error:
        sys.exit(f"error: {error}")
    print(f"{options.folder}: {', '.join(written)}; use it with model.path={options.folder}")


if __name__ == "__main__":
    main()
