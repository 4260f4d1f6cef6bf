"""The bar of a run: one, however many processes work at it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class ImageProgress(ProgressBar):
    """A bar that counts images, and so shows images per second and the time left; from the first batch on.

    ``through`` says how many images all processes are through; it is closed by whoever made it.
    """

    def __init__(self, images: int, name: str, through: Callable[[], int]) -> None:
        super().__init__()
        self._total, self._name, self._through, self._before = images, name, through, through()

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Notes the time."""
        self._started = time.time()

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: tuple,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Moves on; where nobody watches, every 10 s only."""
        if not hasattr(self, "_bar"):
            often = 1.0 if sys.stderr.isatty() else 10.0
            self._bar = tqdm(
                total=self._total,
                initial=self._before,
                desc=self._name,
                unit=" images",
                mininterval=often,
                dynamic_ncols=True,
            )
            self._bar.start_t = self._moved = self._started
        self.move()

    def move(self) -> None:
        """Moves on by the images that any process is through since, unreadable ones too; by files, so not often."""
        if hasattr(self, "_bar") and time.time() - self._moved > self._bar.mininterval:
            self._moved = time.time()
            self._bar.update(self._through() - self._bar.n)

    def close(self) -> None:
        """Ends the bar's line, so that what follows stands on a line of its own."""
        if hasattr(self, "_bar"):
            self._bar.update(self._through() - self._bar.n)
            self._bar.close()

    def disable(self) -> None:
        """Lightning's call for all processes but the first."""
