"""What the experiments on layers show: damage over depth, and where perception, reasoning and consolidation are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dit_lens import plots
from dit_lens.experiment import Context
from dit_lens.statistics import in_words, summarise, unseen
from experiments.content_shares import CONTENTS, Profile
from probes.change_points import PAPER

OTHER_SEED = "another seed"
ABLATED, NOISE, PATCHED, OTHER = "left out", "moved as far at random", "donor's update", "another donor's update"
CORNER: Any = {"ha": "right", "va": "top", "fontsize": 7, "color": "#444444"}
NOISE_LABEL, SEED_LABEL = f"{NOISE} (control)", f"{OTHER_SEED} (control)"
KIND_LABELS = {
    "skip": ABLATED,
    "zero": "zeros",
    "mean": "mean of other samples",
    "resample": "another sample's",
    "noise": NOISE_LABEL,
    OTHER_SEED: SEED_LABEL,
}
PART_LABELS = {
    "perception": "damage to perception\n(share of what must stay)",
    "reasoning": "damage to reasoning\n(share right)",
    "picture": "damage to the picture\n(clean colour, 0 to 1)",
}
SITE_LABELS = {"update": "the whole block", "attn": "self-attention", "cross_attn": "cross-attention", "mlp": "MLP"}


def ablation(context: Context, results: pd.DataFrame) -> None:
    """Damage over depth by band and by component, maps of every case, and the largest damages in a table."""
    # Samples of two tasks with the same number are two samples.
    parts = results[results["measure"].isin(PART_LABELS)].assign(one=results["task"] + results["sample"].astype(str))
    tasks, count = list(dict.fromkeys(parts["task"])), parts["one"].nunique()
    summary = summarise(parts, "damage", ["kind", "site", "band", "block", "measure"], cluster="one")
    summary["series"] = summary["kind"].map(KIND_LABELS)
    edited = summary[summary["kind"] != OTHER_SEED].astype({"block": int})
    levels = summary[summary["kind"] == OTHER_SEED]
    made = (
        f"Clean less edited, {count} held-out samples of {', '.join(tasks)}; one block at a time, in both guidance branches."
        " Shaded: 95 % bootstrap intervals over samples, N of them in the corner. Dashed: controls."
    )
    whole = edited[edited["site"] == "update"]
    bands = _band_titles(parts)
    if not whole.empty:
        _curves(
            context, "blocks", "What is lost without a block", whole, levels, "band", bands, f"{made} Bands: thirds of the steps."
        )
    inside = edited[(edited["site"] != "update") & (edited["band"] == "all")]
    if not inside.empty:
        sites = {str(site): SITE_LABELS.get(str(site), str(site)) for site in inside["site"].unique()}
        _curves(
            context,
            "components",
            "What is lost without a part of a block",
            inside,
            levels,
            "site",
            sites,
            f"{made} All steps.",
        )
    for task in tasks:
        _case_map(context, parts[(parts["task"] == task) & (parts["kind"] != OTHER_SEED)], task)
    _kept(context, parts[parts["kind"] == OTHER_SEED])
    _largest(context, summary, made)


def _band_titles(parts: pd.DataFrame) -> dict[str, str]:
    """Each band with its steps and sigmas."""
    ends = parts.drop_duplicates("band").set_index("band")
    return {
        band: f"{band}: steps {row['step']} to {row['last_step']}\n\u03c3 {row['sigma']:.2f} to {row['last_sigma']:.2f}"
        for band, row in ends.iterrows()
    }  # pyright: ignore[reportReturnType]


def _curves(
    context: Context,
    name: str,
    title: str,
    summary: pd.DataFrame,
    levels: pd.DataFrame,
    axis: str,
    panels: dict[str, str],
    about: str,
) -> None:
    """Damage over depth, one row for each part of it and one column for each panel."""
    shown = summary.assign(panel=summary[axis].map(panels))
    columns = list(dict.fromkeys(shown["panel"]))
    level = pd.concat([levels.assign(panel=panel) for panel in columns])
    figure = plots.curve_grid(
        shown,
        x="block",
        x_label="block",
        row="measure",
        column="panel",
        series="series",
        row_labels=PART_LABELS,
        controls=[NOISE_LABEL],
        levels=level,
        lines_at=dict.fromkeys(PART_LABELS, 0.0),
    )
    context.figure(name, figure, title, about)


def _case_map(context: Context, parts: pd.DataFrame, task: str) -> None:
    """Every case and block of a task, one map for each part of the damage; of noise only that in place of whole blocks, at all
    steps, by which the maps stay legible."""
    beside = (parts["kind"] == "noise") & ((parts["site"] != "update") | (parts["band"] != "all"))
    if beside.all():
        return
    found = summarise(parts[~beside], "damage", ["case", "block", "measure"]).astype({"block": int})
    found["panel"], found["case"] = found["measure"].map(PART_LABELS), found["case"].str.replace(" ", "\n")
    figure = plots.heat_maps(
        found,
        panel="panel",
        x="case",
        y="block",
        value="mean",
        x_label="what is done, where in the block, at which steps",
        y_label="block",
        value_label=f"clean less edited, mean of N = {found['clusters'].min()}",
        limits=(min(0.0, float(found["mean"].min())), 1.0),
    )
    count, widths = int(found["clusters"].min()), found["high"] - found["low"]
    widest = ", ".join(f"{wide:.2f} ({part})" for part, wide in widths.groupby(found["measure"], sort=False).max().items())
    context.figure(
        f"map-{task}",
        figure,
        f"Damage by block and case, {task}",
        f"{count} held-out samples. Intervals of all tasks together stand in the curves; of one cell here the 95 % interval is at"
        f" most {widest} wide, and has no width where all samples agree, though one in {1 / unseen(count):.0f} may differ. White:"
        " blocks at which a case is not tried. Noise in a part or a band is in the curves.",
    )


def _kept(context: Context, parts: pd.DataFrame) -> None:
    """What the runs keep of which nothing is left out: more than this cannot be lost."""
    found = summarise(parts, "clean", ["task", "measure"])
    rows = []
    for task, table in found.groupby("task", sort=False):
        shares = {str(part): in_words(one) for part, one in table.groupby("measure", sort=False)}
        rows.append({"task": task, **shares, "N": table["clusters"].min()})
    context.table(
        "What the clean runs keep",
        pd.DataFrame(rows),
        "Of perception, reasoning (share right) and picture, from 0 to 1, with 95 % bootstrap intervals over samples.",
    )


def _largest(context: Context, summary: pd.DataFrame, about: str) -> None:
    """For every case and part: the block that is missed most, beside the control at the same block."""
    noise = summary[summary["kind"] == "noise"].set_index(["measure", "block", "site", "band"])
    rows = []
    for (kind, site, band), case in summary.groupby(["kind", "site", "band"], sort=False):
        row = {"case": KIND_LABELS[str(kind)], "site": SITE_LABELS.get(str(site), "-"), "steps": band}
        for part, found in case.groupby("measure", sort=False):
            top = found.loc[[found["mean"].idxmax()]]
            block = top["block"].iloc[0]
            at = (part, block, site, band)
            beside = noise.loc[[at]] if at in noise.index else noise[:0]
            row[str(part)] = in_words(top) + (f" (block {block})" if kind != OTHER_SEED else "")
            if kind not in ("noise", OTHER_SEED):
                row[f"{part}, control"] = in_words(beside)
        rows.append(row)
    table = pd.DataFrame(rows).fillna("-")
    context.table("The block that is missed most, by case", table, f"{about} The largest of several blocks is biased upwards.")


def specialization(context: Context, profiles: Mapping[str, Profile], gain: Profile) -> None:
    """The three profiles over depth with their bands and the paper's; the gain of every block; both as tables."""
    compared = {name: profiles[name].compared() for name in ("selectivity", "damage", "patching")}
    tables = {name: profile.table() for name, profile in profiles.items()}
    counts = ", ".join(f"N {_count(name, profile.samples)} ({name})" for name, profile in profiles.items() if name in compared)
    about = (
        "Shaded: 95 % intervals (of selectivity drawn from the probes' intervals over test samples; of damage and patching"
        " bootstrap over pairs). Grey bands: the paper's. Black lines: the changes that a shuffle test finds at 5 %, with the"
        " 95 % interval of each above (none where every draw agrees). Thin grey lines: the best cut in two places, as the paper's"
        " bands are, where the test does not find two. Dashed in the middle: the control, of each content in shares of the same"
        " damage. Patching: the share of the squares of the donor's answer that are painted, less that in the clean run."
        " Selectivity and damage are means over the steps measured; guidance branch: "
        f"{context.settings.branch}. {counts}."
    )
    context.figure("bands", _bands(tables, compared), "Where perception, reasoning and consolidation are", about)
    summary = gain.table().rename(columns={"value": "mean", "samples": "clusters"}).assign(row="gain", panel="all targets")
    figure = plots.curve_grid(
        summary,
        x="block",
        x_label="block",
        row="row",
        column="panel",
        series="content",
        row_labels={"gain": "selectivity less that\nof the block before"},
        lines_at={"gain": 0.0},
    )
    context.figure(
        "gain",
        figure,
        "Where content becomes readable",
        "Mean selectivity over the targets of a content and over steps, less that of the block before; of the first block less"
        " that of the noisy latents. Shaded: 95 % intervals, those of two blocks taken as independent. N: test samples, fewest.",
    )
    _band_table(context, compared)


