"""Edits of the latents that a step takes: noise put in, or the latents of another run.

Latents are off the model's distribution where their noise is not that of the step. There are four ways to disturb them,
so that an effect of what was lost can be told from an effect of a wrong noise level or of a larger disturbance. A fifth
way disturbs nothing: it is the step of a stochastic sampler.

| how | latents of the step become | keeps |
|---|---|---|
| `replace` | pure noise, or the donor's latents | nothing (a donor's latents have the noise level of the step) |
| `mixed` | sqrt(1 - dose^2) * what they were + dose * noise | 1 - dose^2 of their energy |
| `sigma_matched` | signal * x0-hat + noise * fresh noise, as the schedule mixes them at this step | the noise level |
| `dose_matched` | what they were, plus noise whose L2 norm is `dose` times theirs | the size of the disturbance |
| `ancestral` | signal * x0-hat + noise * (r * predicted noise + sqrt(1 - r^2) * fresh noise) | the model's distribution |

The ancestral step is the one of DDPM (Ho et al. 2020), and of DDIM with eta = 1 (Song et al. 2021), for any mixture of signal
and noise. With a the signal and b the noise, from the step before (a, b) to this one (a', b'), r = a b' / (a' b) is the
correlation that a forward noising process leaves between the noise of the two. Its limit of many steps is the reversed
process itself, dx = [v + (g^2 / 2) score] dt + g dW with g^2 = 2 s / (1 - s) in flow matching (time t runs to clean). Of all
stochastic samplers with the right marginals it is the one whose *joint* distribution is right: taken at every step from x_s
on, its results are draws from p(x0 | x_s), and x0-hat is a martingale, so that the mean of the results is x0-hat at s.
(At sigma 1, r is 0: nothing of x_1 is kept, and branches are new seeds.) Noise that is all fresh at every step,
`sigma_matched` or the `stochastic_sampling` of diffusers' FlowMatchEulerDiscreteScheduler, has not this property.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dit_lens.edits import generator
from dit_lens.errors import InputError
from dit_lens.noise import NoiseState
from dit_lens.run import Run
from dit_lens.schedule import Forecast
from dit_lens.selection import Extent, Indices, at

Latents = Float[Tensor, "batch channels frames height width"]


@dataclass(frozen=True)
class Passage:
    """The latents that one step is about to take.

    Attributes:
        step: the step. state: how clean sample and noise mix there. latents: what it would take.
        before: the same of the step before, and `taken` the latents that it took; None before the first step.
        seeds: the seed of each row.
        x0_hat: what the step before bet on, or None before the first step and where there is no x0-hat.
    """

    step: int
    state: NoiseState
    latents: Latents
    seeds: tuple[int, ...]
    x0_hat: Callable[[], Tensor | None]
    before: NoiseState | None = None
    taken: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ReplaceLatents:
    """Change the latents that a step takes.

    Noise is Gaussian and drawn on the CPU from `noise`, the row's seed and the step, for all frames at once: the noise of a
    frame does not depend on which frames are named, nor on what runs beside the row. Rows of one seed get the same noise,
    unless `noise` gives each row its own.

    Attributes:
        step: index, list, slice or "all", as in `dl.at`. Step 0 takes the pipeline's initial noise.
        donor: a run of the same schedule and shape, of one row or as many as this run.
        noise: a seed for fresh noise, or one for each row of the run.
        how: `replace`: by the donor's latents, or by standard normal noise, whatever the noise level.
            `sigma_matched`: by a clean video at the noise level of the step. The video is the x0-hat of the step before,
            which is the one that the latents of this step hold: the donor's, or without a donor this run's own; zeros at
            step 0. The noise is fresh; without `noise`, it is what this run's latents hold beside their own video; with a
            `dose`, sqrt(1 - dose^2) of that and `dose` of fresh noise.
            `mixed`: as `replace`, of which `dose` is taken and sqrt(1 - dose^2) of what was there: between independent
            tensors of one norm, a share of dose^2 of the energy is new.
            `dose_matched`: add noise (with a donor, the difference to its latents) scaled to `dose` times the L2 norm of
            the row's latents, all frames of them, so that noise in one frame and in all is the same dose.
            `ancestral`: by those of a stochastic sampler, see the module's page; needs `noise`, and steps from 1 on.
        frames: latent frames, as in `dl.at`; the others keep their bits. All when left out.
        dose: for `dose_matched`, in units of the norm; for `mixed` and, if wanted, `sigma_matched`, from 0 to 1.
        rows: rows of the run; the others keep their bits. All when left out.

    Raises:
        InputError: neither donor nor noise, both where one is meant, or a dose that is missing, not wanted or out of range.
    """

    step: Indices
    donor: Run | None = None
    noise: int | Sequence[int] | None = None
    how: Literal["replace", "mixed", "sigma_matched", "dose_matched", "ancestral"] = "replace"
    frames: Indices = None
    dose: float | None = None
    rows: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.donor is None and self.noise is None:
            raise InputError(f"{self} needs what to put there: write donor=run, or noise=seed")
        if self.donor is not None and self.noise is not None and self.how != "sigma_matched":
            raise InputError(f"{self} has a donor and noise; write one of them, or how='sigma_matched', which can take both")
        if self.how == "ancestral" and self.donor is not None:
            raise InputError(f"{self} goes on from the run's own x0-hat and takes no donor; write noise=seed")
        optional = self.how == "sigma_matched" and self.noise is not None
        if (self.how in ("dose_matched", "mixed")) != (self.dose is not None) and not optional:
            raise InputError(
                f"{self}: dose= belongs to how='dose_matched', in units of the latents' own norm, to how='mixed', and to"
                " how='sigma_matched' with noise=, there from 0 to 1"
            )
        if self.dose is not None and self.how != "dose_matched" and not 0 <= self.dose <= 1:
            raise InputError(f"{self}: dose={self.dose} is no share of the noise; write a number from 0 to 1")

    def __str__(self) -> str:
        noise = self.noise if self.noise is None or isinstance(self.noise, int) else f"[{len(self.noise)} seeds]"
        donor, rows = None if self.donor is None else "donor", None if self.rows is None else f"[{len(self.rows)} rows]"
        source = {"donor": donor, "noise": noise, "frames": self.frames, "rows": rows}
        shown = [f"{name}={value}" for name, value in source.items() if value is not None]
        return f"ReplaceLatents({', '.join([f'step={self.step!r}', *shown, f'how={self.how!r}'])})"

    @property
    def replaces(self) -> bool:
        """Whether what was there before has no part in the result."""
        return self.how in ("replace", "sigma_matched") and self.dose is None

    def steps(self, extent: Extent) -> list[int]:
        """The selected steps, in order."""
        return sorted({cell.step for cell in at(step=self.step).cells(extent)})

    def chosen(self, frames: int) -> list[int]:
        """The selected frames among so many."""
        return at(frames=self.frames).places((frames, 1, 1)).flatten().tolist()

    def chosen_rows(self, rows: int) -> list[int]:
        """The selected rows among so many.

        Raises:
            InputError: there is no such row, none is selected, or `noise` has seeds for more or fewer rows.
        """
        chosen = list(range(rows)) if self.rows is None else sorted(set(self.rows))
        if not chosen or chosen[0] < 0 or chosen[-1] >= rows:
            raise InputError(f"{self}: this run has {rows} rows; write some of 0 to {rows - 1}")
        if self.noise is not None and not isinstance(self.noise, int) and len(self.noise) != rows:
            raise InputError(f"{self}: this run has {rows} rows; write one seed, or {rows} of them")
        return chosen

    def check_run(self, steps: Sequence[int], forecast: Forecast, scheduler: str) -> None:
        """Before the run: the donor followed this schedule up to the selected steps."""
        donor = self.donor
        if self.how == "ancestral" and min(steps) == 0:
            raise InputError(f"{self}: before step 0 there is no x0-hat to go on from; choose steps from 1")
        if donor is None:
            return
        if donor.scheduler != scheduler or donor.timesteps != forecast.timesteps[: donor.steps]:
            raise InputError(
                f"{self}: the donor ran {donor.steps} steps of a {donor.scheduler}, and this run has {len(forecast.sigmas)} of a"
                f" {scheduler}, or at other sigmas; run the donor with the same scheduler and number of steps"
            )
        if max(steps) >= donor.steps:
            raise InputError(f"{self}: the donor stopped after step {donor.steps - 1}; choose earlier steps, or run all of it")

    def apply(self, passage: Passage) -> Latents:
        """The latents that the step takes instead."""
        latents = passage.latents.to(torch.promote_types(passage.latents.dtype, torch.float32))
        frames = torch.tensor(self.chosen(latents.shape[2]), device=latents.device)
        rows = torch.tensor(self.chosen_rows(latents.shape[0]), device=latents.device)
        ways = {
            "replace": self._replaced,
            "mixed": self._mixed,
            "sigma_matched": self._sigma_matched,
            "dose_matched": self._dosed,
            "ancestral": self._ancestral,
        }
        changed = ways[self.how](passage, latents, frames).to(passage.latents)
        written = passage.latents.index_copy(2, frames, changed.index_select(2, frames))
        return passage.latents.index_copy(0, rows, written.index_select(0, rows))

    def _replaced(self, passage: Passage, latents: Tensor, frames: Tensor) -> Tensor:
        return self._source(passage, latents)

    def _mixed(self, passage: Passage, latents: Tensor, frames: Tensor) -> Tensor:
        dose = float(self.dose or 0)
        return math.sqrt(1 - dose**2) * latents + dose * self._source(passage, latents)

    def _sigma_matched(self, passage: Passage, latents: Tensor, frames: Tensor) -> Tensor:
        own = passage.x0_hat()
        own = torch.zeros_like(latents) if own is None else own.to(latents)
        clean = own
        if self.donor is not None and passage.step > 0:
            clean = self._of_donor(self.donor.x0_hat(passage.step - 1), latents)
        signal, scale = passage.state.signal, passage.state.noise
        if self.noise is None:
            return latents + signal * (clean - own)
        dose, fresh = 1.0 if self.dose is None else self.dose, self._drawn(self.noise, passage, latents)
        return signal * clean + dose * scale * fresh + math.sqrt(1 - dose**2) * (latents - signal * own)

    def _ancestral(self, passage: Passage, latents: Tensor, frames: Tensor) -> Tensor:
        clean = passage.x0_hat()
        if clean is None or passage.before is None or passage.taken is None or self.noise is None:
            raise InputError(f"{self}: step {passage.step - 1} implies no x0-hat to go on from; choose later steps")
        now, before, clean = passage.state, passage.before, clean.to(latents)
        predicted = (passage.taken.to(latents) - before.signal * clean) / before.noise
        kept = before.signal * now.noise / (now.signal * before.noise)
        fresh = self._drawn(self.noise, passage, latents)
        return now.signal * clean + now.noise * (kept * predicted + math.sqrt(max(0.0, 1 - kept**2)) * fresh)

    def _dosed(self, passage: Passage, latents: Tensor, frames: Tensor) -> Tensor:
        source = self._source(passage, latents)
        change = torch.zeros_like(latents)
        moved = source if self.donor is None else source - latents
        change.index_copy_(2, frames, moved.index_select(2, frames))
        lengths = [torch.linalg.vector_norm(tensor.flatten(1), dim=1) for tensor in (latents, change)]
        # Where a donor has the same latents there is no direction to go.
        factor = torch.where(lengths[1] > 0, float(self.dose or 0) * lengths[0] / lengths[1], 0.0)
        return latents + factor.view(-1, 1, 1, 1, 1) * change

    def _source(self, passage: Passage, latents: Tensor) -> Tensor:
        """What the latents are replaced by, or moved towards."""
        if self.donor is not None:
            return self._of_donor(self.donor.latents[passage.step], latents)
        assert self.noise is not None
        return self._drawn(self.noise, passage, latents)

    def _of_donor(self, given: Tensor, latents: Tensor) -> Tensor:
        if given.shape[1:] != latents.shape[1:] or given.shape[0] not in (1, latents.shape[0]):
            raise InputError(
                f"{self}: the donor's latents have shape {tuple(given.shape)}, and those of this run {tuple(latents.shape)};"
                " run the donor with the same height, width and frames, and with one row or as many"
            )
        return given.to(latents).expand_as(latents)

    def _drawn(self, noise: int | Sequence[int], passage: Passage, latents: Tensor) -> Tensor:
        shape, each = latents.shape[1:], [noise] * len(passage.seeds) if isinstance(noise, int) else noise
        keys = [("latents", seed, row, passage.step) for seed, row in zip(each, passage.seeds, strict=True)]
        # Rows that are not chosen keep their bits whatever stands here, and many edits of few rows each make one run.
        fresh = torch.zeros_like(latents, device="cpu", dtype=torch.float32)
        for row in self.chosen_rows(len(keys)):
            fresh[row] = torch.randn(shape, generator=generator(*keys[row]))
        return fresh.to(latents)
