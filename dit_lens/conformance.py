"""Conformance: whether what a record says of a denoiser is true, asked of the denoiser itself, in one of its calls.

Each check compares what the lens shows with something that is known without it: the untouched output, the other engine, plain
torch hooks, a sum that must come out, attention computed anew, a mark in the latents. A record that was found by watching is
held to the same. What is asked of the modules alone is in `conformance_modules`, of streams and tokens in `conformance_streams`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dit_lens.architectures import Architecture
from dit_lens.attention import masked_attention
from dit_lens.check_report import Check, Finding, asked
from dit_lens.conformance_modules import Modules
from dit_lens.conformance_streams import Streams
from dit_lens.errors import InputError, listed
from dit_lens.hooks import HookEngine
from dit_lens.one_call import OneCall, Place, relative
from dit_lens.taps import Attention, Bypass, Engine, Tap, to_host

ADDED = 0.5
"""What is added to an activation to see that it counts."""
CLOSE = 1e-4
"""Relative errors below this are rounding, in float32; in other precisions it is scaled to theirs."""


class Conformance:
    """The checks of one denoiser, on one of its calls.

    Args:
        architecture: what is said of it. arguments: of the call, by name. engines: those to compare, by name; both when left
            out.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        architecture: Architecture,
        arguments: Mapping[str, Any],
        engines: Mapping[str, Engine] | None = None,
    ) -> None:
        if engines is None:
            pipe = SimpleNamespace(**{architecture.experts[0]: denoiser})
            engines = {"hooks": HookEngine(pipe, architecture), "nnsight": _tracing(pipe, architecture)}
        self.once = OneCall(denoiser, architecture, dict(arguments), engines)
        self.modules, self.streams = Modules(self.once), Streams(self.once)
        self.places = self.once.places
        precision = torch.finfo(self.once.plain.dtype).eps / torch.finfo(torch.float32).eps
        self.close = min(CLOSE * precision, 0.05)

    def checks(self) -> list[Check]:
        """All of them; one that raises has not passed."""
        named: dict[str, Callable[[], Finding]] = {
            "recording every site leaves the output as it is": self.untouched,
            "both engines show the same at every site": self.engines_agree,
            "blocks run once, in their order": self.modules.order,
            "what is shown is what plain hooks see": self.modules.shown,
            "attention mixes tokens, an MLP does not": self.modules.kinds,
            "attention and MLPs all have their sites": self.modules.complete,
            "every stream is made of what it is named for": self.streams.made_of,
            "a mark in the latents reaches the token that the layout says": self.streams.layout,
            "what a block returns is what the next one takes": self.streams.handed_on,
            "the update is what the block added to its stream": self.updates,
            "contributions add up to the update": self.contributions,
            "an edit at every site counts, and is the same on both engines": self.edits,
            "a skipped block hands on its streams": self.skips,
            "heads add up to the attention's output": self.heads,
            "q and v make what the attention returns": self.inside,
            "attention computed from q, k and v is the model's own": self.attention,
        }
        return asked(named)

    def untouched(self) -> Finding:
        """The output is the same to the bit while every site is read."""
        taps = [Tap(self.once.expert, block, site, lambda tensor: None, stream) for block, site, stream in self.places]
        outputs = {name: self.once.call(name, taps) for name in self.once.engines}
        same = [name for name, output in outputs.items() if torch.equal(output, self.once.plain)]
        return len(same) == len(outputs), f"bit-identical on {listed(same) or 'none'}"

    def engines_agree(self) -> Finding:
        """Every site was seen once, with the same bits."""
        ours, theirs = (self.once.digests(name, self.places) for name in self.once.engines)
        same = sum(place in ours and ours[place] == theirs.get(place) for place in self.places)
        return same == len(self.places), f"{same} of {len(self.places)} bit-identical"

    def updates(self) -> Finding:
        """What the block took and its update make what it returned."""
        taken = self.once.taken(self.once.sample)
        places = [(i, stream) for i, stream in self.once.stream_places if i in taken]
        seen = self.once.seen("hooks", [(i, site, stream) for i, stream in places for site in ("resid", "update")])[0]
        errors = [
            relative(taken[i][stream].float() + seen[i, "update", stream], seen[i, "resid", stream].float())
            for i, stream in places
        ]
        return max(errors) < self.close, f"relative error {max(errors):.1g}"

    def contributions(self) -> Finding:
        """What the modules of a block contribute adds up to its update."""
        parts: dict[tuple[int, str], list[Place]] = {}
        for place in self.once.sampled():
            if self.once.site(place).measures == "contribution":
                parts.setdefault((place[0], place[2]), []).append(place)
        if not parts:
            return None, "the record names none"
        every = [place for places in parts.values() for place in places]
        wholes = [(block, site, stream) for block, stream in parts for site in ("resid", "update")]
        seen = self.once.seen("hooks", [*every, *wholes])[0]
        errors = [
            ((torch.stack([seen[place] for place in places]).sum(0) - seen[block, "update", stream]).norm()).item()
            / seen[block, "resid", stream].float().norm().item()
            for (block, stream), places in parts.items()
        ]
        return max(errors) < self.close, f"relative error {max(errors):.1g} over {len(parts)} blocks"

    def edits(self) -> Finding:
        """Something added at any site that can be replaced changes the output, and both engines agree on how.

        In the first block of each kind: others are built as these are. Engines are compared with all of it at once, and one
        by one only where they differ.
        """
        places = [place for block in self.once.kinds() for place in self._editable(block)]
        idle = [place for place in places if torch.equal(self._edited("hooks", [place]), self.once.plain)]
        idle = [place for place in idle if not self._unheard(place)]
        if idle:
            return False, f"nothing changes at {_named(idle)} of {len(places)} sites"
        if not torch.equal(*(self._edited(name, places) for name in self.once.engines)):
            differing = [
                place for place in places if not torch.equal(*(self._edited(name, [place]) for name in self.once.engines))
            ]
            return False, f"differ at {_named(differing)} of {len(places)} sites" if differing else "differ, all together"
        return True, f"{len(places)} sites"

    def _editable(self, block: int) -> list[Place]:
        return [place for place in self.places if place[0] == block and not self.once.site(place).read_only]

    def _edited(self, engine: str, places: Sequence[Place]) -> Tensor:
        """The output with something added at some places."""
        expert = self.once.expert
        return self.once.call(
            engine, [Tap(expert, block, site, lambda tensor: tensor + ADDED, stream) for block, site, stream in places]
        )

    def _unheard(self, place: Place) -> bool:
        """Whether nobody can hear a place: a stream that nobody reads after its last block, keys of which all get more alike."""
        block, site, stream = place
        later = any(stream in one.stack.streams for one in self.once.blocks[block + 1 :])
        # A softmax forgets what is added to every score; the text of a last block has no reader.
        return site.startswith("k") or (stream != "visual" and not later)

    def skips(self) -> Finding:
        """The first block of every stack, left out, hands on what it took; both engines agree."""
        blocks = self.once.blocks
        starts = [i for i, block in enumerate(blocks) if i == 0 or block.stack.path != blocks[i - 1].stack.path]
        taken = self.once.taken(starts)
        wrong, refused = [], ""
        for block in starts:
            try:
                wrong += [] if self._skipped(block, taken[block]) else [block]
            except InputError as error:
                refused = str(error)
        if refused and not wrong:
            return None, f"refused: {refused}"
        return not wrong, f"blocks {listed(map(str, starts))}" + (f", wrong at {listed(map(str, wrong))}" if wrong else "")

    def _skipped(self, block: int, taken: Mapping[str, Tensor]) -> bool:
        """Whether a block that is left out hands on what it took, with the same output on both engines."""
        found: dict[tuple[str, str], Tensor] = {}

        def tap(engine: str, stream: str) -> Tap:
            def visit(tensor: Tensor) -> None:
                found[engine, stream] = to_host(tensor)

            return Tap(self.once.expert, block, "resid", visit, stream)

        bypass = Bypass(self.once.expert, block, lambda streams: streams)
        outputs = [self.once.call(name, [tap(name, stream) for stream in taken], [bypass]) for name in self.once.engines]
        same = all(torch.equal(tensor, taken[stream]) for (_, stream), tensor in found.items())
        return same and len(found) == len(outputs) * len(taken) and torch.equal(*outputs)

    def heads(self) -> Finding:
        """The output projection of the heads, with its bias, is what the attention returns."""
        places = [
            place
            for place in self.once.sampled("heads")
            if (place[0], "attn", place[2]) in self.places and self.once.site(place).port == "input"
        ]
        if not places:
            return None, "no heads, or no projection of their own"
        seen = self.once.seen("hooks", [*places, *((block, "attn", stream) for block, _, stream in places)])[0]
        queries = self.once.seen("hooks", self.once.sampled("q"))[0]
        errors, elsewhere = [], 0
        for place in places:
            block, _, stream = place
            projection: Any = self.once.blocks[block].module.get_submodule(self.once.site(place).module)
            heads = queries[block, "q", stream].shape[2] if (block, "q", stream) in queries else 0
            weight, bias = (None if one is None else to_host(one) for one in (projection.weight, projection.bias))
            assert weight is not None
            if heads and heads != seen[place].shape[2]:
                return False, f"{seen[place].shape[2]} heads in block {block}, whose queries have {heads}"
            made, returned = linear(seen[place].flatten(2), weight, bias), seen[block, "attn", stream]
            error = relative(made, returned) if made.shape == returned.shape else float("inf")
            elsewhere += error > self.close
            errors.append(error)
        return not elsewhere, f"relative error {max(errors):.1g} at {len(places)} places"

    def attention(self) -> Finding:
        """Attention answered with weights that were computed anew leaves the output as it was, up to rounding."""
        blocks = [block for block, _, stream in self.once.sampled("qk") if stream == "visual"]
        if not blocks:
            return None, "no attention of which every query sees every key"

        asked_for: list[Tensor] = []

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            asked_for.append(query[:0])
            allowed = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device)
            return masked_attention(query, key, value, allowed)

        answers = [Attention(self.once.expert, block, "attn", attend) for block in blocks]
        errors = [relative(self.once.call(name, attentions=answers), self.once.plain) for name in self.once.engines]
        if len(asked_for) != len(blocks) * len(errors):
            return False, f"{len(asked_for)} of {len(blocks) * len(errors)} calls were asked for"
        return max(errors) < self.close, f"relative error {max(errors):.1g} over {len(blocks)} blocks"

    def inside(self) -> Finding:
        """What is added to the queries, or to the values, of an attention changes what its module returns."""
        pairs = [
            (place, (place[0], f"attn{place[1][1:]}", place[2]))
            for place in self.places
            if place[0] in self.once.kinds() and re.fullmatch(r"[qv](_\d+)?", place[1])
        ]
        if not pairs:
            return None, "no q and v"
        wrong = [place for place, attention in pairs if not self._makes(place, attention)]
        return not wrong, f"another attention's at {_named(wrong)}" if wrong else f"{len(pairs)} places"

    def _makes(self, place: Place, attention: Place) -> bool:
        """Whether something added at a place changes what an attention of that block returns."""
        seen: list[Tensor] = []
        block, site, stream = place
        taps = [Tap(self.once.expert, block, site, lambda tensor: tensor + ADDED, stream)]
        # What is read comes after: of the text's last queries nothing may be left in the stream.
        taps.append(Tap(self.once.expert, block, attention[1], lambda tensor: seen.append(to_host(tensor)), stream))
        self.once.call("hooks", taps)
        return not torch.equal(seen[0], self.once.seen("hooks", [attention])[0][attention])


def _tracing(pipe: Any, architecture: Architecture) -> Engine:
    # Imported when it is first needed: it takes seconds, and it changes a few things for the whole process.
    from dit_lens.tracing import TracingEngine

    return TracingEngine(pipe, architecture)


def _named(places: Sequence[Place]) -> str:
    block, site, stream = places[0]
    return f"{site} of {stream} in block {block}" + (f" and {len(places) - 1} more" if len(places) > 1 else "")
