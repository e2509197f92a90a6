"""Probes: what can be read from recorded activations, and whether that means anything.

A probe that reads a property well proves that the property is there to be read, not that the model uses it; and a flexible
probe reads almost anything. So the probes of a map are linear (the network is an upper bound), are scored on puzzles that they
have not seen, and stand beside baselines that see no activation and a control task that has nothing to do with the puzzle.
"""

from probes.linear import ProbeScore, fit_and_score, split_groups

__all__ = ["ProbeScore", "fit_and_score", "split_groups"]
