"""The commands ``vitpatch`` and ``vitpatch-train``; in a checkout they are also ``patch.py`` and ``train_eval.py``."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable

import hydra
from omegaconf import DictConfig

from vitpatch.cli.job import INTERRUPTED, job
from vitpatch.cli.sweep import SweepCallback, exit_on_error
from vitpatch.runs.config import CONF, register_resolvers
from vitpatch.runs.distributed import SIGNALS, launched
from vitpatch.runs.names import with_quotes

log = logging.getLogger(__name__)


def patch() -> None:
    """One patching run, or with ``-m`` a sweep: ``vitpatch -m corruption=gray,noise window=1,3,5``."""
    run_command(hydra.main(version_base="1.3", config_path=str(CONF), config_name="patch")(_patch))


def train() -> None:
    """Trains a classifier and evaluates it, clean and corrupted: ``vitpatch-train [overrides]``."""
    run_command(hydra.main(version_base="1.3", config_path=str(CONF), config_name="train_eval")(_train))


def _patch(cfg: DictConfig) -> None:
    job("vitpatch.runs.run", cfg)


def _train(cfg: DictConfig) -> None:
    job("vitpatch.training.fit", cfg)


def run_command(main: Callable[[], None]) -> None:
    """Calls Hydra's ``main``; a sweep that is stopped, or whose launcher breaks, ends in the table of its runs too.

    Names in the command are what was typed, also where Hydra would read numbers.
    """
    register_resolvers()
    with exit_on_error():
        if launched() is not None and _assists():
            return
        sys.argv[1:] = map(with_quotes, sys.argv[1:])
    try:
        main()
    except KeyboardInterrupt:  # outside of a job, which answers for itself
        log.error("interrupted: the same command goes on with what is not finished")
        sys.exit(INTERRUPTED)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # another CTRL-C has nothing to stop any more
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        raise
    finally:
        if SweepCallback.launched is not None:  # Hydra has not called its end
            SweepCallback.launched.report()


def _assists() -> bool:
    """Whether this is not rank 0 of the processes that a launcher started; it then has assisted that to its end."""
    from vitpatch.runs.distributed import launched_group
    from vitpatch.runs.predict import assist

    group = launched_group()
    if group.rank:
        assist(group)
    return group.rank > 0
