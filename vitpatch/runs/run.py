"""One run, from the composed config to the finished folder."""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vitpatch import __version__
from vitpatch.checks import check_no_secret
from vitpatch.errors import VitPatchError
from vitpatch.formatting import describe_difference, digest, override_key
from vitpatch.io import write_csv
from vitpatch.plots.layout import FigureOptions
from vitpatch.plots.run_figures import draw
from vitpatch.runs.batches import choose_examples, tables_in_view
from vitpatch.runs.calibration import calibration_folder
from vitpatch.runs.config import check_names_are_text, corruption_options, read_figures
from vitpatch.runs.folder import VIEWS, Begun, RunFolder, Shards
from vitpatch.runs.predict import PredictionResult, data_module, estimate_run, predict
from vitpatch.runs.reading import FinishedRun, RunTables, load_run, write_pages
from vitpatch.runs.results import closing_lines, manifest_entries, next_runs, tracker_values
from vitpatch.runs.setup import Setup, prepare, take_from_training
from vitpatch.runs.tracking import Results, RunInfo, Tracker, history, make_tracker
from vitpatch.runs.trainer import check_processes, use_threads
from vitpatch.stats.result import RunResult, series_names
from vitpatch.stats.suggestions import Possible, stronger_option
from vitpatch.study import Study, View, without_view
from vitpatch.types import Site

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "lightning", "datasets", "hydra-core", "wandb", "numpy")


def run(cfg: DictConfig, path: Path, options: dict[str, str] | None = None) -> None:
    """Makes the run that ``cfg`` describes in the folder ``path``; ``options`` are the names of the chosen options.

    A finished run of the same ``run_id`` is left as it is, and read where another view of it is asked for; one that was
    stopped goes on. Raises ``VitPatchError`` for what the user can mend, ``Interrupted`` where it was asked to stop.
    """
    check_no_secret(OmegaConf.to_container(cfg, resolve=True))
    check_names_are_text(cfg)
    started = time.monotonic()
    tracker = make_tracker(cfg)
    setup = prepare(cfg, None if cfg.get("calibrate") is None else calibration_folder(path))
    for note in setup.notes:  # also before, for it may be a reason to stop
        log.warning("note: %s", note)
    folder = RunFolder(path)
    if cfg.dry_run:
        folder.mark_planned(estimate_run(setup, data_module(setup, cfg.batch_size)) or "no image can be read")
        return
    if _is_finished(folder, setup, cfg.overwrite):
        _read(load_run(path), setup)
        return
    check_processes(setup.trainer)
    shards = Shards(folder.shards)
    begun = _begin(folder, shards, setup)
    with use_threads(begun.threads):
        setup = replace(setup, cfg=OmegaConf.merge(setup.cfg, {"batch_size": begun.batch_size}))
        _make(take_from_training(setup), folder, shards, tracker, started, options or {})


