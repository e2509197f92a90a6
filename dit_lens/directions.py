"""Directions in activation space: found from labels or from a probe, to read along, to steer along, or to erase.

A `Direction` is a vector of length 1 and a scale in the units of the activation, so that `scale * vector` is one natural step:
from one class to the other (`difference_of_means`), or one unit of a probe's decision (`from_probe`). A steering result
means little without the same step along other directions: `random_directions` gives controls of the same length.

An `Eraser` removes what a linear reader can know of a label. It is LEACE (Belrose et al. 2023, arXiv 2306.03819): of all
affine maps after which the label and the activation have no covariance, and so no linear probe beats a constant, the one
that moves activations least.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dit_lens.activations import Entry
from dit_lens.errors import InputError, listed
from dit_lens.files import write_bytes
from dit_lens.selection import Cell

FORMAT = 1
"""Version of the files that directions and erasers are saved in."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector in the space of one cell.

    Attributes:
        vector: of length 1 over all its axes, float32; (channels,), or (heads, channels) at the sites with rows per head.
        scale: length of one natural step, in units of the activation.
        cell: where it was found, if that is known. source: how, in words.
    """

    vector: Float[Tensor, "*heads channels"]
    scale: float
    cell: Cell | None = None
    source: str = ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one safetensors file, its labels as JSON in the header; a file that is there is replaced."""
        labels = {"scale": self.scale, "cell": None if self.cell is None else asdict(self.cell), "source": self.source}
        _save(path, "direction", {"vector": self.vector}, labels)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Direction:
        """Read what `save` wrote; an InputError where the file holds no direction."""
        tensors, labels = _load(path, "direction")
        cell = None if labels["cell"] is None else Cell(**labels["cell"])
        return Direction(tensors["vector"], labels["scale"], cell, labels["source"])


def difference_of_means(features: Any, labels: ArrayLike, cell: Cell | None = None) -> Direction:
    """The direction from the mean of the false rows to the mean of the true ones; its scale is the distance of the two.

    Args:
        features: (rows, channels) or (rows, heads, channels), tensor or array. labels: booleans, one for each row.

    Raises:
        InputError: shapes that do not agree, labels that are no booleans or of one class, values that are not finite, or
            means that are the same.
    """
    rows = torch.as_tensor(features)
    stored = Entry(cell or Cell("", 0, "", 0), 0, "", rows)
    (found,) = differences_of_means([stored], lambda _: labels).values()
    return Direction(found.vector, found.scale, cell, found.source)


def differences_of_means(entries: Iterable[Entry], labels: Callable[[Any], ArrayLike]) -> dict[Cell, Direction]:
    """`difference_of_means` for every cell in `run.activations` or `store.select(...)`, reading each tensor once.

    Args:
        entries: tensors of shape (..., channels), or (..., heads, channels). labels: from an entry to the booleans of its
            tokens, of shape (...): as many axes as the tensor has before heads and channels.
    """
    sums: dict[Cell, dict[bool, Tensor]] = {}
    counts: dict[Cell, dict[bool, int]] = {}
    for entry in entries:
        # NumPy first: whatever array the labels are in, and on whatever device.
        mask = torch.as_tensor(np.asarray(labels(entry)))
        shape = tuple(entry.tensor.shape)
        if mask.dtype != torch.bool or tuple(mask.shape) not in (shape[:-1], shape[:-2]):
            raise InputError(
                f"labels are booleans of shape {shape[:-1]}, or {shape[:-2]} where rows have heads, and these are"
                f" {mask.dtype} of shape {tuple(mask.shape)}"
            )
        if not torch.isfinite(entry.tensor).all():
            raise InputError(f"the activations at {entry.cell} have values that are not finite")
        for side in (False, True):
            rows = entry.tensor[mask == side]
            # Running sums in double precision: one tensor in memory, and no digits lost over a million tokens.
            total = rows.sum(dim=0, dtype=torch.float64)
            sums.setdefault(entry.cell, {}).setdefault(side, torch.zeros_like(total)).add_(total)
            counted = counts.setdefault(entry.cell, {False: 0, True: 0})
            counted[side] += len(rows)
    directions = {}
    for cell, totals in sums.items():
        if 0 in counts[cell].values():
            raise InputError(f"a difference of means needs rows of both labels; there is only {counts[cell][True] > 0}")
        step = totals[True] / counts[cell][True] - totals[False] / counts[cell][False]
        source = f"difference of means of {counts[cell][True]} and {counts[cell][False]} rows"
        directions[cell] = _direction(step, float(step.norm()), cell, source)
    if not directions:
        raise InputError("there are no activations to take means of")
    return directions


