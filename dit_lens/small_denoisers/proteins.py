"""A small denoiser of molecules: a token a residue."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import RFD4ProteinaTransformer
from torch import nn

from dit_lens.small_denoisers.record import Blocks, SmallDenoiser
from dit_lens.small_pipelines.making import alive

RESIDUES = 6


def proteina() -> nn.Module:
    """Attention is biased by pairs of residues, which `pair_update_layers` renews after the first block.

    Each half of a block gates what its module returns, and then hands it to the block.
    """
    return alive(
        RFD4ProteinaTransformer,
        nlayers=3,
        token_dim=16,
        nheads=2,
        dim_cond=8,
        pair_repr_dim=8,
        latent_dim=4,
        token_type_emb_dim=4,
        t_emb_dim=8,
        seq_sep_dim=4,
        xt_pair_dist_dim=6,
        feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
        feats_pair_repr=("xt_bb_ca_pair_dists",),
        tri_mult_c=8,
        num_sequence_classes=5,
        num_token_types=3,
    )


def proteina_arguments() -> dict[str, Any]:
    """Six residues: a place in space, and four latents, for each."""
    everywhere = torch.ones(2, RESIDUES, dtype=torch.bool)
    return {
        "bb_ca": torch.randn(2, RESIDUES, 3),
        "local_latents": torch.randn(2, RESIDUES, 4),
        "bb_ca_time": torch.tensor([0.5, 0.5]),
        "local_latents_time": torch.tensor([0.4, 0.4]),
        "padding_mask": everywhere,
        "token_type": torch.arange(RESIDUES).remainder(3).expand(2, -1),
        "conditioning": {"is_in_context_conditioning": ~everywhere, "supports_local_latent": everywhere},
    }


ALL = (
    SmallDenoiser(
        name="RFD4ProteinaTransformer",
        make=proteina,
        arguments=proteina_arguments,
        blocks=(
            Blocks(
                "transformer_layers",
                count=3,
                streams=("visual",),
                modules={("attn", "visual"): "mhba.mha", ("mlp", "visual"): "transition.transition"},
            ),
        ),
        tokens={"visual": RESIDUES},
        layout=(RESIDUES, 1, 1),
        aside=("pair_update_layers",),
    ),
)
