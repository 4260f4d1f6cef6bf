"""What every worker of the peers' benchmark shares: the task as files, and the loop that answers the driver.

A worker is one process in one environment. It reads the same model, images and labels as every other worker, and
answers JSON lines: {"do": "open", "case": name}, {"do": "effects"}, {"do": "run"}, {"do": "quit"}. Requests come on
standard input; answers go to a pipe of their own, since some libraries print to standard output as they load.
Only torch, transformers, numpy and safetensors may be imported here: the file runs in every peer's environment.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification

Effects = Callable[[], torch.Tensor]  # one whole measurement: effects as (layers, images)


@dataclass
class Task:
    """The clean and the corrupted images, their labels, and the folder of the model."""

    model_folder: Path
    clean: torch.Tensor
    corrupt: torch.Tensor
    labels: torch.Tensor

    def model(self) -> ViTForImageClassification:
        """The model in float32 with sdpa attention, ready for inference."""
        model = ViTForImageClassification.from_pretrained(
            self.model_folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        return model.eval().requires_grad_(False)

    def probability(self, logits: torch.Tensor) -> torch.Tensor:
        """The softmax probability of each image's label."""
        return logits.softmax(-1).gather(1, self.labels[:, None])[:, 0]


def load_task(folder: Path) -> Task:
    """The task that the driver wrote into the folder."""
    tensors = load_file(folder / "images.safetensors")
    return Task(folder / "model", tensors["clean"], tensors["corrupt"], tensors["labels"])


def versions(packages: list[str]) -> dict[str, str]:
    """Installed versions of the packages."""
    return {name: importlib.metadata.version(name) for name in [*packages, "torch", "transformers"]}


def serve(packages: list[str], cases: dict[str, Callable[[Task], Effects]]) -> None:
    """Answer the driver until it quits; cases are the ways to do the task, the most natural one first."""
    folder, answers = Path(sys.argv[1]), os.fdopen(int(sys.argv[2]), "w", buffering=1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    task = load_task(folder)
    about = {"versions": versions(packages), "cases": list(cases), "threads": torch.get_num_threads()}
    print(json.dumps(about), file=answers)
    _loop(answers, folder, task, cases)


def _loop(answers: IO[str], folder: Path, task: Task, cases: dict[str, Callable[[Task], Effects]]) -> None:
    effects: Effects | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            return
        try:
            if request["do"] == "open":
                effects, answer = cases[request["case"]](task), {}
            else:
                answer = _measure(effects, request["do"], folder)
        except Exception as error:  # a peer may raise anything: the driver lists it and goes on
            text = " ".join(str(error).replace(str(folder), "FOLDER").split())
            answer = {"error": f"{type(error).__name__}: {text[:200]}"}
        print(json.dumps(answer), file=answers)


def _measure(effects: Effects | None, do: str, folder: Path) -> dict[str, Any]:
    if effects is None:
        raise RuntimeError("no case is open")
    start = time.perf_counter()
    result = effects()
    seconds = time.perf_counter() - start
    if do == "run":
        return {"seconds": seconds}
    path = folder / f"effects-{os.getpid()}.safetensors"
    save_file({"effects": result.detach().float().contiguous()}, path)
    return {"path": str(path)}
