"""Trains a classifier and evaluates it, clean and corrupted: ``python train_eval.py [overrides]``."""

import hydra
from omegaconf import DictConfig

from vitpatch.cli.job import job
from vitpatch.cli.sweep import to_the_end
from vitpatch.runs.config import register_resolvers

register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="train_eval")
def main(cfg: DictConfig) -> None:
    """Runs the training that Hydra composed."""
    job("vitpatch.training.fit", cfg)


if __name__ == "__main__":
    to_the_end(main)
