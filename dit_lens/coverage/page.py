"""The page: the table of all classes, with how it is made and how to read it."""

from __future__ import annotations

from collections.abc import Sequence

from dit_lens.coverage.rows import Row

HEAD = """\
# Which diffusion transformers are covered

Every transformer class in `diffusers.models.transformers` of diffusers {version}, one row each: {counts}.

**How it is made.** `make coverage` (`python -m dit_lens.coverage --out docs`) builds each class with random weights and a width
of some thirty, finds its blocks, streams and sites by watching one call (no record of the class is used), makes {checks} checks
on that call, and holds what was found against what was read in the source of the class (`dit_lens/small_denoisers`): the blocks
in their order, their streams, how many tokens each has, their layout, and the modules of attention and MLP, bit by bit. Where
that disagrees the command fails and names it.

**How to read it.**

* *covered*: found by watching, and no check fails. *refused*: a lens says why, and shows nothing; describe the blocks with
  `dl.register(Architecture(...))`. *no DiT*: nothing to look into.
* *bit-equal*: with every site of every block read, on nnsight and on plain torch hooks, the output and what is read are the same
  to the bit.
* *blocks*: how many of which list, with the streams that they return, in this order; `+` where they are one sequence. A stream of
  sound alone is called visual too: it is the one that is denoised.
* *sites*: what can be read and edited. Every block has `resid` and `update`. The second of a kind is `attn_2`; `cross_attn` does
  not mix tokens of its own stream. Linear attention has no `q`, `k`, `v`, and is read where it returns.
* *checks*: how many passed of those that could be made; then the numbers (below) of those that could not, as where a mask keeps
  some queries from some keys.
* *missed*: what a block has and no site stands for.

What the table does not show: the schedule, guidance and experts of a pipeline, and whether another configuration of a class has
parts that this one has not. `dit-lens check MODEL` asks for both, on a model as it is.

{numbered}
"""
COLUMNS = ("class", "verdict", "bit-equal", "blocks and streams", "sites", "checks", "missed, or the reason")


def page(rows: Sequence[Row], version: str) -> str:
    """The whole page."""
    verdicts = [row.verdict for row in rows]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(sorted(verdicts)))
    names = next((checks for row in rows if (checks := [check.name for check in row.report.checks])), [])
    numbered = "\n".join(f"{number}. {name}" for number, name in enumerate(names, 1))
    head = HEAD.format(version=version, counts=counts, checks=len(names), numbered=numbered)
    table = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", *map(line, rows)]
    return "\n".join([head, *table, ""])


def line(row: Row) -> str:
    """One row of the table."""
    if row.verdict not in ("covered", "failed"):
        return f"| {row.name} | {row.verdict} | | | | | {row.why} |"
    failed = [f"fails: {check.name} ({check.found})" for check in row.report.failed]
    rest = "; ".join([*row.missed, *(f"WRONG: {one}" for one in row.wrong), *failed])
    cells = (row.name, row.verdict, "yes" if row.equal else "NO", row.blocks, ", ".join(row.sites), _checks(row), rest)
    return f"| {' | '.join(cells)} |"


def _checks(row: Row) -> str:
    checks = row.report.checks
    unmade = [str(number) for number, check in enumerate(checks, 1) if check.passed is None]
    passed = sum(bool(check.passed) for check in checks)
    return f"{passed} of {len(checks) - len(unmade)}" + (f"; not {', '.join(unmade)}" if unmade else "")
