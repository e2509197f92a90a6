"""Checks that a user runs on a model of their own: does the lens see it truly?

They ask what everything later rests on: that nothing changes when the model is recorded, that every block at every step and
branch is seen under the right label, that the sites add up, and that both engines see the same. Each is a short run on a
maze of the bundled tasks, which any image-to-video pipeline can take.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_lens import lens as lenses
from dit_lens import reasoner
from dit_lens.record import Record
from dit_lens.reducers import norm
from dit_lens.run import Run
from dit_lens.selection import at

STEPS = 3
"""Denoising steps of a check's runs: a first, a last and one between."""


@dataclass(frozen=True)
class Check:
    """A check, whether it passed, and what was found."""

    name: str
    passed: bool
    found: str


def check(lens: lenses.Lens, arguments: Mapping[str, Any] | None = None) -> list[Check]:
    """Runs every check on a lens; ``arguments`` override the pipeline arguments of the sample that is run."""
    sample = reasoner.task("maze").sample("test", 0)
    inputs = {**sample.inputs, "num_inference_steps": STEPS, **(arguments or {})}
    everything = Record(at(site="all"), reduce=norm)
    plain = lens.plain(**inputs, output_type="latent").frames.cpu()
    bare = lens.run(**inputs, decode=False)
    recorded = lens.run(**inputs, decode=False, record=everything)
    other = lenses.wrap(lens.pipe, engine="hooks" if lens.engine == "nnsight" else "nnsight")
    again = other.run(**inputs, decode=False, record=everything)
    return [
        _same("recording nothing leaves the pipeline as it is", bare.latents[-1], plain),
        _same("recording every site of every block leaves it as it is", recorded.latents[-1], plain),
        _labels(lens, recorded, lens.forecast(**inputs).timesteps),
        _sums(lens, inputs),
        *_parts(lens, inputs),
        _engines(recorded, again),
        _decoding(lens, inputs),
    ]


def _same(name: str, found: Tensor, expected: Tensor) -> Check:
    """Two results, bit for bit."""
    if torch.equal(found, expected):
        return Check(name, True, "bit-identical")
    return Check(name, False, f"differs by up to {(found.float() - expected.float()).abs().max():.3g}")


def _labels(lens: lenses.Lens, run: Run, timesteps: tuple[float, ...]) -> Check:
    """Every block of every expert that ran, at every step, branch and site, once."""
    counts = {name: len(lens.architecture.block_list(part)) for name, part in lens.architecture.denoisers(lens.pipe).items()}
    expected = sum(counts[expert] for expert in run.experts) * len(run.branches) * len(lens.architecture.sites)
    found = len({(cell.step, cell.branch, cell.block, cell.site) for cell in run.activations.cells})
    passed = found == expected == len(run.activations) and run.timesteps == timesteps
    name = "every block, site, step and branch is recorded once, under its timestep"
    return Check(name, passed, f"{found} of {expected} cells ({', '.join(run.branches)})")


def _sums(lens: lenses.Lens, inputs: Mapping[str, Any]) -> Check:
    """The stream after a block is the stream after the one before it plus its update."""
    run = lens.run(**inputs, decode=False, record=at(step=0, branch="cond", site=["resid", "update"], frames=0))
    stream, update = (run.activations.stack(step=0, branch="cond", site=site) for site in ("resid", "update"))
    error = ((stream[1:] - stream[:-1] - update[1:]).norm() / update[1:].norm()).item()
    return Check("streams and updates add up", error < 1e-5, f"relative error {error:.1g}")


def _parts(lens: lenses.Lens, inputs: Mapping[str, Any]) -> list[Check]:
    """What the modules of a block contribute adds up to the block's update; where the architecture names contributions."""
    parts = [site.name for site in lens.architecture.sites if site.measures == "contribution"]
    if not parts:
        return []
    sites = ["resid", "update", *parts]
    run = lens.run(**inputs, decode=False, record=at(step=0, branch="cond", site=sites, frames=0))
    stream, total, *added = (run.activations.stack(step=0, branch="cond", site=site) for site in sites)
    error = ((sum(added) - total).norm() / stream.float().norm()).item()
    # The parts are exact; the stream is rounded to the model's precision wherever one is added to it.
    limit = max(1e-5, 2 * torch.finfo(stream.dtype).eps)
    return [Check("contributions add up to the update", error < limit, f"relative error {error:.1g}")]


def _engines(one: Run, other: Run) -> Check:
    """Both engines record the same bits."""
    pairs = list(zip(one.activations, other.activations, strict=True))
    differing = sum(a.cell != b.cell or not torch.equal(a.tensor, b.tensor) for a, b in pairs)
    return Check(
        "nnsight and plain hooks record the same",
        not differing,
        f"{len(pairs) - differing} of {len(pairs)} bit-identical",
    )


def _decoding(lens: lenses.Lens, inputs: Mapping[str, Any]) -> Check:
    """Decoding a run's last latents gives its video."""
    run = lens.run(**inputs)
    assert run.video is not None
    return _same("decoding the last latents gives the pipeline's video", lens.decode(run.latents[-1]), run.video)
