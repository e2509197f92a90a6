"""Conformance: whether what a record says of a denoiser is true, asked of the denoiser itself, in one of its calls.

Each check compares what the lens shows with something that is known without it: the untouched output, the other engine, a sum
that must come out, attention computed anew, a mark in the latents. A record that was found by watching is held to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dit_lens.architectures import Architecture, Block
from dit_lens.architectures.watching import watched
from dit_lens.attention import masked_attention
from dit_lens.calls import sample_of
from dit_lens.errors import InputError, listed
from dit_lens.hooks import HookEngine
from dit_lens.taps import Attention, Bypass, Engine, Tap, to_host

EXPERT = "transformer"
ADDED = 0.5
"""What is added to an activation to see that it counts."""
CLOSE = 1e-4
"""Relative errors below this are rounding, in float32; in other precisions it is scaled to theirs."""


@dataclass(frozen=True)
class Check:
    """A check, whether it passed, and what was found; `passed` is None where there was nothing to check."""

    name: str
    passed: bool | None
    found: str


Place = tuple[int, str, str]
"""(block, site, stream)."""


class Conformance:
    """The checks of one denoiser, on one of its calls.

    Args:
        architecture: what is said of it. arguments: of the call, by name.
    """

    def __init__(self, denoiser: nn.Module, architecture: Architecture, arguments: Mapping[str, Any]) -> None:
        self.denoiser = denoiser
        self.architecture = architecture
        self.given = dict(arguments)
        self.blocks: list[Block] = architecture.blocks(denoiser)
        self.places: list[Place] = [(i, *place) for i, block in enumerate(self.blocks) for place in block.stack.offered]
        pipe = SimpleNamespace(**{architecture.experts[0]: denoiser})
        self.expert = architecture.experts[0]
        self.engines: dict[str, Engine] = {"hooks": HookEngine(pipe, architecture), "nnsight": _tracing(pipe, architecture)}
        with torch.no_grad():
            self.plain = to_host(sample_of(denoiser(**self.given)))
        precision = torch.finfo(self.plain.dtype).eps / torch.finfo(torch.float32).eps
        self.close = min(CLOSE * precision, 0.05)

    def checks(self) -> list[Check]:
        """All of them; one that raises has not passed."""
        named: dict[str, Callable[[], tuple[bool | None, str]]] = {
            "recording every site leaves the output as it is": self.untouched,
            "both engines show the same at every site": self.engines_agree,
            "what a block returns is what the next one takes": self.handed_on,
            "the update is what the block added to its stream": self.updates,
            "an edit at every site counts, and is the same on both engines": self.edits,
            "a skipped block hands on its streams": self.skips,
            "heads add up to the attention's output": self.heads,
            "attention computed from q, k and v is the model's own": self.attention,
            "a mark in the latents reaches the token that the layout says": self.layout,
            "attention and MLPs all have their sites": self.complete,
        }
        found = []
        for name, ask in named.items():
            try:
                passed, what = ask()
            except Exception as error:
                passed, what = False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            found.append(Check(name, passed, what))
        return found

    # What an engine does in one call.

    def call(
        self,
        engine: str,
        taps: Sequence[Tap] = (),
        bypasses: Sequence[Bypass] = (),
        attentions: Sequence[Attention] = (),
    ) -> Tensor:
        """The denoiser's output, with taps and the like in place."""
        with torch.no_grad():
            return to_host(sample_of(self.engines[engine].call(lambda: self.denoiser(**self.given), taps, bypasses, attentions)))

    def seen(self, engine: str, places: Sequence[Place]) -> tuple[dict[Place, Tensor], Tensor]:
        """What passes at some places, and the denoiser's output."""
        found: dict[Place, Tensor] = {}

        def tap(place: Place) -> Tap:
            block, site, stream = place
            return Tap(self.expert, block, site, lambda tensor: found.__setitem__(place, to_host(tensor)), stream)

        output = self.call(engine, [tap(place) for place in places])
        return found, output

    # The checks.

    def untouched(self) -> tuple[bool, str]:
        """The output is the same to the bit while every site is read."""
        outputs = [self.seen(engine, self.places)[1] for engine in self.engines]
        same = [torch.equal(output, self.plain) for output in outputs]
        return all(
            same
        ), f"bit-identical on {listed(name for name, one in zip(self.engines, same, strict=True) if one) or 'none'}"

    def engines_agree(self) -> tuple[bool, str]:
        """Every site was seen once, with the same bits."""
        ours, theirs = (self.seen(engine, self.places)[0] for engine in self.engines)
        same = sum(place in ours and place in theirs and torch.equal(ours[place], theirs[place]) for place in self.places)
        return same == len(self.places), f"{same} of {len(self.places)} bit-identical"

    def handed_on(self) -> tuple[bool | None, str]:
        """Within a stack, the streams that a block takes are those that the one before it returned."""
        taken = self._taken()
        places = [(i, "resid", stream) for i, block in enumerate(self.blocks) for stream in block.stack.streams]
        given = self.seen("hooks", places)[0]
        pairs = [
            (taken[block + 1][stream], given[block, "resid", stream])
            for block, _, stream in places
            if block + 1 < len(self.blocks)
            and self.blocks[block].stack.path == self.blocks[block + 1].stack.path
            and stream in taken[block + 1]
        ]
        same = sum(one.shape == other.shape and torch.equal(one, other) for one, other in pairs)
        if not pairs:
            return None, "one block"
        if same < len(pairs) and all(one.shape == other.shape for one, other in pairs):
            return None, f"{same} of {len(pairs)}: something is added between the blocks"
        return same == len(pairs), f"{same} of {len(pairs)} streams"

    def _taken(self) -> list[dict[str, Tensor]]:
        """The streams that every block takes, each as it stood before the block ran."""
        taken: list[dict[str, Tensor]] = [{} for _ in self.blocks]

        def bypass(block: int) -> Bypass:
            def instead(streams: Mapping[str, Tensor]) -> None:
                taken[block] = {name: to_host(tensor) for name, tensor in streams.items()}

            return Bypass(self.expert, block, instead)

        self.call("hooks", bypasses=[bypass(block) for block in range(len(self.blocks))])
        return taken

    def updates(self) -> tuple[bool, str]:
        """What the block took and its update make what it returned."""
        taken = self._taken()
        places = [(i, stream) for i, block in enumerate(self.blocks) for stream in block.stack.streams]
        every = [(i, site, stream) for i, stream in places for site in ("resid", "update")]
        seen = self.seen("hooks", every)[0]
        errors = [
            _relative(taken[i][stream].float() + seen[i, "update", stream], seen[i, "resid", stream].float())
            for i, stream in places
        ]
        return max(errors) < self.close, f"relative error {max(errors):.1g}"

    def edits(self) -> tuple[bool, str]:
        """Something added at any site that can be replaced changes the output, and both engines agree on how.

        In the first and the last block of each kind: others are built as these are.
        """
        kinds = [(block.stack.path, block.stack.sites, block.stack.streams) for block in self.blocks]
        chosen = {i for kind in kinds for i in (kinds.index(kind), len(kinds) - 1 - kinds[::-1].index(kind))}
        places = [place for place in self.places if place[0] in chosen and not self._site(place).read_only]
        idle, differing = [], []
        for place in places:
            block, site, stream = place
            tap = Tap(self.expert, block, site, lambda tensor: tensor + ADDED, stream)
            ours, theirs = (self.call(engine, [tap]) for engine in self.engines)
            if not torch.equal(ours, theirs):
                differing.append(place)
            if torch.equal(ours, self.plain) and not self._unheard(place):
                idle.append(place)
        if differing or idle:
            what = f"differ at {_named(differing)}" if differing else f"nothing changes at {_named(idle)}"
            return False, f"{what} of {len(places)} sites"
        return True, f"{len(places)} sites"

    def _unheard(self, place: Place) -> bool:
        """Whether nobody can hear a place: a stream that nobody reads after its last block, keys of which all get more alike."""
        block, site, stream = place
        later = any(stream in one.stack.streams for one in self.blocks[block + 1 :])
        # A softmax forgets what is added to every score; the text of a last block has no reader.
        return site.startswith("k") or (stream != "visual" and not later)

    def skips(self) -> tuple[bool | None, str]:
        """The first block of every stack, left out, hands on what it took; both engines agree."""
        starts = [i for i, block in enumerate(self.blocks) if i == 0 or block.stack.path != self.blocks[i - 1].stack.path]
        taken = self._taken()
        try:
            wrong = [block for block in starts if not self._skipped(block, taken[block])]
        except InputError as error:
            return None, f"refused: {error}"
        return not wrong, f"blocks {listed(map(str, starts))}" + (f", wrong at {listed(map(str, wrong))}" if wrong else "")

    def _skipped(self, block: int, taken: Mapping[str, Tensor]) -> bool:
        """Whether a block that is left out hands on what it took, with the same output on both engines."""
        found: dict[tuple[str, str], Tensor] = {}

        def tap(engine: str, stream: str) -> Tap:
            return Tap(self.expert, block, "resid", lambda tensor: found.__setitem__((engine, stream), to_host(tensor)), stream)

        bypass = Bypass(self.expert, block, lambda streams: streams)
        outputs = [self.call(engine, [tap(engine, stream) for stream in taken], [bypass]) for engine in self.engines]
        same = all(torch.equal(tensor, taken[stream]) for (_, stream), tensor in found.items())
        return same and len(found) == len(outputs) * len(taken) and torch.equal(*outputs)

    def heads(self) -> tuple[bool | None, str]:
        """The output projection of the heads, with its bias, is what the attention returns."""
        places = [
            place
            for place in self.places
            if place[1] == "heads" and (place[0], "attn", place[2]) in self.places and self._site(place).port == "input"
        ]
        if not places:
            return None, "no heads, or no projection of their own"
        seen = self.seen("hooks", [*places, *((block, "attn", stream) for block, _, stream in places)])[0]
        errors, elsewhere = [], 0
        for place in places:
            block, _, stream = place
            projection: Any = self.blocks[block].module.get_submodule(self._site(place).module)
            weight, bias = (None if one is None else to_host(one) for one in (projection.weight, projection.bias))
            assert weight is not None
            made, returned = linear(seen[place].flatten(2), weight, bias), seen[block, "attn", stream]
            error = _relative(made, returned) if made.shape == returned.shape else float("inf")
            # Some attention does more after its projection, as to scale or to gate it; then nothing is claimed.
            elsewhere += error > self.close
            errors.append(error)
        if elsewhere == len(places):
            return None, "the attention does more after its projection"
        return not elsewhere, f"relative error {max(errors):.1g} at {len(places)} places"

    def attention(self) -> tuple[bool | None, str]:
        """Attention answered with weights that were computed anew leaves the output as it was, up to rounding."""
        blocks = [block for block, site, stream in self.places if site == "qk" and stream == "visual"]
        if not blocks:
            return None, "no attention of which every query sees every key"

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            allowed = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device)
            return masked_attention(query, key, value, allowed)

        answers = [Attention(self.expert, block, "attn", attend) for block in blocks]
        errors = [_relative(self.call(engine, attentions=answers), self.plain) for engine in self.engines]
        return max(errors) < self.close, f"relative error {max(errors):.1g} over {len(blocks)} blocks"

    def layout(self) -> tuple[bool | None, str]:
        """Noise in one patch of the latents reaches one visual token, with the number that the layout gives it."""
        patches = self.architecture.patches
        latents = self.given[self.architecture.latents]
        layout = self.architecture.layout(self.denoiser, self.given)
        if not isinstance(latents, Tensor):
            return None, "latents come as a list"
        axes = patches.axes if patches is not None else "cfhw"
        size = patches.size if patches is not None else tuple(_config(self.denoiser).patch_size)
        kept = [axis for axis in axes if axis != "c"]
        counts = [latents.shape[1 + axes.index(axis)] // width for axis, width in zip(kept, size, strict=True)]
        tried = [[0] * len(counts), [count - 1 for count in counts], [count // 2 for count in counts]]
        before = self._first(self.given)
        wrong = []
        for place in tried:
            marked = latents.clone()
            where: list[Any] = [slice(None)] * latents.ndim
            for axis, index, width in zip(kept, place, size, strict=True):
                where[1 + axes.index(axis)] = index * width + width - 1
            marked[tuple(where)] += 1.5
            after = self._first({**self.given, self.architecture.latents: marked})
            token = 0
            for index, count in zip(place, counts, strict=True):
                token = token * count + index
            moved = {name: (before[name] != after[name]).any(dim=-1).any(dim=0).nonzero().flatten().tolist() for name in before}
            if not any(
                its == [token + offset] for name, its in moved.items() for offset in self._offsets(before[name], layout.tokens)
            ):
                wrong.append(place)
        shape = " x ".join(map(str, layout.shape))
        return not wrong, f"{shape} tokens" + (f", wrong at {wrong[0]}" if wrong else "")

    def _offsets(self, tensor: Tensor, tokens: int) -> list[int]:
        """Where visual tokens can begin in a sequence: at its start, or after what else is in it."""
        return sorted({0, tensor.shape[1] - tokens}) if tensor.shape[1] >= tokens else []

    def _first(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """The sequences that the first module of any list takes: before anything has mixed tokens."""
        lists = list(dict.fromkeys(call.path for call in watched(self.denoiser, given)))
        tokens = self.architecture.layout(self.denoiser, given).tokens
        for path in lists:
            taken = watched(self.denoiser, given, until=path)[-1].taken()
            if any(tensor.shape[1] >= tokens for tensor in taken.values()) and not self._only_text(path):
                return taken
        return {}

    def _only_text(self, path: str) -> bool:
        return any(part in path for part in ("context_refiner", "context_embedder", "text", "caption", "token_refiner"))

    def complete(self) -> tuple[bool, str]:
        """No attention and no MLP was seen that no site stands for."""
        missed = {f"{block.stack.path}: {name}" for block in self.blocks for name in block.stack.missed}
        offered = list(dict.fromkeys(site for _, site, _ in self.places))
        return not missed, f"missed {listed(sorted(missed))}" if missed else listed(offered)

    def _site(self, place: Place) -> Any:
        block, site, stream = place
        return self.blocks[block].stack.site(site, stream)


def _tracing(pipe: Any, architecture: Architecture) -> Engine:
    # Imported when it is first needed: it takes seconds, and it changes a few things for the whole process.
    from dit_lens.tracing import TracingEngine

    return TracingEngine(pipe, architecture)


def _config(denoiser: nn.Module) -> Any:
    return denoiser.config


def _relative(found: Tensor, expected: Tensor) -> float:
    """The length of a difference in units of what is expected."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def _named(places: Sequence[Place]) -> str:
    block, site, stream = places[0]
    return f"{site} of {stream} in block {block}" + (f" and {len(places) - 1} more" if len(places) > 1 else "")
