"""Edits: changes made at cells while a run is under way.

    donor = lens.run(**b.inputs, seed=0, record=dl.at(block=6, step=0))
    patched = lens.run(**a.inputs, seed=0, edits=[dl.Patch(dl.at(block=6, step=0, branch="cond"), donor)])
    patched.fired                                               # {0: 1}: how often each edit was applied

An edit joins a selection with one method. It gets the selected heads and tokens of an activation, exactly as a reducer
does, and returns what is to take their place. Your own is five lines:

    @dataclass(frozen=True)
    class Double(dl.Edit):
        def apply(self, activation, moment):
            return 2 * activation

    lens.run(**inputs, edits=[Double(dl.at(block=[3, 4], sigma=(0.9, 1.01)))])

The rules:

* **Where.** What an edit returns is written to the heads, frames and tokens of its selection; all others keep their
  bits. Everything that the model computes later follows from what was written. Sites that are no tensor of the model
  (the contributions) are read-only.
* **Order.** Sites of a block are edited in the order in which the block computes them. At one site, edits act in the
  order of `edits=`, each on what the one before it left. `resid` and `update` are one place, as either follows from the
  other. `record=` sees what all edits left.
* **Exclusion.** An edit that replaces (`replaces = True`: Patch, Zero, Mean, Resample) would undo another such edit of
  the same tokens and heads; two of them are an error. An edit or a record inside a block that is skipped is an error too.
* **Counting.** `Run.fired` says how often each edit was applied: once for each of its cells. Never is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dit_lens.activations import Activations
from dit_lens.architectures import Layout
from dit_lens.donors import Pool, coordinates
from dit_lens.errors import InputError
from dit_lens.run import Run
from dit_lens.schedule import Forecast
from dit_lens.selection import Cell, Selector


@dataclass(frozen=True)
class Moment:
    """When and where an edit is applied.

    Attributes:
        cell: the cell, with its sigma, timestep and depth.
        seeds: the seed of each row of the batch.
        prompts: the number of each row's prompt, from 0; rows with the same number differ in their seed only.
        layout: the (frames, height, width) of all visual tokens.
        shape: that of the whole site, without the batch: (frames, height, width, channels), or with heads.
        part: a name for the heads and tokens that are selected, see `Selector.part`.
        text_tokens: number of text tokens that the denoiser reads; None where it reads none, or that is not known.
    """

    cell: Cell
    seeds: tuple[int, ...]
    prompts: tuple[int, ...]
    layout: Layout
    shape: tuple[int, ...]
    part: str = ""
    text_tokens: int | None = None

    @property
    def rows(self) -> int:
        """Number of rows of the batch."""
        return len(self.seeds)


@dataclass(frozen=True)
class Edit:
    """A change at the selected cells. Inherit from it, write `apply`, and decorate with `@dataclass(frozen=True)`.

    Attributes:
        at: which cells, and which heads and tokens of them.
        replaces: whether what was there before has no part in what `apply` returns.
    """

    at: Selector

    replaces: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.at})"

    def apply(self, activation: Tensor, moment: Moment) -> Tensor:
        """What is to take the place of a selected activation.

        Args:
            activation: (batch, frames, height, width, channels), or (batch, tokens, channels) with a token mask; at the
                sites with rows per head (batch, ..., heads, channels). It is yours: it may be changed in place.
            moment: the cell, the seed and the prompt of every row, and the layout.

        Returns:
            A tensor of the same shape.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method apply(self, activation, moment)")

    def check_run(self, cells: Sequence[Cell], forecast: Forecast, scheduler: str) -> None:
        """Before the run: raise an InputError for what does not fit its cells or its schedule. No need to write one."""

    def check_shape(self, moment: Moment) -> None:
        """Before any block runs, for every cell: raise an InputError for what does not fit. No need to write one."""


@dataclass(frozen=True, eq=False)
class Patch(Edit):
    """Put the activations of a donor in place of the run's own.

    At `resid` that is the whole stream after a block, at `update` only what the block adds to it (`PatchUpdate`).

    Attributes:
        donor: a run that recorded the selected cells, or its activations. Its rows are one, which every row of the run
            gets, or as many as the run has.
    """

    donor: Run | Activations
    replaces = True

    @cached_property
    def _pool(self) -> Pool:
        return Pool(self.donor)

    def check_run(self, cells: Sequence[Cell], forecast: Forecast, scheduler: str) -> None:
        """The donor holds every cell, at the noise level of this run."""
        self._pool.check(str(self), cells, forecast, scheduler)

    def check_shape(self, moment: Moment) -> None:
        """The donor's activation has this run's shape, and one row or as many."""
        rows = _count(self, self._pool, moment)
        if rows not in (1, moment.rows):
            raise InputError(
                f"{self}: the donor has {rows} rows, and this run {moment.rows}; run the donor with one seed and prompt,"
                " which every row then gets, or with those of this run"
            )

    def apply(self, activation: Tensor, moment: Moment) -> Tensor:
        """The donor's activation."""
        return _rows(self, self._pool, moment).to(activation).expand_as(activation)


