"""What is known of a token without any activation. A probe has read something from the model only as far as it beats this.

*Place only* knows where the token is. *Place and situation*, in mazes, also the size of the maze, how many sides of the
token's room are open, and its straight distances to start and goal: routes avoid dead ends and stay near the line between
the ends, so much of a route can be guessed without finding it. *Noisy latents* are what the step takes, under the token.
*Timestep only* is what the model is told of the noise: the same for all tokens of a step, and within a step it tells nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float, Shaped

from dit_lens.reasoner.board import SQUARES, TOKEN
from dit_lens.reasoner.tasks.maze import SIZES

PLACE, SITUATION, LATENTS, TIMESTEP = "place only", "place + situation", "noisy latents", "timestep only"
SIDE = SQUARES // TOKEN
"""Tokens per side of a board."""


def place(samples: Sequence[Any]) -> Shaped[np.ndarray, "tokens 64"]:
    """An indicator for every place on the board; all tokens, sample by sample, row by row."""
    return np.tile(np.eye(SIDE**2, dtype=np.float32), (len(samples), 1))


def situation(samples: Sequence[Any]) -> Float[np.ndarray, "tokens features"]:
    """Place, size, open sides and straight distances of the rooms of mazes; of tokens without a room the place only."""
    return np.concatenate([place(samples), np.concatenate([_rooms(sample.puzzle) for sample in samples])], axis=1)


def timestep(samples: Sequence[Any], value: float) -> Float[np.ndarray, "tokens 1"]:
    """What the denoiser is told of the noise, for every token."""
    return np.full((len(samples) * SIDE**2, 1), value, dtype=np.float32)


def latents(
    taken: Float[np.ndarray, "samples channels frames height width"], frame: int | None
) -> Float[np.ndarray, "tokens features"]:
    """The latents that a step takes, of one latent frame (None: the middle one): for each token those that it covers."""
    chosen = taken[:, :, taken.shape[2] // 2 if frame is None else frame]
    return rearrange(chosen, "n c (y py) (x px) -> (n y x) (c py px)", py=TOKEN, px=TOKEN)


def _rooms(maze: Any) -> Float[np.ndarray, "64 features"]:
    """Indicators of the maze's size and of the number of open sides, and three distances in rooms."""
    found = np.zeros((SIDE**2, len(SIZES) + 5 + 3), dtype=np.float32)
    around = np.pad(maze.open, 1)
    start, goal = np.array(maze.start), np.array(maze.goal)
    for y, x in np.argwhere(maze.room_tokens):
        square = np.array([TOKEN * y + 1, TOKEN * x + 1])
        row, column = square + 1
        sides = around[[row - 1, row + 1, row, row], [column, column, column - 1, column + 1]].sum()
        facts = found[SIDE * y + x]
        facts[SIZES.index(maze.rooms)] = facts[len(SIZES) + sides] = 1
        facts[-3:] = [np.abs(a - b).sum() / TOKEN for a, b in ((square, start), (square, goal), (start, goal))]
    return found
