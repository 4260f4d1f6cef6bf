"""Trains a classifier and evaluates it, clean and corrupted: ``python train_eval.py [overrides]``."""

import hydra
from omegaconf import DictConfig

from vitpatch.config import register_resolvers
from vitpatch.job import job
from vitpatch.sweep import to_the_end

register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="train_eval")
def main(cfg: DictConfig) -> None:
    """Runs the training that Hydra composed."""
    job("vitpatch.fit", cfg)


if __name__ == "__main__":
    to_the_end(main)
