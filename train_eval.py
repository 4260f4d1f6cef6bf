"""Trains a classifier and evaluates it, clean and corrupted: ``python train_eval.py [overrides]``."""

from vitpatch.cli.commands import train

if __name__ == "__main__":
    train()
