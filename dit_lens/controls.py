"""Controls that need a model of their own.

A map that looks meaningful on a trained model may come from the architecture alone: positions, the patch grid, the image
that is fed in. The same denoiser with random weights shows what is left without training.
"""

from typing import Any

import torch

from dit_lens.architectures import EXPERTS


def random_weights(pipe: Any, seed: int = 0) -> Any:
    """A pipeline that shares everything with ``pipe`` but its denoisers, which are new ones of the same configuration.

    Their weights are those that the class starts training from, drawn after ``seed``; the global random state is left as it
    was.
    """
    components = dict(pipe.components)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in EXPERTS:
            trained = components.get(name)
            if trained is not None:
                fresh = type(trained).from_config(trained.config).eval()
                for new, old in zip(fresh.parameters(), trained.parameters(), strict=True):
                    new.data = new.data.to(old)  # one by one: some stay in float32 when the others do not
                for new, old in zip(fresh.buffers(), trained.buffers(), strict=True):
                    new.data = new.data.to(old)
                components[name] = fresh
    options = {key: value for key, value in pipe.config.items() if key not in components and not key.startswith("_")}
    return type(pipe)(**components, **options)
