"""The board: every task of the reasoner is drawn on 16 x 16 squares of 4 x 4 pixels, in a palette of high-contrast colours.

A video is kept as palette indices, one per square and frame, and becomes pixels only when a model needs them. Reading goes the
other way: average each square, take the nearest colour. Because a square is one latent pixel of the bundled VAE and a token of
the bundled DiT is 2 x 2 squares, masks of squares are masks of latent pixels, and pool into masks of tokens.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from einops import rearrange, reduce
from jaxtyping import Bool, Float, UInt8

SQUARES = 16
"""Squares per side of a board."""
PIXELS = 4
"""Pixels per side of a square."""
TOKEN = 2
"""Squares per side of a token of the bundled DiT."""


class Colour(IntEnum):
    """Palette indices; `PALETTE[colour]` is the RGB value."""

    BLACK = 0
    WHITE = 1
    GREY = 2
    GREEN = 3
    RED = 4
    BLUE = 5
    YELLOW = 6
    PURPLE = 7
    CYAN = 8


PALETTE: UInt8[np.ndarray, "colours 3"] = np.array(
    [
        [0, 0, 0],
        [255, 255, 255],
        [112, 112, 112],
        [0, 190, 0],
        [230, 0, 0],
        [0, 80, 255],
        [255, 225, 0],
        [150, 0, 200],
        [0, 215, 215],
    ],
    dtype=np.uint8,
)

Boards = UInt8[np.ndarray, "... 16 16"]
"""Palette indices, row by column."""


def paint(boards: UInt8[np.ndarray, "*batch 16 16"]) -> UInt8[np.ndarray, "*batch 64 64 3"]:
    """Boards as 8-bit RGB pixels."""
    return PALETTE[boards].repeat(PIXELS, axis=-3).repeat(PIXELS, axis=-2)


def square_colours(video: Float[np.ndarray, "*batch 64 64 3"]) -> Float[np.ndarray, "*batch 16 16 3"]:
    """Mean colour of every square, in the unit of the video ([0, 1])."""
    # Sums of slices, rows first: three times as fast as a mean over short axes, and videos are read by the ten thousand.
    lines = video.reshape(*video.shape[:-3], SQUARES, PIXELS, SQUARES * PIXELS * 3)
    rows = sum(lines[..., line, :] for line in range(PIXELS))
    columns = np.asarray(rows).reshape(*video.shape[:-3], SQUARES, SQUARES, PIXELS, 3)
    return np.asarray(sum(columns[..., column, :] for column in range(PIXELS))) / PIXELS**2


def read(video: Float[np.ndarray, "*batch 64 64 3"]) -> UInt8[np.ndarray, "*batch 16 16"]:
    """The palette index nearest (Euclidean, RGB) to the mean colour of every square of a video in [0, 1]."""
    means = square_colours(video).astype(np.float32)
    palette = PALETTE.astype(np.float32) / 255
    # |m - p|^2 without |m|^2, which is the same for every colour.
    distance = (palette**2).sum(-1) - 2 * means @ palette.T
    return distance.argmin(-1).astype(np.uint8)


def tokens(mask: Bool[np.ndarray, "*batch 16 16"]) -> Float[np.ndarray, "*batch 8 8"]:
    """The share of each token's squares that lie in a mask of squares."""
    return reduce(mask.astype(np.float32), "... (y py) (x px) -> ... y x", "mean", py=TOKEN, px=TOKEN)


def blank(colour: Colour = Colour.BLACK) -> UInt8[np.ndarray, "16 16"]:
    """A board of one colour."""
    return np.full((SQUARES, SQUARES), colour, dtype=np.uint8)


def symmetries(array: np.ndarray) -> list[np.ndarray]:
    """The eight rotations and reflections of a square array's first two axes."""
    turned = [np.rot90(array, k) for k in range(4)]
    return turned + [rearrange(a, "y x ... -> x y ...") for a in turned]


SHAPES: dict[str, Bool[np.ndarray, "3 3"]] = {
    name: np.array([[c == "#" for c in row] for row in rows])
    for name, rows in {
        "square": ("###", "###", "###"),
        "triangle": ("#..", "##.", "###"),
        "plus": (".#.", "###", ".#."),
        "cross": ("#.#", ".#.", "#.#"),
    }.items()
}
"""Shapes of objects, as 3 x 3 squares."""

OBJECT_COLOURS: dict[str, Colour] = {
    "red": Colour.RED,
    "green": Colour.GREEN,
    "blue": Colour.BLUE,
    "yellow": Colour.YELLOW,
    "purple": Colour.PURPLE,
}
"""Colours an object can have, by the word a prompt uses."""


def stamp(board: UInt8[np.ndarray, "16 16"], glyph: Bool[np.ndarray, "h w"], row: int, column: int, colour: int) -> None:
    """Paint a glyph into a board, in place; what falls outside the board is clipped."""
    for y, x in np.argwhere(glyph):
        if 0 <= row + y < SQUARES and 0 <= column + x < SQUARES:
            board[row + y, column + x] = colour
