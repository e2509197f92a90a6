"""What has to be known about a diffusion transformer before it can be read block by block, and how it is found out.

`record` is one family, in words that everything above speaks; `discovery` finds the stacks of blocks of a denoiser that nobody
wrote a record for, by watching it.
"""

from dit_lens.architectures.layout import Layout, Patches
from dit_lens.architectures.record import EXPERTS, WAN, Architecture, Guidance, Loop, lookup, register
from dit_lens.architectures.stack import Block, Stack

__all__ = ["EXPERTS", "WAN", "Architecture", "Block", "Guidance", "Layout", "Loop", "Patches", "Stack", "lookup", "register"]
