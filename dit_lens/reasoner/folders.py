"""The pipeline's folder: where the bundled weights are, and the hashes that they are verified by."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

HASHES = "hashes.json"


def folder() -> Path:
    """Where the bundled pipeline is."""
    return Path(__file__).parent / "weights"


def write_hashes(where: Path) -> None:
    """Write the SHA-256 of every file that a pipeline is loaded from, by its path in the folder."""
    files = sorted(p for p in where.rglob("*") if (p.is_file() and p.parent != where) or p.name == "model_index.json")
    hashes = {str(p.relative_to(where)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (where / HASHES).write_text(json.dumps(hashes, indent=1) + "\n")


def megabytes(where: Path) -> float:
    """The size of a folder's files in MB (10^6 bytes)."""
    return sum(p.stat().st_size for p in where.rglob("*") if p.is_file()) / 1e6
