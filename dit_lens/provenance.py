"""Where a result came from: which weights, which code, which versions, which machine.

A measured part may be used again only if nothing that shaped it has changed. `fingerprint` condenses the model's weights,
the scheduler, the settings and the code into one word; the manifest of an experiment spells out the same things for a
person.
"""

import ast
import hashlib
import inspect
import json
import platform
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_lens import reasoner

DRAWING = {"cli.py", "report.py", "plots.py", "claims.py"}
"""Modules that show or judge results without shaping them: a change there leaves measured parts valid."""


def fingerprint(lens: Any, settings: Mapping[str, Any], arguments: Mapping[str, Any], source: Path) -> str:
    """Sixteen hex digits that change whenever a measurement could.

    ``settings`` and ``arguments`` are the experiment's own and those overridden for the pipeline; ``source`` is the file of
    the experiment. Folders that are tasks count by what they hold. The device type and TF32 count, since numerics differ there;
    the number of threads does not.
    """
    facts = {
        "model": lens.hash,
        "scheduler": scheduler_facts(lens),
        "settings": dict(settings),
        "folders": folder_hashes(settings),
        "arguments": dict(arguments),
        "code": code_hash(source),
        "device": (lens.pipe.device.type, tf32(lens.pipe.device)),
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def folder_hashes(settings: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 over the samples of every folder that settings name as a task, by its path."""
    named = [word for value in settings.values() for word in (value if isinstance(value, list | tuple) else [value])]
    folders = [Path(word) for word in named if isinstance(word, str) and word not in reasoner.tasks() and Path(word).is_dir()]
    found = {}
    for folder in folders:
        # Only who reads videos needs what decodes them.
        from dit_lens.reasoner import vbvr

        digest = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.name in vbvr.FILES and path.is_file()):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        found[str(folder)] = digest.hexdigest()
    return found


@cache
def code_hash(source: Path) -> str:
    """SHA-256 over the source of ``source`` and of what it imports from beside it, of dit_lens (without what only draws or
    trains) and of probes.

    Read once in a process, as the code that runs was read once too.
    """
    files = [source, *_beside(source)]
    for package in ("dit_lens", "probes"):
        folder = Path(inspect.getfile(import_module(package))).parent
        files += [path for path in folder.rglob("*.py") if path.name not in DRAWING and "train" not in path.name]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _beside(source: Path) -> set[Path]:
    """The modules of ``source``'s own package that it imports, and that these import, without those that only draw or judge."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        nodes = ast.walk(ast.parse(waiting.pop().read_text(encoding="utf-8")))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        own = [node for node in imports if (node.module or "").split(".")[0] == source.parent.name]
        names = {name for node in own for name in ((node.module or "").split(".")[-1], *(each.name for each in node.names))}
        paths = {source.parent / f"{name}.py" for name in names if not name.endswith(("figures", "claims"))}
        new = {path for path in paths if path.is_file()} - found - {source}
        found |= new
        waiting += new
    return found


def scheduler_facts(lens: Any) -> dict[str, Any]:
    """Class and configuration of the pipeline's scheduler."""
    scheduler = lens.pipe.scheduler
    # Which of the values are defaults is listed in an order that differs from process to process.
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    return {"class": type(scheduler).__name__, "config": config}


def model_facts(lens: Any) -> dict[str, Any]:
    """What the manifest says of a model: its name, hash, classes and number of parameters."""
    modules = {name: part for name, part in lens.pipe.components.items() if isinstance(part, nn.Module)}
    return {
        "name": lens.name,
        "hash": lens.hash,
        "pipeline": type(lens.pipe).__name__,
        "classes": {name: type(part).__name__ for name, part in modules.items()},
        "parameters": {name: sum(weight.numel() for weight in part.parameters()) for name, part in modules.items()},
        "dtype": str(lens.pipe.dtype).removeprefix("torch."),
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {name: version(name) for name in ("dit_lens", "torch", "diffusers", "transformers", "nnsight")}


def tf32(device: torch.device) -> bool:
    """Whether float32 matrices are multiplied in TF32 there."""
    return device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"


def device_facts(lens: Any) -> dict[str, Any]:
    """The device, in words: what computed, under which system, with how many threads."""
    device = lens.pipe.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "type": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()}, Python {platform.python_version()}",
        **({"tf32": True} if tf32(device) else {}),
    }
