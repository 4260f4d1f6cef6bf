"""Images of a run, small, as addresses that hold the image itself."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 160
"""Pixels of the longer side at most."""
AS_IT_IS = 64
"""Images up to this side are kept to the pixel."""


def data_url(picture: NDArray[np.uint8]) -> str:
    """``picture`` (height, width, 3) as a ``data:`` address: PNG of a small one, else JPEG of ``SIDE`` at most."""
    image, file = Image.fromarray(picture), io.BytesIO()
    if max(image.size) <= AS_IT_IS:
        image.save(file, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((SIDE, SIDE))
        image.convert("RGB").save(file, "JPEG", quality=80)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
