"""The pipeline's folder: where the bundled weights are, and how they are written and verified."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline

from dit_lens.reasoner.settings import CALL

HASHES = "hashes.json"


def folder() -> Path:
    """Where the bundled pipeline is."""
    return Path(__file__).parent / "weights"


def open_pipeline(where: Path, dtype: torch.dtype = torch.float32) -> WanImageToVideoPipeline:
    """A saved pipeline, computing in `dtype` (it is stored in bfloat16)."""
    return WanImageToVideoPipeline.from_pretrained(where, dtype=dtype, local_files_only=True)


def save_pipeline(pipeline: WanImageToVideoPipeline, where: Path, training: dict[str, Any]) -> None:
    """Write a pipeline in bfloat16, in shards under 16 MB, with its training record, default settings and hashes.

    What else lies in the folder (the model card) stays.
    """
    for old in (p for p in where.glob("*") if p.is_dir()):
        shutil.rmtree(old)
    pipeline.to(torch.bfloat16).save_pretrained(where, max_shard_size="15MB")
    (where / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    (where / "call.json").write_text(json.dumps(CALL, indent=1) + "\n")
    write_hashes(where)


def write_hashes(where: Path) -> None:
    """Write the SHA-256 of every file that a pipeline is loaded from, by its path in the folder."""
    files = sorted(p for p in where.rglob("*") if (p.is_file() and p.parent != where) or p.name == "model_index.json")
    hashes = {str(p.relative_to(where)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (where / HASHES).write_text(json.dumps(hashes, indent=1) + "\n")


def megabytes(where: Path) -> float:
    """The size of a folder's files in MB (10^6 bytes)."""
    return sum(p.stat().st_size for p in where.rglob("*") if p.is_file()) / 1e6
