"""A table of what a lens can see: experts and blocks, streams and sites, guidance, schedule, token layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit_lens.architectures import Architecture
from dit_lens.sites import Site


@dataclass(frozen=True)
class Description:
    """Rows of (what, which); `str` makes a readable table of them."""

    rows: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        width = max(len(what) for what, _ in self.rows)
        return "\n".join(f"{what:<{width}}  {which}" for what, which in self.rows)


def describe(name: str, pipe: Any, architecture: Architecture) -> Description:
    """What the lens called `name` on this pipeline can see."""
    rows = [("model", name), ("pipeline", type(pipe).__name__), ("architecture", architecture.name)]
    for expert, denoiser in architecture.denoisers(pipe).items():
        blocks = architecture.block_list(denoiser)
        millions = sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6
        rows.append(
            (
                expert,
                f"{len(blocks)} blocks ({type(blocks[0]).__name__}, width {architecture.width(denoiser)}),"
                f" {millions:.3g} M parameters in {str(next(denoiser.parameters()).dtype).removeprefix('torch.')}",
            )
        )
    boundary = getattr(pipe, "config", {}).get("boundary_ratio") if len(architecture.denoisers(pipe)) > 1 else None
    if boundary is not None:
        threshold = boundary * pipe.scheduler.config.num_train_timesteps
        rows.append(("switch", f"transformer_2 below timestep {threshold:g}"))
    denoiser = next(iter(architecture.denoisers(pipe).values()))
    rows += [
        *_stacks(architecture, denoiser),
        *_sites(architecture, denoiser),
        ("guidance", _guided(architecture)),
        ("schedule", "a loop of its own" if architecture.loop else _schedule(pipe.scheduler)),
        ("layout", _layout(architecture, denoiser)),
    ]
    if hasattr(pipe, "vae_scale_factor_temporal"):
        rows.append(
            (
                "latents",
                f"1 latent frame holds {pipe.vae_scale_factor_temporal} frames (the first one 1),"
                f" {pipe.vae_scale_factor_spatial} x {pipe.vae_scale_factor_spatial} pixels a latent",
            )
        )
    return Description(tuple(rows))


def _stacks(architecture: Architecture, denoiser: Any) -> list[tuple[str, str]]:
    """The streams; and where blocks differ in them, the lists of blocks with theirs."""
    rows = [("streams", ", ".join(architecture.streams))]
    if len(architecture.stacks) == 1:
        return rows
    for stack in architecture.stacks:
        count = len(list(denoiser.get_submodule(stack.path).children()))
        how = " then ".join(stack.streams) + " in one sequence" if stack.joined else ", ".join(stack.streams)
        rows.append(("blocks", f"{count} of {stack.path}: {how}"))
    return rows


def _guided(architecture: Architecture) -> str:
    guidance = architecture.guidance
    if guidance is None:
        return "watched at the beginning of every run of other arguments"
    return f"{guidance.kind}: {', then '.join(guidance.branches)}, when guidance_scale > {architecture.guided_above:g}"


def _layout(architecture: Architecture, denoiser: Any) -> str:
    if architecture.patches is not None:
        return architecture.token_rule
    return f"{architecture.token_rule}; patch_size {tuple(denoiser.config.patch_size)}"


def _sites(architecture: Architecture, denoiser: Any) -> list[tuple[str, str]]:
    """Rows on the sites: all of them, which have heads, and which are read-only, with what their gates depend on."""
    rows = [("sites", ", ".join(dict.fromkeys(site.name for site in architecture.sites)))]
    per_head = dict.fromkeys(site.name for site in architecture.sites if site.per_head)
    if per_head:
        rows.append(("heads", f"{architecture.heads(denoiser)}, at {', '.join(per_head)}"))
    read_only = [site for site in architecture.sites if site.read_only]
    if read_only:
        rows.append(("read-only", ", ".join(f"{site.name}{_gated(site)}" for site in read_only)))
    return rows


def _gated(site: Site) -> str:
    """What the gate of a contribution depends on."""
    if site.measures != "contribution":
        return ""
    return f" (gated by the {site.gate.depends})" if site.gate else " (no gate)"


def _schedule(scheduler: Any) -> str:
    telling = ("shift", "flow_shift", "prediction_type", "use_flow_sigmas", "num_train_timesteps")
    settings = [f"{name}={scheduler.config[name]}" for name in telling if scheduler.config.get(name) is not None]
    return f"{type(scheduler).__name__}({', '.join(settings)})"
