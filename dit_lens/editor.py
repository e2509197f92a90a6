"""The editor: brings the edits of one run to where they act.

It resolves selections before the run, turns edits into taps, bypasses and attentions for an engine, asks the step clock
where the run is, and counts. What cannot work is refused before any block has run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_lens.architectures import Layout, Stack
from dit_lens.attention import masked_attention
from dit_lens.donors import coordinates
from dit_lens.edits import Edit, Moment, Skip
from dit_lens.errors import InputError, listed
from dit_lens.knockout import KnockoutAttention
from dit_lens.latent_edits import Passage, ReplaceLatents
from dit_lens.noise import NoiseState, noise_state, weighted
from dit_lens.record import check_label
from dit_lens.schedule import Clock, StepClock
from dit_lens.selection import Cell, Extent, Selector
from dit_lens.taps import Attention, Bypass, Tap

Claims = dict[tuple[Any, ...], list[int]]
"""By place: which edits replace something there."""


def as_edits(edits: object) -> tuple[Edit | ReplaceLatents, ...]:
    """The `edits=` argument of a run as a tuple; an InputError for anything that is no edit."""
    found = []
    for item in edits if isinstance(edits, Iterable) else [edits]:
        if not isinstance(item, Edit | ReplaceLatents) or (isinstance(item, Edit) and not isinstance(item.at, Selector)):
            raise InputError(f"edits= takes edits such as dl.Zero(dl.at(...)), or a list of them, and not {item!r}")
        found.append(item)
    return tuple(found)


class Editor:
    """Applies edits to one run.

    Args:
        edits: in the order in which they act. extent: what there is, for resolving selections before the run.
        scheduler: the pipeline's own, to ask for noise levels.
        width: number of channels of a visual token. seeds, prompts: of each row, see `Moment`.
        recorded: what is to be recorded, to refuse it where it is skipped.

    Attributes:
        fired: how often each edit was applied so far, by its place among the edits.

    Raises:
        InputError: a selection is out of range or empty, at a read-only site or in a skipped block; or an edit refuses
            its cells.
    """

    def __init__(
        self,
        edits: Sequence[Edit | ReplaceLatents],
        extent: Extent,
        scheduler: Any,
        width: int,
        seeds: tuple[int, ...],
        prompts: tuple[int, ...],
        recorded: Iterable[tuple[Selector, Sequence[Cell]]] = (),
    ) -> None:
        self._edits = tuple(edits)
        self._extent = extent
        self._scheduler = scheduler
        self._width = width
        self._seeds, self._prompts = seeds, prompts
        self._clock: Clock | None = None
        self._masks: dict[tuple[Any, ...], Tensor] = {}
        self._places: dict[tuple[int, tuple[int, ...]], tuple[Tensor, str]] = {}
        self._overlaps: dict[tuple[int, int, tuple[int, ...]], bool] = {}
        self._cells: dict[int, dict[Cell, Cell]] = {}
        self._steps: dict[int, list[int]] = {}
        self._checked: set[tuple[int, Cell, tuple[int, ...]]] = set()
        self.fired: dict[int, int] = dict.fromkeys(range(len(self._edits)), 0)
        for index, edit in enumerate(self._edits):
            if isinstance(edit, ReplaceLatents):
                self._steps[index] = edit.steps(extent)
            else:
                self._cells[index] = {cell: cell for cell in edit.at.cells(extent)}
                self._check_sites(edit, self._cells[index])
        for index, edit in enumerate(self._edits):
            if isinstance(edit, ReplaceLatents):
                edit.check_run(self._steps[index], extent.forecast, type(scheduler).__name__)
            else:
                edit.check_run(list(self._cells[index]), extent.forecast, type(scheduler).__name__)
                self._check_text_is_read(edit, self._cells[index])
        self._check_skipped(recorded)

    def _check_sites(self, edit: Edit, cells: Iterable[Cell]) -> None:
        """Refuse what is computed from tensors of the model, and is none of them."""
        for cell in cells:
            if self._extent.site(cell).read_only:
                kept = dict.fromkeys(site.name for site in self._extent.sites if not site.read_only)
                raise InputError(f"{edit}: the site {cell.site!r} is read-only; edit one of {listed(kept)}")

    def _check_text_is_read(self, edit: Edit, cells: Iterable[Cell]) -> None:
        """Refuse to cut the text from an attention that does not read it."""
        if not isinstance(edit, KnockoutAttention) or not edit.of_text:
            return
        for cell in cells:
            if cell.site == "attn" and "text" not in _joint(self._extent.stack(cell.expert, cell.block)):
                raise InputError(
                    f"{edit} cuts the text at {coordinates(cell)}, where only visual tokens attend to each other: write"
                    " site='cross_attn', where the text is read"
                )

    def _check_skipped(self, recorded: Iterable[tuple[Selector, Sequence[Cell]]]) -> None:
        """Refuse what is inside a block that does not run."""
        skips = {
            (cell.expert, cell.step, cell.branch, cell.block): self._edits[index]
            for index, cells in self._cells.items()
            if isinstance(self._edits[index], Skip)
            for cell in cells
        }
        inside: list[tuple[str, Iterable[Cell]]] = [(f"record {selector}", cells) for selector, cells in recorded]
        inside += [(str(self._edits[index]), cells) for index, cells in self._cells.items()]
        for owner, cells in inside:
            for cell in cells:
                skip = skips.get((cell.expert, cell.step, cell.branch, cell.block))
                if skip is not None and self._extent.site(cell).module:
                    raise InputError(
                        f"{owner} is inside a block that {skip} leaves out, at {coordinates(cell)}: nothing is computed there;"
                        " choose other blocks, steps or branches, or the sites resid and update"
                    )

    def _of(self, *kinds: type) -> list[tuple[int, Any]]:
        return [(index, edit) for index, edit in enumerate(self._edits) if isinstance(edit, kinds)]

    @property
    def cells(self) -> list[Cell]:
        """Every cell that some edit is to change."""
        return [cell for cells in self._cells.values() for cell in cells]

    @property
    def taps(self) -> list[Tap]:
        """One tap for each edit and each site of each block that it may change, in the order of the edits."""
        others = [(index, edit) for index, edit in self._of(Edit) if not isinstance(edit, Skip | KnockoutAttention)]
        taps = [
            Tap(*place[:3], self._visitor(index, edit, place), place[3])
            for index, edit in others
            for place in dict.fromkeys((c.expert, c.block, c.site, c.stream) for c in self._cells[index])
        ]
        # A block that holds the rows of several branches runs for those that do not skip it.
        skips = [(index, cell) for index, _ in self._of(Skip) for cell in self._cells[index]] if self._batched else []
        places = dict.fromkeys((index, cell.expert, cell.block) for index, cell in skips)
        return taps + [
            Tap(expert, block, "update", self._unchanging(index, (expert, block), stream), stream)
            for index, expert, block in places
            for stream in self._extent.stack(expert, block).streams
        ]

    @property
    def bypasses(self) -> list[Bypass]:
        """One bypass for each block that is skipped at some time, by whole calls."""
        if self._batched:
            return []
        indices = [index for index, _ in self._of(Skip)]
        places = dict.fromkeys((cell.expert, cell.block) for index in indices for cell in self._cells[index])
        return [Bypass(*place, self._skipping(indices, place)) for place in places]

    @property
    def attentions(self) -> list[Attention]:
        """One attention for each module in which it is cut at some time."""
        cuts = self._of(KnockoutAttention)
        places = dict.fromkeys((cell.expert, cell.block, cell.site) for index, _ in cuts for cell in self._cells[index])
        return [Attention(*place, self._attending(cuts, place)) for place in places]

    @property
    def _batched(self) -> bool:
        return self._extent.forecast.batched

    @property
    def rewrite(self) -> Callable[[int, Tensor], Tensor | None] | None:
        """What the clock is to ask about latents; None where no edit is about them."""
        return self._rewrite if self._steps else None

    def begin(self, clock: Clock) -> None:
        """At the first denoiser call, before any block runs: check what depends on the layout and the batch."""
        assert clock.layout is not None
        self._clock = clock
        if self._edits and clock.batch != len(self._seeds):
            raise RuntimeError(
                f"the denoiser has {clock.batch} rows for {len(self._seeds)} samples: edits cannot tell rows apart"
            )
        replaced: Claims = {}
        for index, edit in self._of(Edit):
            for cell in self._cells[index]:
                layout = self._layout(cell.stream)
                if layout is None:
                    continue  # how many tokens the stream has is seen when it comes
                edit.at.check_tokens(layout)
                moment = self._moment(index, edit, cell, self._shape(cell, layout))
                edit.check_shape(moment)
                self._checked.add((index, cell, moment.shape))
                if edit.replaces:
                    self._check_alone(replaced, index, cell, moment.shape)

    def _check_alone(self, replaced: Claims, index: int, cell: Cell, shape: tuple[int, ...]) -> None:
        """Refuse a replacement of tokens and heads that an earlier edit replaces."""
        # Either of `resid` and `update` follows from the other, so they are one place.
        site = "resid" if cell.site == "update" else cell.site
        there = replaced.setdefault((cell.expert, cell.step, cell.branch, cell.block, site, cell.stream), [])
        for earlier in there:
            if earlier != index and self._overlap(earlier, index, shape):
                self._exclude(earlier, index, f"the same tokens at {coordinates(cell)}")
        there.append(index)

    def _overlap(self, earlier: int, later: int, shape: tuple[int, ...]) -> bool:
        """Whether two edits select a token (and head) in common; asked for many cells, and worked out once."""
        if (earlier, later, shape) not in self._overlaps:
            places = [self._places[index, shape][0].flatten() for index in (earlier, later)]
            self._overlaps[earlier, later, shape] = bool(torch.isin(*places).any())
        return self._overlaps[earlier, later, shape]

    def _exclude(self, earlier: int, later: int, what: str) -> None:
        raise InputError(
            f"edits[{later}], {self._edits[later]}, would undo edits[{earlier}], {self._edits[earlier]}: both replace {what};"
            " leave one out, or let them select different ones"
        )

    def finish(self) -> Mapping[int, int]:
        """After the run: how often each edit was applied, or an InputError for one that never was."""
        for index, edit in enumerate(self._edits):
            foreseen = len(self._steps[index] if isinstance(edit, ReplaceLatents) else self._cells[index])
            if not self.fired[index]:
                raise InputError(
                    f"edits[{index}], {edit}, never fired: the run ended before it came to any of its {foreseen} places;"
                    " choose earlier steps, or let the run go on"
                )
            complete = self._clock is not None and self._clock.step >= len(self._extent.forecast.timesteps)
            if complete and self.fired[index] != foreseen:
                raise RuntimeError(
                    f"edits[{index}], {edit}, was to be applied {foreseen} times and was {self.fired[index]} times: blocks were"
                    " skipped, or the pipeline does not switch experts where its configuration says"
                )
        return dict(self.fired)

    def _layout(self, stream: str) -> Layout | None:
        """The layout of a stream's tokens; None where it is not known beforehand: a text may get registers, or lose padding."""
        assert self._clock is not None
        return self._clock.layout if stream == "visual" else None

    def _shape(self, cell: Cell, layout: Layout) -> tuple[int, ...]:
        """The shape that a cell's activation should have, without the batch; the width is that of visual tokens."""
        heads = self._extent.heads
        return (*layout.shape, *((heads, self._width // heads) if self._extent.site(cell).per_head else (self._width,)))

    def _moment(self, index: int, edit: Edit, cell: Cell, shape: tuple[int, ...]) -> Moment:
        """When and where an edit is applied; what its selection takes is worked out once for each shape."""
        clock = self._clock
        assert clock is not None
        tokens = shape[:4] if self._extent.site(cell).per_head else shape[:3]
        if (index, shape) not in self._places:
            self._places[index, shape] = (edit.at.places(tokens), edit.at.part(tokens))
        part = self._places[index, shape][1]
        return Moment(cell, self._seeds, self._prompts, Layout(*shape[:3]), shape, part, clock.text_tokens)

    def _here(self, index: int, place: tuple[Any, ...]) -> Cell | None:
        """The cell of an edit that is being computed, if it selects it; place is (expert, block, site, stream)."""
        clock = self._clock
        assert clock is not None
        cell = self._cells[index].get(Cell(place[0], clock.step, clock.branch, *place[1:]))
        if cell is not None:
            check_label(cell, clock.timestep)
        return cell

    def _visitor(self, index: int, edit: Edit, place: tuple[Any, ...]) -> Callable[[Tensor], Tensor | None]:
        def visit(tensor: Tensor) -> Tensor | None:
            cell = self._here(index, place)
            return None if cell is None else self._edited(index, edit, cell, tensor)

        return visit

    def _edited(self, index: int, edit: Edit, cell: Cell, tensor: Tensor) -> Tensor:
        """A tensor of (batch, tokens, channels) or (batch, tokens, heads, channels) with the edit written into it."""
        layout = self._clock.layout if self._clock is not None and cell.stream == "visual" else Layout.line(tensor.shape[1])
        assert layout is not None
        whole = tensor.unflatten(1, layout.shape)
        moment = self._moment(index, edit, cell, tuple(whole.shape[1:]))
        if (index, cell, moment.shape) not in self._checked:
            edit.at.check_tokens(layout)
            edit.check_shape(moment)
            self._checked.add((index, cell, moment.shape))
        # A part is a copy already; all of it is copied too, as an edit may change in place what the model still holds.
        selected = whole.clone() if edit.at.whole else edit.at.take_tokens(whole)
        shape, dtype, device = selected.shape, selected.dtype, selected.device
        given: Any = edit.apply(selected, moment)
        if not isinstance(given, Tensor) or given.shape != shape:
            came = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"{type(given).__name__}"
            raise InputError(f"{edit}: apply gave {came} at {coordinates(cell)}; return a tensor of shape {tuple(shape)}")
        self.fired[index] += 1
        places = self._places[index, moment.shape][0]
        return edit.at.put_tokens(whole, given.to(device, dtype), places).flatten(1, 3)

    def _skipping(self, indices: Sequence[int], place: tuple[str, int]) -> Callable[..., Mapping[str, Tensor] | None]:
        def instead(streams: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
            # A skip of any stream is one of the block.
            found = [i for i in indices if self._skips(i, place)]
            for index in found:
                self.fired[index] += 1
            return streams if found else None

        return instead

    def _skips(self, index: int, place: tuple[str, int]) -> bool:
        """Whether an edit skips a block in the call under way: a skip of any stream is one of the block."""
        return any(self._here(index, (*place, "resid", stream)) is not None for stream in self._extent.stack(*place).streams)

    def _unchanging(self, index: int, place: tuple[str, int], stream: str) -> Callable[[Tensor], Tensor | None]:
        def visit(update: Tensor) -> Tensor | None:
            if not self._skips(index, place):
                return None
            self.fired[index] += stream == self._extent.stack(*place).streams[0]
            return torch.zeros_like(update)

        return visit

    def _attending(
        self, cuts: Sequence[tuple[int, KnockoutAttention]], place: tuple[str, int, str]
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor | None]:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
            found = [(index, edit) for index, edit in cuts if self._here(index, (*place, "visual")) is not None]
            if not found:
                return None
            for index, _ in found:
                self.fired[index] += 1
            return masked_attention(query, key, value, self._allowed(found, place, key))

        return attend

    def _allowed(self, cuts: Sequence[tuple[int, KnockoutAttention]], place: tuple[str, int, str], key: Tensor) -> Tensor:
        """The pairs that all of the knockouts allow, on the device of the keys; in joint attention, of all that there are."""
        clock = self._clock
        assert clock is not None
        assert clock.layout is not None
        expert, block, site = place
        stack, count = self._extent.stack(expert, block), key.shape[1]
        within = _joint(stack) if site == "attn" else ()
        name = (site, within, count, key.device, *(index for index, _ in cuts))
        if name not in self._masks:
            order = torch.arange(count)[None]
            lie = stack.apart(order, within, clock.layout.tokens) if within else {"visual": order}
            # Without other streams beside them, all keys are of one kind.
            allowed = torch.ones(count if within else clock.layout.tokens, count, dtype=torch.bool)
            for _, edit in cuts:
                keys = lie["text" if within and edit.of_text else "visual"][0]
                queries = lie["visual"][0] if within else torch.arange(clock.layout.tokens)
                allowed[queries[:, None], keys] &= edit.allowed(clock.layout, len(keys), site)
            self._masks[name] = allowed.to(key.device)
        return self._masks[name]

    def _rewrite(self, step: int, latents: Tensor) -> Tensor | None:
        """The latents that a step takes, as the edits of latents leave them; None where none is about this step."""
        now = [(index, edit) for index, edit in self._of(ReplaceLatents) if step in self._steps[index]]
        if not now:
            return None
        forecast, claimed = self._extent.forecast, dict[tuple[int, int], int]()
        state = noise_state(self._scheduler, forecast.timesteps[step], step)
        if not math.isclose(state.sigma, forecast.sigmas[step], rel_tol=1e-4, abs_tol=1e-6):
            raise RuntimeError(
                f"step {step} was foreseen at sigma {forecast.sigmas[step]} and is at {state.sigma} when its latents are made:"
                " the pipeline does not follow its scheduler's own timesteps, so noise cannot be matched to it"
            )
        for index, edit in now:
            if latents.ndim != 5:
                raise InputError(f"{edit}: latents of shape {tuple(latents.shape)} have no (frames, height, width) to replace in")
            frames, rows = edit.chosen(latents.shape[2]), edit.chosen_rows(latents.shape[0])
            for row, frame in itertools.product(rows, frames) if edit.replaces else ():
                if (row, frame) in claimed:
                    self._exclude(claimed[row, frame], index, f"latent frame {frame} at step {step}")
                claimed[row, frame] = index
            latents = edit.apply(Passage(step, state, latents, self._seeds, self._last_bet, *self._last_step(step)))
            self.fired[index] += 1
        return latents

    def _last_step(self, step: int) -> tuple[NoiseState, Tensor] | tuple[None, None]:
        """How clean sample and noise mixed in the latents that the step before took, and these."""
        clock = self._clock
        if step == 0 or not isinstance(clock, StepClock):
            return None, None
        return noise_state(self._scheduler, clock.timesteps[-1], step - 1), clock.samples[-1]

    def _last_bet(self) -> Tensor | None:
        """The x0-hat of the step before, or None before the first one and where there is none."""
        clock = self._clock
        if not isinstance(clock, StepClock) or not clock.weights:
            return None
        weights = clock.weights[-1]
        if weights is None:
            return None
        return weighted(weights, clock.samples[-1], clock.outputs[len(clock.weights) - 1, "guided"], clock.held)


def _joint(stack: Stack) -> tuple[str, ...]:
    """The streams that lie one after the other where attention is called; none where visual tokens are alone."""
    return next((site.within for site in stack.sites if site.name == "q" and site.within), ())
