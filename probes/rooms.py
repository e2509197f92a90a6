"""The rooms of a maze as rows of a table: what a probe may be asked about them, and what is known without a model.

Each token inside a maze of the reasoner's board holds one room (its lower right square), so a row here is a token too. The
facts that need no activation (place, size, straight distances, number of open edges) are the features of the baselines: a
probe has read something from the model only as far as it beats them.
"""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from sklearn.preprocessing import OneHotEncoder

from dit_lens import metrics
from probes.linear import control_labels

PLACE = ["row", "column", "rooms"]
SITUATION = ["to_start", "to_goal", "start_to_goal", "openings"]


def room_table(sample: Any, painted: Bool[np.ndarray, "16 16"], drawn: int | None) -> pd.DataFrame:
    """One row per room of a maze sample, in the order of its tokens (row by row).

    ``painted`` are the squares that the model's final video changed, ``drawn`` the legal route that it drew, if any.
    Columns: `sample`; `group` (the maze up to symmetry); the token's `row` and `column`; `rooms` per side; distances in
    rooms, straight (not along corridors); `openings` (open edges); `end` (start or goal); and the targets `wall` (both the
    upper and the left edge), `route` (on a legal route), `contested` (on some legal routes but not on all), `which` (on the
    drawn one) and `output` (painted).
    """
    maze = sample.puzzle
    tokens = np.argwhere(maze.room_tokens)
    squares = tokens * 2 + 1
    at = tuple(squares.T)
    routes = maze.route_tokens[:, tokens[:, 0], tokens[:, 1]]
    walls = metrics.mask_fractions(sample.masks["wall"], maze.room_tokens.shape)
    padded = np.pad(maze.open, 1)
    edges = [padded[squares[:, 0] + 1 + dy, squares[:, 1] + 1 + dx] for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1))]
    start, goal = np.array(maze.start), np.array(maze.goal)
    return pd.DataFrame(
        {
            "sample": sample.index,
            "group": sample.group,
            "row": tokens[:, 0],
            "column": tokens[:, 1],
            "rooms": maze.rooms,
            "to_start": np.abs(squares - start).sum(axis=1) // 2,
            "to_goal": np.abs(squares - goal).sum(axis=1) // 2,
            "start_to_goal": np.abs(start - goal).sum() // 2,
            "openings": np.sum(edges, axis=0),
            "end": (squares == start).all(axis=1) | (squares == goal).all(axis=1),
            "wall": walls[tokens[:, 0], tokens[:, 1]] >= 0.75,
            "route": routes.any(axis=0),
            "contested": routes.any(axis=0) & ~routes.all(axis=0),
            "which": routes[drawn] if drawn is not None else False,
            "legal": drawn is not None,
            "output": painted[at],
        }
    )


def place_features(rooms: pd.DataFrame) -> Float[np.ndarray, "tokens features"]:
    """Row, column and size of the maze, each as indicators."""
    return OneHotEncoder(sparse_output=False).fit_transform(rooms[PLACE])


def situation_features(rooms: pd.DataFrame) -> Float[np.ndarray, "tokens features"]:
    """The place, the straight distances to start and goal and between them, and the number of open edges as indicators."""
    openings = OneHotEncoder(sparse_output=False).fit_transform(rooms[["openings"]])
    return np.hstack([place_features(rooms), openings, rooms[SITUATION].to_numpy(dtype=float)])


def place_control(rooms: pd.DataFrame) -> Bool[np.ndarray, " tokens"]:
    """The control task's labels: random for every place in a maze of a size, the same in all mazes of that size."""
    return control_labels([tuple(int(value) for value in row) for row in rooms[PLACE].to_numpy()])