@dataclass(frozen=True, eq=False)
class PatchUpdate(Patch):
    """Put a donor's update in place of a block's own: what the block adds to the stream that it took in this run.

    The same as `Patch` at the site `update`, which is to be named; it refuses another.
    """

    def check_run(self, cells: Sequence[Cell], forecast: Forecast, scheduler: str) -> None:
        """The site is `update`."""
        other = next((cell.site for cell in cells if cell.site != "update"), None)
        if other is not None:
            raise InputError(f"{self} acts on {other!r}; write dl.at(..., site='update'), or dl.Patch for another site")
        super().check_run(cells, forecast, scheduler)


@dataclass(frozen=True, eq=False)
class Zero(Edit):
    """Put zeros in place of an activation."""

    replaces = True

    def apply(self, activation: Tensor, moment: Moment) -> Tensor:
        """Zeros."""
        return torch.zeros_like(activation)


@dataclass(frozen=True, eq=False)
class Mean(Edit):
    """Put the mean over a pool in place of an activation: every row gets the mean over all rows of all runs of the pool.

    Attributes:
        pool: runs that recorded the selected cells, one or a list, or their activations.
    """

    pool: Run | Activations | Sequence[Run | Activations]
    replaces = True

    @cached_property
    def _pool(self) -> Pool:
        return Pool(self.pool)

    def check_run(self, cells: Sequence[Cell], forecast: Forecast, scheduler: str) -> None:
        """Every run of the pool holds every cell, at the noise level of this run."""
        self._pool.check(str(self), cells, forecast, scheduler)

    def check_shape(self, moment: Moment) -> None:
        """The pool's activations have this run's shape."""
        _count(self, self._pool, moment)

    def apply(self, activation: Tensor, moment: Moment) -> Tensor:
        """The mean, taken in float32 or better."""
        rows = _rows(self, self._pool, moment)
        return rows.mean(dim=0, dtype=_accurate(rows)).to(activation).expand_as(activation)


@dataclass(frozen=True, eq=False)
class Resample(Mean):
    """Put activations of the pool in place of the run's own: every row gets one row of the pool, the same at all cells.

    Which one is drawn from `seed`, the row's own seed and the number of its prompt, so that both engines agree, and so
    does a batch with any other that begins with the same prompts.
    """

    seed: int = 0

    def apply(self, activation: Tensor, moment: Moment) -> Tensor:
        """For each row, one row of the pool."""
        rows = _rows(self, self._pool, moment)
        keys = zip(moment.seeds, moment.prompts, strict=True)
        chosen = [int(torch.randint(len(rows), (), generator=generator("resample", self.seed, *key))) for key in keys]
        return rows[chosen].to(activation)


@runtime_checkable
class Step(Protocol):
    """A direction that knows how long one natural step along it is."""

    @property
    def vector(self) -> Tensor:
        """The direction, of length 1."""
        ...

    @property
    def scale(self) -> float:
        """The length of one step, in units of the activation."""
        ...


@dataclass(frozen=True, eq=False)
class Steer(Edit):
    """Add a direction to an activation.

    Attributes:
        direction: a tensor of shape (channels,), or any that broadcasts to the selected activation, as (heads, channels);
            or a direction with a `vector` and the `scale` of one natural step.
        scale: by how much to multiply the tensor, or how many natural steps to go.
    """

    direction: Tensor | Step
    scale: float = 1.0

    @cached_property
    def _step(self) -> Tensor:
        """One step along the direction."""
        direction = self.direction
        return direction if isinstance(direction, Tensor) else direction.vector * direction.scale

    def check_shape(self, moment: Moment) -> None:
        """The direction broadcasts to the activation."""
        shape = (moment.rows, *self.at.take_tokens(torch.empty((1, *moment.shape), device="meta")).shape[1:])
        own = tuple(self._step.shape)
        if len(own) > len(shape) or any(ours not in (1, theirs) for ours, theirs in zip(own[::-1], shape[::-1], strict=False)):
            raise InputError(
                f"{self}: the direction has shape {own}, and the activation {shape}; write one of shape ({shape[-1]},)"
            )

    def apply(self, activation: Tensor, moment: Moment) -> Tensor:
        """The activation and the direction added, in float32 or better."""
        exact = activation.to(_accurate(activation))
        return (exact + self.scale * self._step.to(exact)).to(activation)