def from_probe(probe: Any, answer: Any = None, heads: int | None = None, cell: Cell | None = None) -> Direction:
    """The direction that a fitted linear probe of scikit-learn reads along, in activation space.

    Its scale is the step that raises the probe's decision (log-odds, margin or prediction) by 1.

    Args:
        probe: a linear model, or a pipeline of a StandardScaler and one. answer: the class, where there are more than two;
            of two it is the second. heads: for features that were (heads, channels) flattened.

    Raises:
        InputError: the probe is not fitted or not linear, or `answer` is none of its classes.
    """
    # Imported here, as it takes a second that most programs have no use for.
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    *before, model = [step for _, step in probe.steps] if isinstance(probe, Pipeline) else [probe]
    wrong = [type(step).__name__ for step in before if not isinstance(step, StandardScaler)]
    if wrong or not hasattr(model, "coef_"):
        what = listed(wrong) if wrong else f"{type(model).__name__} without coef_"
        raise InputError(f"a direction comes from a fitted linear model, alone or after a StandardScaler, and not from {what}")
    weights = np.atleast_2d(np.asarray(model.coef_, dtype=np.float64))
    classes = list(getattr(model, "classes_", []))
    if answer is not None and answer not in classes:
        raise InputError(f"the probe has no class {answer!r}; write one of {listed(classes)}")
    if len(weights) > 1 and answer is None:
        raise InputError(f"the probe has {len(weights)} outputs; name answer=, one of {listed(classes)}")
    place = 0 if answer is None else classes.index(answer)
    weight = weights[place] if len(weights) > 1 else weights[0] * (-1 if answer is not None and place == 0 else 1)
    for scaler in before:
        # The model sees (x - mean) / scale, so its weights per unit of x are smaller by the scale.
        weight = weight if scaler.scale_ is None else weight / scaler.scale_
    if heads is not None and len(weight) % heads:
        raise InputError(f"{len(weight)} features are no {heads} heads of one width")
    vector = torch.from_numpy(np.ascontiguousarray(weight))
    length = float(vector.norm())
    source = f"{type(model).__name__}{'' if answer is None else f' for {answer}'}"
    return _direction(vector if heads is None else vector.unflatten(0, (heads, -1)), 1 / length if length else 0.0, cell, source)


