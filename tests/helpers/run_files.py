"""What a finished run leaves."""

RESULTS = ("examples.parquet", "effects.parquet", "leave_outs.parquet", "summary.csv", "marginals.csv", "pages.parquet")


def results(folder):
    """The bytes of a finished run's files, by name."""
    assert (folder / "manifest.json").exists() and not (folder / "shards").exists()
    left = [path for path in folder.rglob("*") if path.suffix == ".part"]
    assert not left, left
    return {name: (folder / name).read_bytes() for name in RESULTS if (folder / name).exists()}
