"""Loading a pipeline from a folder or the hub, and knowing afterwards exactly which weights it has.

Weights are safetensors and nothing else: no pickle is opened and no code of a repository is run. A folder may hold a
`hashes.json`, which gives the SHA-256 of its files by relative path; then every file is checked before it is loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dit_lens.errors import InputError

HASHES = "hashes.json"


def load_pipeline(model: str | Path, device: str | torch.device | None, dtype: torch.dtype) -> tuple[Any, Path | None]:
    """A diffusers pipeline, on its device, and the folder that it came from (None for the hub).

    Args:
        model: `reasoner`, a folder that `save_pretrained` wrote, or the id of a model on the Hugging Face hub.
        device: where to put it; a GPU if there is one, when left out.
        dtype: the precision to compute in, whatever the files are stored in.

    Raises:
        InputError: there is no such folder, it is no pipeline, a file of it is damaged, or the hub cannot be reached.
    """
    folder = _reasoner() if str(model) == "reasoner" else Path(model).expanduser()
    local = folder.exists()
    if local:
        check_folder(folder)
    elif not _may_be_hub_id(str(model)):
        raise InputError(f"there is no folder {model}; write the folder of a pipeline, a hub id, or reasoner")
    pipe = _from_pretrained(str(folder) if local else str(model), dtype, local)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), folder if local else None


def check_folder(folder: Path) -> None:
    """Check that a folder holds a pipeline whose files are not damaged, as far as that can be seen.

    Every weight file must open; where there is a `hashes.json`, every file in it must be there and have its hash.

    Raises:
        InputError: it is no pipeline, or a file is missing or damaged; the message names the file.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; write the folder of a pipeline")
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    for name, expected in _expected_hashes(folder).items():
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing, and {HASHES} lists it")
        if file_hash(folder / name) != expected:
            raise InputError(f"{folder / name} is damaged: its SHA-256 is not the one in {HASHES}; fetch it again")
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise InputError(f"{path} is damaged: {error}") from error


def folder_hash(folder: Path) -> str:
    """SHA-256 over the weight files of a pipeline folder: their relative paths and their own hashes."""
    files = _expected_hashes(folder)  # checked when the folder was loaded
    digest = hashlib.sha256()
    for path in _weight_files(folder):
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name} {files.get(name) or file_hash(path)}\n".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_hash(modules: dict[str, nn.Module]) -> str:
    """SHA-256 over the parameters and buffers of modules: names, types, shapes and values, wherever these are kept."""
    digest = hashlib.sha256()
    for part, module in sorted(modules.items()):
        for name, tensor in sorted(module.state_dict().items()):
            tensor = _offloaded(module, name) if tensor.is_meta else tensor
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _offloaded(module: nn.Module, name: str) -> torch.Tensor:
    """The values of a parameter that accelerate keeps elsewhere, and brings only while its module runs.

    Raises:
        InputError: it is kept nowhere.
    """
    path, _, own = name.rpartition(".")
    hook: Any = getattr(module.get_submodule(path), "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        if getattr(part, "offload", False):
            return part.weights_map[own]
    raise InputError(f"{name} has no values: it is on torch's meta device; load the weights first")


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def _expected_hashes(folder: Path) -> dict[str, str]:
    if not (folder / HASHES).is_file():
        return {}
    try:
        hashes = json.loads((folder / HASHES).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder / HASHES} is damaged: {error}") from error
    return dict(hashes)


def _reasoner() -> Path:
    try:
        reasoner = importlib.import_module("dit_lens.reasoner")
    except ModuleNotFoundError as error:
        if error.name != "dit_lens.reasoner":
            raise
        raise InputError("the bundled reasoner is not part of this installation; write a folder or a hub id") from None
    return Path(reasoner.folder())


def _may_be_hub_id(model: str) -> bool:
    """Whether a name has the form owner/name."""
    return model.count("/") == 1 and model[0] not in "/.~" and not model.endswith("/")


def _from_pretrained(model: str, dtype: torch.dtype, local: bool) -> Any:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        with _quiet():
            return DiffusionPipeline.from_pretrained(model, dtype=dtype, local_files_only=local, use_safetensors=True)
    except (OSError, ValueError, SafetensorError, ImportError, RuntimeError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if local:
            raise InputError(f"the pipeline in {model} cannot be loaded: {reason}") from error
        raise InputError(f"there is no folder {model}, and it cannot be fetched from the hub: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of the loading libraries, which count files that nobody asked about."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