def random_directions(direction: Direction, count: int, seed: int) -> list[Direction]:
    """Control directions: uniform on the sphere, with the scale and shape of the given one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, *direction.vector.shape, generator=generator, dtype=torch.float64)
    return [_direction(v, direction.scale, direction.cell, f"random {i} of seed {seed}") for i, v in enumerate(drawn)]


def project(activation: Float[Tensor, "*shape"], direction: Direction) -> Float[Tensor, "*rows"]:
    """The coordinate of activations (..., *heads, channels) along a direction, in their own units: shape (...)."""
    axes = direction.vector.ndim
    if activation.shape[-axes:] != direction.vector.shape:
        raise InputError(
            f"a direction of shape {tuple(direction.vector.shape)} does not fit activations of shape {tuple(activation.shape)}"
        )
    wide = activation if activation.dtype == torch.float64 else activation.float()
    return (wide * direction.vector.to(wide.device, wide.dtype)).flatten(-axes).sum(-1)


def cosine(activation: Direction | Float[Tensor, "*shape"], direction: Direction) -> Float[Tensor, "*rows"]:
    """The cosine of activations (..., *heads, channels), or of another direction, with a direction; 0 for a zero vector."""
    vectors = activation.vector if isinstance(activation, Direction) else activation
    along = project(vectors, direction)
    lengths = torch.linalg.vector_norm(vectors.to(along.dtype).flatten(-direction.vector.ndim), dim=-1)
    return along / lengths.clamp_min(torch.finfo(along.dtype).tiny)


@dataclass(frozen=True, eq=False)
class Eraser:
    """LEACE: x -> x - left @ (right @ (x - mean)), which leaves no linear trace of the label.

    The map is idempotent, and acts on the axes that one row of features had: (channels,) or (heads, channels).

    Attributes:
        mean: of the features it was fitted to. left, right: factors of the projection, whose rank is at most that of the
            labels. All in double precision. shape: of one row.
    """

    mean: Float[Tensor, " features"]
    left: Float[Tensor, "features rank"]
    right: Float[Tensor, "rank features"]
    shape: tuple[int, ...]

    @staticmethod
    def fit(features: Any, labels: ArrayLike, tolerance: float | None = None) -> Eraser:
        """Fit it to features (rows, channels) or (rows, heads, channels).

        Args:
            labels: (rows,) booleans, classes or texts; or (rows, targets) numbers, all of which are erased.
            tolerance: directions whose standard deviation is below this share of the largest count as constant, and are
                left alone; by default what the precision of the features and their number leave as rounding.

        Raises:
            InputError: shapes that do not agree, fewer than two rows or classes, or values that are not finite.
        """
        rows = torch.as_tensor(features).cpu()
        wide, targets = rows.flatten(1).to(torch.float64).numpy(), _targets(labels)
        if len(wide) != len(targets) or len(wide) < 2:
            raise InputError(f"an eraser needs a label for each of at least 2 rows, got {len(wide)} rows, {len(targets)} labels")
        if not (np.isfinite(wide).all() and np.isfinite(targets).all()):
            raise InputError("an eraser cannot be fitted to values that are not finite")
        if not targets.std(axis=0).any():
            raise InputError("an eraser needs labels that differ: there is one class")
        mean = wide.mean(axis=0)
        # With the features X = A S B', the covariance is B S^2 B' / n. Everything that LEACE needs of it follows from the
        # singular values themselves; squaring them and inverting the square would lose half of the digits.
        left, spread, basis = scipy.linalg.svd(wide - mean, full_matrices=False)
        precision = torch.finfo(rows.dtype).eps if rows.dtype.is_floating_point else np.finfo(np.float64).eps
        kept = spread > (max(wide.shape) * float(precision) if tolerance is None else tolerance) * spread[0]
        left, spread, basis = left[:, kept], spread[kept], basis[kept]
        # Whitened features are A B' up to a factor, so their covariance with the labels is B A'Z, whose column space goes.
        centred = (targets - targets.mean(axis=0)) / np.where(targets.std(axis=0) > 0, targets.std(axis=0), 1)
        readable, size, _ = scipy.linalg.svd(left.T @ centred, full_matrices=False)
        space = readable[:, size > max(wide.shape) * np.finfo(np.float64).eps * np.linalg.norm(centred)]
        # A channel that never varies has no part in it, and not the 1e-17 that rounding leaves: a probe that gives every channel
        # the same spread would read the label from that.
        varies = np.ptp(wide, axis=0) > 0
        return Eraser(
            mean=torch.from_numpy(mean),
            left=torch.from_numpy(np.where(varies[:, None], basis.T @ (spread[:, None] * space), 0.0)),
            right=torch.from_numpy((space / spread[:, None]).T @ basis),
            shape=tuple(rows.shape[1:]),
        )

    @property
    def rank(self) -> int:
        """How many directions are taken out."""
        return self.left.shape[1]

    def __call__(self, activation: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Erase from activations (..., *shape), in their precision and on their device."""
        if tuple(activation.shape[-len(self.shape) :]) != self.shape:
            raise InputError(f"an eraser of rows {self.shape} does not fit activations of shape {tuple(activation.shape)}")
        flat = activation.flatten(-len(self.shape))
        kind = {"device": flat.device, "dtype": torch.promote_types(flat.dtype, torch.float32)}
        read = (flat.to(**kind) - self.mean.to(**kind)) @ self.right.to(**kind).T
        return (flat.to(**kind) - read @ self.left.to(**kind).T).to(activation.dtype).unflatten(-1, self.shape)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one safetensors file; a file that is there is replaced."""
        _save(path, "eraser", {"mean": self.mean, "left": self.left, "right": self.right}, {"shape": self.shape})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Eraser:
        """Read what `save` wrote; an InputError where the file holds no eraser."""
        tensors, labels = _load(path, "eraser")
        return Eraser(**tensors, shape=tuple(labels["shape"]))


def _direction(vector: Tensor, scale: float, cell: Cell | None, source: str) -> Direction:
    length = float(vector.norm())
    if not length > 0 or not np.isfinite(length):
        raise InputError(f"{source}: there is no direction, the vector has length {length}")
    return Direction((vector / length).float(), scale, cell, source)


def _targets(labels: ArrayLike) -> np.ndarray:
    """Labels as (rows, targets) numbers: those given, or one indicator for each class."""
    values = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.ndim == 2:
        return values.astype(np.float64)
    if values.ndim != 1:
        raise InputError(f"labels have shape (rows,) or (rows, targets), and these {values.shape}")
    return (values[:, None] == np.unique(values)).astype(np.float64)


def _save(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], labels: Mapping[str, Any]) -> None:
    header = {"dit_lens": json.dumps({"kind": kind, "format": FORMAT, **labels})}
    write_bytes(Path(path), save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, header))


def _load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            labels = json.loads((file.metadata() or {}).get("dit_lens", "{}"))
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (a file is no dict)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if (labels.pop("kind", None), labels.pop("format", None)) != (kind, FORMAT):
        raise InputError(f"{path} holds no {kind} that this version reads")
    return tensors, labels
