"""VBVR-Bench's folder layout: one folder per sample, with `first_frame.png`, `final_frame.png`, `ground_truth.mp4`, `prompt.txt`.

Samples of the bundled tasks write themselves out in it, for other models to be tried on; and a folder in this layout, of any
origin and picture size, is read back as inputs for a pipeline. (Layout: arXiv 2602.20159 and the released code of 2603.16870.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8
from PIL import Image

from dit_lens.errors import InputError
from dit_lens.reasoner.board import paint
from dit_lens.reasoner.tasks import Sample

FRAMES_PER_SECOND = 16
FILES = ("first_frame.png", "final_frame.png", "ground_truth.mp4", "prompt.txt")


@dataclass(frozen=True)
class Case:
    """A sample as its folder holds it."""

    name: str
    prompt: str
    first_frame: Image.Image
    final_frame: Image.Image
    path: Path

    def video(self) -> UInt8[np.ndarray, "frames height width 3"]:
        """The true video. It is compressed, so its colours are near those of the pictures, not equal to them.

        Raises:
            InputError: the file is no video.
        """
        try:
            with av.open(self.path / "ground_truth.mp4") as container:
                return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        except (FFmpegError, IndexError, ValueError) as error:  # damaged, without a video stream, without a frame
            raise InputError(f"{self.path / 'ground_truth.mp4'} is no video; write an MP4 there") from error

    @cached_property
    def frames(self) -> int:
        """How many frames the true video has; errors as of `video`."""
        return len(self.video())

    @property
    def inputs(self) -> dict[str, Any]:
        """Pipeline arguments: prompt, image, and the size and length of the true video."""
        width, height = self.first_frame.size
        return {
            "prompt": self.prompt,
            "image": self.first_frame,
            "height": height,
            "width": width,
            "num_frames": self.frames,
        }


def write(samples: Iterable[Sample], folder: Path | str) -> list[Path]:
    """Write samples into `folder`, one folder each, named task_split_index; returns these folders.

    Raises:
        InputError: the folder cannot be written.
    """
    written = []
    try:
        for sample in samples:
            where = Path(folder) / f"{sample.task.name}_{sample.split}_{sample.index:05d}"
            where.mkdir(parents=True, exist_ok=True)
            video = paint(sample.boards)
            Image.fromarray(video[0]).save(where / "first_frame.png")
            Image.fromarray(video[-1]).save(where / "final_frame.png")
            write_video(where / "ground_truth.mp4", video)
            (where / "prompt.txt").write_text(sample.prompt + "\n", encoding="utf-8")
            written.append(where)
    except OSError as error:
        raise InputError(f"cannot write samples into {folder}: {error.strerror}; name a folder that can be written") from error
    return written


def read(folder: Path | str) -> list[Case]:
    """Read every sample below a folder, in the order of their names.

    Raises:
        InputError: there is no such folder, no sample in it, or a sample lacks a file or holds one that is no picture.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root} is no folder; name one that holds a folder per sample")
    folders = sorted({p.parent for p in root.rglob("*") if p.name in FILES})
    if not folders:
        raise InputError(f"{root} holds no samples; each is a folder with {', '.join(FILES)}")
    return [_read_one(each) for each in folders]


def _read_one(folder: Path) -> Case:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(f"the sample {folder} lacks {', '.join(missing)}; each needs {', '.join(FILES)}")
    pictures = []
    for name in FILES[:2]:
        try:
            with Image.open(folder / name) as picture:
                pictures.append(picture.convert("RGB"))
        except (OSError, SyntaxError) as error:  # unknown, cut short, or broken inside, in Pillow's own words
            raise InputError(f"{folder / name} is no picture; write a PNG there") from error
    prompt = (folder / "prompt.txt").read_text(encoding="utf-8").strip()
    first, final = pictures
    return Case(folder.name, prompt, first, final, folder)


def write_video(path: Path, video: UInt8[np.ndarray, "frames height width 3"]) -> None:
    """H.264 at a quality that keeps every square's colour."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "4"})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