def _bands(tables: Mapping[str, pd.DataFrame], compared: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Three panels over depth."""
    with mpl.rc_context(plots.LOOK):
        figure = Figure(figsize=(10.4, 3.9), layout="constrained")
        axes: Any = figure.subplots(1, 3, sharex=True)
        titles = {
            "selectivity": "Probes: share of selectivity",
            "damage": "Ablation: where content is lost",
            "patching": "Patching: where the answer is moved",
        }
        for axis, (name, title) in zip(axes, titles.items(), strict=True):
            _papers_bands(axis)
            if name == "patching":
                _line(axis, tables["patching"], plots.COLOURS[3], PATCHED)
                _line(axis, tables["other"], plots.GREYS[0][0], f"{OTHER} (control)", linestyle=plots.GREYS[0][1])
            else:
                for content, colour in zip(CONTENTS, plots.COLOURS, strict=False):
                    _line(axis, tables[name][tables[name]["content"] == content], colour, content)
                    if name == "damage":
                        control = tables["noise"][tables["noise"]["content"] == content]
                        _line(axis, control, colour, "", linestyle="--", alpha=0.6)
                if name == "damage":
                    axis.text(0.98, 0.94, f"dashed: {NOISE_LABEL}", **CORNER, transform=axis.transAxes)
            # Room for the names of the bands below, and the intervals of the boundaries above.
            low, high = axis.get_ylim()
            axis.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
            _cuts(axis, compared[name])
            axis.set_title(f"{title}, N {_count(name, compared[name]['samples'])}")
        for axis, label in zip(
            axes, ("of the three contents", "of the content's damage at all blocks", "of the donor's answer, gained"), strict=True
        ):
            axis.set_ylabel(f"share {label}")
        figure.supxlabel("relative depth (block / number of blocks)", fontsize=9)
        handles = [handle for axis in axes[[0, 2]] for handle in axis.get_legend_handles_labels()[0]]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _count(name: str, samples: int) -> str:
    """How many samples are behind a profile; behind selectivity the test samples of the target that has the fewest."""
    return f"\N{GREATER-THAN OR EQUAL TO} {samples}" if name == "selectivity" else f"= {samples}"


def _papers_bands(axis: Axes) -> None:
    ends = (0.0, *PAPER, 1.0)
    for place, name in enumerate(("perception", "reasoning", "consolidation")):
        axis.axvspan(ends[place], ends[place + 1], color="#e4e4e4" if place % 2 else "#f6f6f6", zorder=0, linewidth=0)
        middle = (ends[place] + ends[place + 1]) / 2
        axis.text(
            middle, 0.02, name, transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=6.5, color="#777777"
        )
    axis.grid(False)
    axis.set_xlim(-0.02, 1.0)


def _line(axis: Axes, table: pd.DataFrame, colour: str, label: str, **look: Any) -> None:
    axis.plot(table["depth"], table["value"], color=colour, label=label, marker="o", markersize=2.6, linewidth=1.5, **look)
    axis.fill_between(table["depth"], table["low"], table["high"], color=colour, alpha=0.16, linewidth=0)


def _cuts(axis: Axes, found: Mapping[str, Any]) -> None:
    """The changes that the test found, each with its interval as a bar above; thin, where it did not find two, the best two."""
    if found["changes"] != len(PAPER):
        for place in range(len(PAPER)):
            axis.axvline(found[f"boundary {place}"], color="#999999", linewidth=0.8, linestyle=":")
    for place, (boundary, low, high) in enumerate(found["found"]):
        axis.axvline(boundary, color="black", linewidth=1)
        height = 0.9 + 0.03 * place
        across = axis.get_xaxis_transform()
        axis.plot([low, high], [height, height], transform=across, color="black", linewidth=2.4, solid_capstyle="butt")
    many = {0: "no change found", 1: "1 change found"}.get(found["changes"], f"{found['changes']} changes found")
    axis.text(0.98, 0.99, many, **CORNER, transform=axis.transAxes)


def _band_table(context: Context, compared: Mapping[str, Mapping[str, Any]]) -> None:
    rows = []
    for row in compared.values():
        shown: dict[str, Any] = {"evidence": row["quantity"], "changes found": row["changes"]}
        for place, depth in enumerate(PAPER):
            ends = f"{row[f'boundary {place}']:.2f} [{row[f'low {place}']:.2f}, {row[f'high {place}']:.2f}]"
            shown[f"boundary {place + 1} of 2"] = ends
            shown[f"contains {depth}"] = "yes" if row[f"contains {depth}"] else "no"
        for kind, title in (("bands", "cut at the same blocks"), ("content", "strongest content is the band's")):
            if f"{kind} share" in row:
                shown[title] = f"{row[f'{kind} share']:.2f}, shuffled {row[f'{kind} shuffled']:.2f}, p = {row[f'{kind} p']:.3f}"
            else:
                shown[title] = "-"
        shown["N"] = _count("selectivity" if "selectivity" in row["quantity"] else "", row["samples"]).removeprefix("= ")
        rows.append(shown)
    about = (
        "Relative depth of the first block of a band. Changes found: how many a shuffle test at 5 % finds, three at most; the"
        " boundaries are those of exactly two. Agreement: share of blocks in the same band as in the paper, beside the mean over"
        " curves with their blocks shuffled, and how often these agree as well (p; not corrected for the number of tests)."
    )
    context.table("Bands found, beside the paper's (0.25, 0.75)", pd.DataFrame(rows), about)


def specialization_maps(context: Context, asked: pd.DataFrame, lost: pd.DataFrame, moved: pd.DataFrame) -> None:
    """Block by step: selectivity, damage with its control, and patching with its."""
    probed = asked[asked["block"] >= 0]
    read = probed.groupby(["content", "step", "sigma", "block"], sort=False)["value"].mean().rename("mean").reset_index()
    read["panel"] = read["content"]
    targets = ", ".join(f"{content}: {found['target'].nunique()}" for content, found in probed.groupby("content", sort=False))
    _map(
        context,
        "selectivity",
        "Selectivity by block and step",
        read,
        list(CONTENTS),
        "mean selectivity",
        f"Mean over the targets of each content ({targets}) and tasks ({', '.join(probed['task'].unique())}),"
        f" {probed['source'].iloc[0]}; {probed['samples'].min()} test samples or more.",
    )
    changes = {
        "damage": (lost, "clean less edited", "Damage to x0-hat"),
        "patching": (moved, "share of the donor's answer, gained", "Patching"),
    }
    for name, (table, label, title) in changes.items():
        keys = ["edit", "content", "step", "sigma", "block"]
        found = summarise(table, "value", keys, cluster="one")
        found = found.sort_values("edit", key=lambda names: names.map([ABLATED, NOISE, PATCHED, OTHER].index), kind="stable")
        control = found["edit"].isin([NOISE, OTHER])
        found["panel"] = found["content"] + ",\n" + found["edit"] + np.where(control, "\n(control)", "")
        panels = [panel for content in CONTENTS for panel in dict.fromkeys(found["panel"]) if panel.startswith(content)]
        wide = float((found["high"] - found["low"]).max())
        about = f"Mean over {found['clusters'].min()} pairs of {', '.join(table['task'].unique())}; the 95 % interval of"
        about += f" a cell is at most {wide:.2f} wide."
        _map(context, name, f"{title} by block and step", found, panels, label, about)


def _map(context: Context, name: str, title: str, table: pd.DataFrame, panels: list[str], label: str, about: str) -> None:
    shown = table.assign(at=[f"{step}\n{sigma:.2f}" for step, sigma in zip(table["step"], table["sigma"], strict=True)])
    order = {panel: place for place, panel in enumerate(panels)}
    shown = shown.sort_values(["panel", "step"], key=lambda column: column.map(order) if column.name == "panel" else column)
    figure = plots.heat_maps(
        shown,
        panel="panel",
        x="at",
        y="block",
        value="mean",
        x_label="step, and its \u03c3",
        y_label="block",
        value_label=label,
        limits=(min(0.0, float(shown["mean"].min())), max(0.1, float(shown["mean"].max()))),
    )
    context.figure(f"map-{name}", figure, title, about)