def _make(
    setup: Setup,
    folder: RunFolder,
    shards: Shards,
    tracker: Tracker,
    started: float,
    options: Mapping[str, str],
) -> None:
    """Makes a run that has begun, up to its finished folder."""
    cfg, path, trainer = setup.cfg, folder.path, setup.trainer
    config = OmegaConf.to_container(setup.cfg, resolve=True) | {"options": dict(options), "run_id": setup.run_id}
    info = RunInfo(path, str(cfg.sweep), config)
    with ExitStack() as after_tracker, tracker.run(info) as tracked:
        data = data_module(setup, cfg.batch_size)
        patching_started = time.monotonic()
        done = predict(setup, data, shards)
        patching_seconds = time.monotonic() - patching_started
        if done.skipped == len(setup.images):
            shards.remove()
            raise VitPatchError(f"data {cfg.data.path}: none of the {done.skipped} images can be read")
        _merge(shards, folder, setup.study, data.batches)
        result = RunTables(folder, setup.study).analyze(setup.plan.donors)
        write_csv(folder.summary, result.summary)
        if result.marginals is not None:
            write_csv(folder.marginals, result.marginals)
        pages = choose_examples(setup, result, data)
        write_pages(folder.pages, pages)
        described = {"title": setup.title, **setup.describe_training()}  # what pictures take from the manifest
        drawing = FigureOptions(*read_figures(cfg.figures))
        pictures = folder.save_figures(draw(result, pages, described, drawing), drawing)
        pictures = {name: [file for file in files if file.suffix == ".png"] for name, files in pictures.items()}
        typed = folder.typed_arguments()
        to_run = [] if typed is None else next_runs(result, folder, typed, _possible(setup, options, typed))
        manifest = described | _manifest(setup, config, result, done)
        manifest = (
            manifest
            | manifest_entries(result, manifest)
            | {
                "next": [command for _, command in to_run],
                "files": folder.checksums(),
                "devices": {
                    "accelerator": trainer.accelerator.name(),
                    "processes": trainer.world_size,
                    "nodes": trainer.num_nodes,
                },
                "tracking": tracked.details,
                "seconds": round(time.monotonic() - started, 3),
                "images_per_second": round(done.images / patching_seconds, 3),
            }
        )
        files = {file.name: file for file in folder.tables}
        files[folder.manifest.name] = after_tracker.enter_context(folder.writing_manifest(manifest))
        by_layer = history(result.summary, series_names(result.summary))
        tables = {"effects": result.summary}
        found = "\n".join([*manifest["finding"], *(f"\nNext, {why}:\n{command}" for why, command in to_run)])
        tracked.log(Results("effects", tables, pictures, files, by_layer, tracker_values(result), found))
    shards.remove()
    for line in closing_lines(result, folder, manifest, to_run):
        log.info("%s", line)
    if done.skipped:
        log.info("  skipped       %d of %d images could not be read", done.skipped, len(setup.images))
    if tracked.sync_command:
        log.info("  W&B offline   %s", tracked.sync_command)


def _merge(shards: Shards, folder: RunFolder, study: Study, batches: int) -> None:
    """Joins the shards, which are in the default view, into the run's tables in the study's."""
    into = {file.stem: file for file in (folder.examples, folder.effects, folder.leave_outs)}
    if study.of_tables == View().of_tables:
        shards.merge(into, batches)
    else:
        shards.merge(into, batches, lambda tables: tables_in_view(tables, study))


def _possible(setup: Setup, options: Mapping[str, str], typed: Sequence[str]) -> Possible:
    """What can be asked of the model and data of a run that was started by what was ``typed``."""
    has_own_strength = setup.wanted is not None or any(override_key(one).startswith("corruption.") for one in typed)
    return Possible(
        stronger="" if has_own_strength else stronger_option(options.get("corruption", ""), corruption_options()),
        limit=setup.cfg.data.get("limit"),
        has_cls="cls" in setup.plan.sizes.special,
        has_heads=Site.Z not in setup.model.missing,
    )


def _manifest(setup: Setup, config: dict[str, Any], result: RunResult, done: PredictionResult) -> dict[str, Any]:
    """The manifest's entries, but for those of the result, on files, devices, tracking and times."""
    cfg = setup.cfg
    return {
        "run_id": setup.run_id,
        "donors": [str(donor) for donor in result.donors],
        "config": config,
        "versions": _versions(),
        "model": {
            "path": cfg.model.path,
            "revision": cfg.model.revision,
            "commit": setup.checkpoint.commit,
            "weights": setup.model.weights_digest,
            "checkpoint": setup.model.checkpoint_digest,
            "layers": setup.plan.sizes.depth,
            "problem_type": setup.model.model.config.problem_type,
        },
        "identity": setup.identity,
        "view_id": setup.study.view.view_id,
        "view": setup.study.view.as_config(),
        "data": {"digest": setup.images.digest},
        "counts": _counts(setup, result, done.skipped),
        "label_notes": setup.notes,
        "plan": {"line": done.line, "stepwise": setup.model.runs_by_parts(setup.study.target.site)},
        "precision_error": done.precision_error,
    }


