"""What the paper shows, item by item, and where its counterpart is: every figure and table of arXiv 2603.16870.

Contents of the figures are known from the paper's text, its project page and third parties' notes; where nobody's notes say
what an item shows, neither do we.
"""

from __future__ import annotations

from dataclasses import dataclass

PART_TWO = "assigned to part two: memory, self-correction, perception before action, frame counts and few steps"


@dataclass(frozen=True)
class Item:
    """A figure or table of the paper.

    Attributes:
        name: as the paper calls it. shows: what it shows. experiments: those that have its counterpart. note: what is
            different, or why there is none.
    """

    name: str
    shows: str
    experiments: tuple[str, ...] = ()
    note: str = ""


ITEMS = (
    Item("Fig. 1", "a maze's decoded x0-hat at selected steps: several paths, pruning, decision", ("step-lens",)),
    Item(
        "Fig. 2 a-d",
        "several candidate answers early, one later",
        ("step-lens",),
        "in maze-loops and tictactoe",
    ),
    Item("Fig. 2 e-f", "superposed sizes or orientations of one object", ("step-lens",), "in pattern; nothing here rotates"),
    Item("Fig. 3 a", "drawing of the two noise injections", ("noise",), "our figure shows them on a real run"),
    Item("Fig. 3 b", "score with noise at a step and at a frame", ("noise",), "all steps and frames; doses and sigmas matched"),
    Item("Fig. 3 c", "divergence (CKA) by injection step and later step", ("propagation",)),
    Item("Fig. 4 a-b", "objects that leave or are hidden come back", (), PART_TWO),
    Item("Fig. 4 c-d", "wrong first answers corrected later", (), PART_TWO),
    Item("Fig. 5", "what is named is marked before it moves", (), PART_TWO),
    Item("Fig. 6 a", "energy of tokens by block and frame", ("token-energy",), "in numbers, four looks, with an untrained model"),
    Item("Fig. 6 b", "one block's swap flips the answer", ("layer-swap",), "every block, two readings, controls"),
    Item("Fig. 7, 8", "not recovered from any source", (), "nobody's notes say what they show"),
    Item("Fig. 9, 10", "more of Fig. 2", ("step-lens",)),
    Item("Fig. 11-13", "more of Fig. 4", (), PART_TWO),
    Item(
        "appendix, tokens", "norms and sparsity of tokens over blocks 0-39", ("token-energy",), "sparsity: energy of the top 5 %"
    ),
    Item(
        "main table",
        "VBVR-Bench scores of video models",
        (),
        "the benchmark's models cannot be run here; folders in its layout are read, and the ensemble is measured on the reasoner",
    ),
    Item("appendix C, table", "the ensemble in three windows of layers", ("ensemble",)),
    Item("appendix D", "scores with fewer frames", (), PART_TWO),
    Item("appendix E", "a four-step distilled model", (), PART_TWO),
    Item(
        "section 5, bands",
        "layers perceive, then reason, then consolidate",
        ("specialization", "layer-ablation"),
    ),
    Item("v3, 200 cases", "72 % of the cases show several paths or a superposition", ("step-lens",), "counted, with its null"),
)