@dataclass(frozen=True, eq=False)
class AddNoise(Edit):
    """Add Gaussian noise of a given dose to an activation.

    Each token (at sites with rows per head, each head of it) is moved in a random direction by exactly `dose` times its
    own L2 norm. The noise is drawn on the CPU from `seed`, the row's seed and the cell, so that both engines agree, and
    so do a row alone and in a batch.

    Attributes:
        dose: length of the noise in units of the activation's. seed: of the noise.
    """

    dose: float
    seed: int = 0

    def apply(self, activation: Tensor, moment: Moment) -> Tensor:
        """The activation and the noise added, in float32 or better."""
        cell, exact = moment.cell, activation.to(_accurate(activation))
        place = (cell.expert, cell.step, cell.branch, cell.block, cell.site, cell.stream)

        def drawn(row: int) -> Tensor:
            return torch.randn(activation.shape[1:], generator=generator("noise", self.seed, row, *place))

        # A generator draws on one core; for many rows it takes longer than the block.
        with ThreadPoolExecutor() as pool:
            noise = torch.stack([*pool.map(drawn, moment.seeds)]).to(exact)
        lengths = (torch.linalg.vector_norm(tensor, dim=-1, keepdim=True) for tensor in (exact, noise))
        return (exact + self.dose * noise * torch.div(*lengths)).to(activation)


@dataclass(frozen=True, eq=False)
class Average(Edit):
    """Put the mean over the seeds of a prompt in place of the activations of its rows.

    Attributes:
        to: `all` rows of the prompt get it, or only the row with this number among them; each goes on by itself.
    """

    to: int | Literal["all"] = "all"

    def check_shape(self, moment: Moment) -> None:
        """There is the row that the mean goes to."""
        seeds = min(moment.prompts.count(prompt) for prompt in moment.prompts)
        if self.to != "all" and not 0 <= self.to < seeds:
            raise InputError(f"{self}: to={self.to} is out of range: each prompt has {seeds} rows, write 0 to {seeds - 1}")

    def apply(self, activation: Tensor, moment: Moment) -> Tensor:
        """The mean, taken in float32 or better, in the rows that get it."""
        by_prompt: dict[int, list[int]] = {}
        for row, prompt in enumerate(moment.prompts):
            by_prompt.setdefault(prompt, []).append(row)
        # Every prompt of a run has equally many seeds.
        rows = torch.tensor(list(by_prompt.values()), device=activation.device)
        mean = activation[rows].mean(dim=1, keepdim=True, dtype=_accurate(activation)).to(activation)
        activation[rows if self.to == "all" else rows[:, [self.to]]] = mean
        return activation


@dataclass(frozen=True, eq=False)
class Skip(Edit):
    """Leave a block out: its streams are handed on as they came, and nothing in it runs.

    It is about whole blocks, so `head`, `frames`, `tokens` and `site` are not to be named; `Zero` at the site `update`
    keeps a block from changing some of the tokens.
    """

    def check_run(self, cells: Sequence[Cell], forecast: Forecast, scheduler: str) -> None:
        """The selection is of blocks."""
        if not self.at.whole or any(cell.site != "resid" for cell in cells):
            raise InputError(
                f"{self} leaves out whole blocks: name neither site, head, frames nor tokens; to keep a block from changing"
                " some tokens write dl.Zero(dl.at(..., site='update', frames=...))"
            )


def generator(*key: object) -> torch.Generator:
    """A CPU generator that follows from a key alone, the same on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _accurate(tensor: Tensor) -> torch.dtype:
    """The precision for sums over a tensor's values."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _count(edit: Any, pool: Pool, moment: Moment) -> int:
    """How many rows a pool holds for the place where an edit is; an InputError where they do not fit."""
    if moment.cell.site.startswith("cross_attn") or moment.cell.stream != "visual":
        pool.check_text(f"{edit} at {coordinates(moment.cell)}", moment.text_tokens)
    return pool.count(str(edit), moment.cell, edit.at, moment.shape, moment.part)


def _rows(edit: Any, pool: Pool, moment: Moment) -> Float[Tensor, "rows ..."]:
    """What a pool holds for the place where an edit is."""
    return pool.rows(str(edit), moment.cell, edit.at, moment.shape, moment.part)