def _is_finished(folder: RunFolder, setup: Setup, overwrite: bool) -> bool:
    """Whether the same run is finished. Raises ``VitPatchError`` where another is, or its files are not whole."""
    manifest = folder.read_manifest()
    if manifest is None or overwrite:
        return False
    identity = without_view(manifest.get("identity", {}))
    if digest(identity) != setup.run_id:
        difference = describe_difference(identity, setup.identity)
        raise VitPatchError(
            f"{folder.path} holds a finished run with other {difference}; choose another folder or sweep name, or "
            "overwrite=true"
        )
    checksums = folder.checksums()
    changed = [name for name, expected in manifest.get("files", {}).items() if checksums.get(name) != expected]
    if changed:
        raise VitPatchError(
            f"{folder.path}: {', '.join(changed)} of the finished run: gone, or not as written; overwrite=true runs it "
            "again"
        )
    Shards(folder.shards).remove()  # of a run that was killed just after its last act
    return True


def _read(run: FinishedRun, setup: Setup) -> None:
    """Reads a finished run in the view that is asked for, where that is not its own."""
    path, view = run.folder.path, setup.study.view
    if view == run.view:
        log.info("%s: finished before, nothing to do (overwrite=true runs it again)", path)
        return
    own, asked = run.view.as_config(), view.as_config()
    differing = ", ".join(f"{key}={value} (it is at {own[key]})" for key, value in asked.items() if value != own[key])
    log.info("%s: finished before; it is read at %s, and nothing is computed again", path, differing)
    read = run.read_as(view)
    into = read.save(path / VIEWS / view.view_id, FigureOptions(*read_figures(setup.cfg.figures)))
    for line in closing_lines(read.result, into, read.manifest):
        log.info("%s", line)


def _begin(folder: RunFolder, shards: Shards, setup: Setup) -> Begun:
    """Prepares the folder, or resumes the run that is in it; removes what ``overwrite`` replaces."""
    replaced = folder.read_manifest() is not None
    earlier = shards.begun()
    if replaced or (setup.cfg.overwrite and earlier is not None and earlier.run_id != setup.run_id):
        shards.remove()
    batch_size = batch_size_for(setup.cfg.batch_size, len(setup.images), setup.trainer.world_size)
    begun = shards.begin(Begun(setup.run_id, setup.identity, batch_size, threads=_threads(setup)))
    folder.begin()
    if begun.batch_size != batch_size:
        log.info("batch_size is %d, as the run began with: its batches are not cut anew", begun.batch_size)
    if begun.threads not in (None, now := _threads(setup)):
        log.info("%d threads a process, as the run began with, not %s: sums are rounded by them", begun.threads, now)
    return begun


def batch_size_for(asked: int, images: int, processes: int) -> int:
    """How many images a batch has: ``asked``, or fewer, so that every process has a batch."""
    return min(asked, math.ceil(images / processes)) if processes > 1 else asked


def _threads(setup: Setup) -> int | None:
    """How many threads each process computes by, since sums are rounded by them; ``None`` where it is not on a CPU."""
    return torch.get_num_threads() if setup.trainer.strategy.root_device.type == "cpu" else None


@cache
def _versions() -> Mapping[str, str]:
    own = {"vitpatch": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in PACKAGES}


def _counts(setup: Setup, result: RunResult, skipped: int) -> dict[str, Any]:
    read, include, donor = len(setup.images) - skipped, setup.study.include, setup.study.donor
    alone = result.without_partner
    dropped = {
        "unreadable": skipped,
        "left out by label_map": setup.images.left_out,
        f"no {donor} partner": alone,
        f"not {include}": read - alone - len(result.examples),
    }
    return {
        "images": len(setup.images) + setup.images.left_out,
        "read": read,
        "included": len(result.examples),
        "dropped": {why: number for why, number in dropped.items() if number},
        "clusters": result.clusters,
        "patches": len(setup.plan.patches),
    }
