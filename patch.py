"""One patching run, or with ``-m`` a sweep: ``python patch.py -m corruption=gray,noise window=1,3,5``."""

import hydra
from omegaconf import DictConfig

from vitpatch.cli.job import job
from vitpatch.cli.sweep import to_the_end
from vitpatch.runs.config import register_resolvers

register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="patch")
def main(cfg: DictConfig) -> None:
    """Runs the job that Hydra composed."""
    job("vitpatch.runs.run", cfg)


if __name__ == "__main__":
    to_the_end(main)
