"""What the layer swap shows: whose answer comes of it, by block, by step and in pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dit_lens import plots
from dit_lens.experiment import Context
from dit_lens.statistics import in_words, summarise
from experiments.swapping import ALL_STEPS, CONTROLS, FINAL, OTHER_TOKENS, READINGS, SWAP, X0_HAT

READOUTS = (FINAL, X0_HAT)
TOGETHER = "all tasks"
FATES = {"flipped": "flipped: the donor's answer", "kept": "kept: its own answer", "destroyed": "destroyed: neither"}
SWAPPED = "Visual tokens of one block become the donor's, {} branch, same seed."
INTERVALS = (
    "Shaded: 95 % bootstrap intervals over puzzles (pairs whose clean samples are copies of one puzzle up to symmetry count as"
    " one), N of them in the corner (a share of 0 or 1: exact binomial)."
)


def first_step(context: Context, results: pd.DataFrame) -> None:
    """Flip rate of every block at the first step, for both readings, in the final video and in x0-hat, with variants and
    controls."""
    first = together(results[(results["step"] == 0)])
    summary = rows_named(summarise(first, "flipped", ["task", "variant", "reading", "readout", "block"], cluster="puzzle"))
    figure = plots.curve_grid(
        summary,
        x="block",
        x_label="swapped block",
        row="row",
        column="task",
        series="variant",
        controls=[OTHER_TOKENS, *CONTROLS],
        row_labels=labels(summary, "flip rate"),
        limits=dict.fromkeys(summary["row"].unique(), (-0.04, 1.04)),
    )
    context.figure(
        "first-step",
        figure,
        "Does swapping one block at the first step flip the answer?",
        f"{SWAPPED.format('cond')} Flip rate: share of pairs whose video shows the donor's answer. {INTERVALS} The variants and"
        " controls (dashed) are of fewer pairs and blocks than the swap. Every step and branch: the same block at all steps, on"
        f" all guidance branches; its x0-hat would be the final video. {splits(results)}",
    )


def fates(context: Context, results: pd.DataFrame) -> None:
    """What becomes of the answer at the first step: flipped, kept or destroyed."""
    first = together(results[(results["step"] == 0) & (results["variant"] == SWAP)])
    tables = [
        summarise(first, fate, ["task", "reading", "readout", "block"], cluster="puzzle").assign(fate=name)
        for fate, name in FATES.items()
    ]
    summary = rows_named(pd.concat(tables, ignore_index=True))
    figure = plots.curve_grid(
        summary,
        x="block",
        x_label="swapped block",
        row="row",
        column="task",
        series="fate",
        row_labels=labels(summary, "share of pairs"),
        limits=dict.fromkeys(summary["row"].unique(), (-0.04, 1.04)),
    )
    caption = f"{SWAPPED.format('cond')} First step only. {INTERVALS} {splits(results)}"
    context.figure("fates", figure, "What becomes of the answer", caption)


def step_map(context: Context, results: pd.DataFrame) -> None:
    """Flip rate over blocks and steps, and with every step and branch swapped."""
    swapped = results[results["variant"].isin([SWAP, ALL_STEPS])]
    if swapped["step"].nunique() == 1 and ALL_STEPS not in set(swapped["variant"]):
        return
    later = swapped[(swapped["step"] > 0) | (swapped["variant"] == ALL_STEPS)]
    here = swapped[swapped["block"].isin(later["block"])].sort_values(["variant", "step"], ascending=[False, True])
    named = [f"{step}\n{sigma:.2f}" for step, sigma in zip(here["step"], here["sigma"], strict=True)]
    here = here.assign(
        at=np.where(here["variant"] == ALL_STEPS, "every step\nand branch", named), panel=here["reading"] + ", " + here["readout"]
    )
    summary = summarise(here, "flipped", ["panel", "at", "block"], cluster="puzzle")
    # What was not measured stays empty.
    whole = pd.MultiIndex.from_product([summary[axis].unique() for axis in ("panel", "at", "block")])
    whole = whole.set_names(["panel", "at", "block"])
    few, many = summary["clusters"].min(), summary["clusters"].max()
    widest = (summary["high"] - summary["low"]).max()
    figure = plots.heat_maps(
        summary.set_index(["panel", "at", "block"]).reindex(whole).reset_index(),
        panel="panel",
        x="at",
        y="block",
        value="mean",
        x_label="swapped step, and its \u03c3",
        y_label="swapped block",
        value_label="flip rate",
        limits=(0, 1),
    )
    context.figure(
        "map",
        figure,
        "Flip rate by block and step",
        f"{SWAPPED.format('cond')} All tasks together, N = {few} to {many} puzzles a cell; 95 % intervals (bootstrap over"
        f" puzzles) are at most {widest:.2f} wide. Steps and blocks are thinned. Every step and branch: the block is swapped at"
        f" all steps, on all guidance branches. {splits(results)}",
    )


def numbers(context: Context, results: pd.DataFrame) -> None:
    """The middle block at the first step in numbers: every variant, and what its pairs do by themselves."""
    first = together(results[(results["step"] == 0) & (results["band"] == "middle")])
    rows = []
    for (reading, variant, task), here in first.groupby(["reading", "variant", "task"], sort=False):
        final, x0_hat = (here[here["readout"] == readout] for readout in READOUTS)
        told = {
            "flipped": (final, "flipped"),
            "kept": (final, "kept"),
            "destroyed": (final, "destroyed"),
            "flipped, all of the board right": (final, "flipped_right"),
            "flipped, x0-hat": (x0_hat, "flipped"),
            "clean run, own answer": (final, "clean_own"),
            "donor run, own answer": (final, "donor_own"),
        }
        shares = {
            title: in_words(summarise(table, column, ["task"], cluster="puzzle")) for title, (table, column) in told.items()
        }
        counts = {"pairs": final["case"].nunique(), "puzzles": final["puzzle"].nunique()}
        named = {"reading": reading, "swapped": variant, "task": task, "tokens swapped": f"{final['tokens'].mean():.2f}"}
        rows.append(named | shares | counts)
    context.table(
        "The middle block at the first step",
        pd.DataFrame(rows),
        "Shares of pairs in the final video unless said otherwise, with 95 % intervals over puzzles up to symmetry. Tokens"
        f" swapped: the share of all visual tokens. {splits(results)}",
    )


def examples(context: Context, pair: Any, pictures: Mapping[str, np.ndarray], table: pd.DataFrame) -> None:
    """Last frames of one pair: its own two, and what swaps at each block make of the clean one."""
    swapped = pictures["swapped"]
    rows = [(reading, readout) for reading in range(swapped.shape[0]) for readout in range(swapped.shape[1])]
    sheet = np.stack([np.stack([pictures["clean"], pictures["donor"], *swapped[row]]) for row in rows])
    names = list(READINGS.values())
    figure = plots.film(
        sheet,
        [f"{names[reading]},\n{READOUTS[readout]}" for reading, readout in rows],
        ["clean", "donor", *(f"block {block}" for block in sorted(table["block"].unique()))],
        title=f"clean: \u201c{pair.clean.prompt}\u201d\ndonor: \u201c{pair.donor.prompt}\u201d",
    )
    name = pair.clean.task.name
    context.figure(
        f"pictures-{name}",
        figure,
        f"{name}: one pair, every swapped block",
        f"Last frames of the first pair (held-out sample {pair.clean.index}, not selected; its donor is of the {pair.donor.split}"
        " split): the clean and the donor run, then the clean run with one block swapped at the first step.",
    )


def splits(results: pd.DataFrame) -> str:
    """Where the samples of the pairs come from."""
    pairs = results.drop_duplicates("case")
    seen = int((pairs["donor_split"] == "train").sum())
    return f"Clean samples are held out; {seen} of the {len(pairs)} donors are puzzles of the training split."


def last_frame(video: Any) -> np.ndarray:
    """The last frame of the first row of (rows, frames, H, W, 3), as uint8."""
    return (video[0, -1] * 255).round().byte().numpy()


def together(results: pd.DataFrame) -> pd.DataFrame:
    """The results, and once more under one name for all tasks where there are several."""
    return pd.concat([results, results.assign(task=TOGETHER)]) if results["task"].nunique() > 1 else results


def rows_named(summary: pd.DataFrame) -> pd.DataFrame:
    """With a row of panels for every reading and readout."""
    return summary.assign(row=summary["reading"] + ", " + summary["readout"])


def labels(summary: pd.DataFrame, what: str) -> dict[str, str]:
    """The rows of panels in their order, with what their axis says."""
    there = set(summary["row"])
    every: Sequence[str] = [f"{reading}, {readout}" for reading in READINGS.values() for readout in READOUTS]
    return {row: row.replace(", ", ",\n") + f"\n{what}" for row in every if row in there}
