"""Small denoisers are what their records say; seen with the hooks of tests/denoiser_calls.py."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import diffusers
import pytest
import torch
from denoiser_calls import (
    Held,
    adding,
    at,
    built,
    calls,
    differing,
    entered,
    held,
    main,
    moved,
    parts,
    patch,
    places_told,
    ranges,
    result,
    sequence,
    stated,
    streams,
    total,
    watched,
)
from diffusers.models import transformers as classes
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dit_lens import small_denoisers
from dit_lens.errors import InputError
from dit_lens.small_denoisers import DENOISERS, SmallDenoiser, denoiser

SOURCES = {
    "visual": ("hidden_states", "x", "vision_tokens", "local_latents", "bb_ca", "decoder_input_tokens"),
    "text": (
        "encoder_hidden_states",
        "encoder_hidden_states_t5",
        "encoder_hidden_states_llama3",
        "encoder_hidden_states_2",
        "cap_feats",
        "text_bth",
        "input_ids",
    ),
    "audio": ("audio_hidden_states", "sound_tokens"),
}
"""Names of the arguments that a stream is made of; those are meant that a call has. Sound alone has the names of pictures."""
WHOLE_ANSWERS = ("Ideogram4Transformer2DModel", "QwenImage21Transformer2DModel")
"""Answer with a value for each token of the text too."""
UNTOLD = ("SanaWMLTX2RefinerTransformer3DModel",)
"""Are told where their tokens lie by rotary angles alone."""
PACKED = ("Cosmos3OmniTransformer",)
"""Take one row, as tokens without a batch."""
ROUNDING = 1e-5
"""Experts see the tokens that chose them together, so that one token's choice rounds others differently."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi asks for float32 there
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning"),  # Kandinsky 6 SR
]
every = pytest.mark.parametrize("small", DENOISERS.values(), ids=list(DENOISERS))


@every
def test_it_runs_and_its_rows_differ(small: SmallDenoiser) -> None:
    model, arguments = built(small.name)
    assert type(model).__name__ == small.name
    assert sum(parameter.numel() for parameter in model.parameters()) < 6_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    answer = result(model, arguments)
    assert torch.isfinite(answer).all()
    if small.name in PACKED:
        assert len(answer) == 1
    else:
        assert len(answer) == 2
        assert not torch.equal(answer[0], answer[1])
    torch.testing.assert_close(answer, result(*denoiser(small.name)), rtol=0, atol=0)


@every
def test_blocks_run_in_the_stated_order_and_are_all_there(small: SmallDenoiser) -> None:
    assert [(call.path, call.index) for call in watched(small)] == [(blocks.path, index) for blocks, index in stated(small)]


@every
def test_the_answer_depends_on_every_block(small: SmallDenoiser) -> None:
    model, arguments = built(small.name)
    plain = result(model, arguments)
    for blocks, index in stated(small):
        block = model.get_submodule(f"{blocks.path}.{index}")
        handle = block.register_forward_hook(lambda _, __, output: moved(output))
        try:
            assert not torch.equal(result(model, arguments), plain), f"{blocks.path}.{index}"
        finally:
            handle.remove()


@every
def test_streams_are_returned_at_their_places(small: SmallDenoiser) -> None:
    assert set(small.tokens) == {stream for blocks in small.blocks for stream in blocks.streams}
    first = [small.tokens[stream] for stream in small.blocks[0].streams]
    assert len(set(first)) == len(first), "streams of as many tokens cannot be told apart"
    for blocks, call in calls(small.name):
        assert streams(small, blocks, call.returned)


@every
def test_streams_are_made_of_what_they_are_named_for(small: SmallDenoiser) -> None:
    _, arguments = built(small.name)
    plain = watched(small)[0]
    for stream in small.blocks[0].streams:
        names = SOURCES["visual" if stream == main(small) else stream] if stream != "extra" else ()
        sources = [name for name in names if arguments.get(name) is not None]
        assert sources or stream == "extra", f"no argument is known to make {stream}"
        for source in sources:
            changed = entered(small, plain, watched(small, **{source: moved(arguments[source])})[0])
            assert changed[stream], f"{source} does not reach {stream}"
            assert not any(changed[other] for other in changed if other != stream), f"{source} reaches more than {stream}"


@every
def test_a_mark_in_the_latents_reaches_the_token_of_the_layout(small: SmallDenoiser) -> None:
    blocks = small.blocks[0]
    stream = main(small)
    before = small.tokens[stream] - torch.Size(small.layout).numel()
    assert before >= 0, "tokens of the layout are the last of the stream; frames that were there before are its first"
    start = ranges(small, blocks)[stream].start if blocks.joined else 0
    _, arguments = built(small.name)
    source = next(name for name in SOURCES["visual"] if name in arguments)
    latents = arguments[source]
    plain = watched(small)[0]
    frames, height, width = small.layout
    for place in ((0, 0, 0), (frames // 2, height // 2, width - 1), (frames - 1, height - 1, 0)):

        def mark(leaf: Tensor, place: tuple[int, int, int] = place) -> Tensor:
            if isinstance(latents, Tensor):
                return torch.stack([patch(row, small.layout, place, start) for row in leaf])
            return patch(leaf, small.layout, place)

        changed = entered(small, plain, watched(small, **{source: moved(latents, mark)})[0])
        assert changed[stream] == {before + (place[0] * height + place[1]) * width + place[2]}, place


@every
def test_the_layout_is_what_a_call_says_of_packed_latents(small: SmallDenoiser) -> None:
    _, arguments = built(small.name)
    latents = next(arguments[name] for name in SOURCES["visual"] if name in arguments)
    tokens = torch.Size(small.layout).numel()
    packed = isinstance(latents, Tensor) and latents.ndim in (3, 6) and latents.shape[1] >= tokens
    if packed and small.layout[1:] != (1, 1):
        told = places_told(small, arguments)
        assert (told is None) == (small.name in UNTOLD)
        if told is None:
            return
        assert torch.equal(told, torch.cartesian_prod(*(torch.arange(float(number)) for number in small.layout)))


@every
def test_the_answer_is_made_of_the_stream_that_is_denoised_alone(small: SmallDenoiser) -> None:
    model, arguments = built(small.name)
    plain = result(model, arguments)
    blocks, call = calls(small.name)[-1]
    for place, stream in enumerate(blocks.streams):
        if blocks.joined:
            where = Held(0, total(small, blocks), ranges(small, blocks)[stream], alone=True)
        else:
            where = Held(place, small.tokens[stream], slice(None), alone=True)
        if tree_leaves(call.returned)[where.index] is None:
            continue
        handle = call.block.register_forward_hook(adding(small, where, turn=0))
        try:
            changed = not torch.equal(result(model, arguments), plain)
        finally:
            handle.remove()
        assert changed == (stream == main(small) or small.name in WHOLE_ANSWERS), stream


@every
def test_every_stated_module_works_in_some_block(small: SmallDenoiser) -> None:
    found = {(part.blocks.path, part.site, stream, part.path) for part in parts(small) for stream in part.streams}
    modules = {(blocks.path, *key, path) for blocks in small.blocks for key, path in blocks.modules.items() if path}
    assert found == modules
    for blocks in small.blocks:
        assert {("attn", main(small)), ("mlp", main(small))} <= set(blocks.modules)
        assert {stream for _, stream in blocks.modules} == set(blocks.streams)


@every
def test_what_is_added_to_a_stated_module_changes_its_stream(small: SmallDenoiser) -> None:
    for part in parts(small):
        plain = streams(small, part.blocks, part.call.again())
        for stream in part.streams:
            where = held(small, part.blocks, stream, tree_leaves(part.returned))
            assert where is not None, f"{part.path} returns nothing for {stream}"
            handle = part.module.register_forward_hook(adding(small, where, part.turn))
            try:
                edited = streams(small, part.blocks, part.call.again())
            finally:
                handle.remove()
            changed = {name for name, value in edited.items() if value is not None and differing(value, plain[name])}
            expected = {stream} if where.alone else set(part.streams)
            # Picture and sound hear of each other within a block.
            assert expected <= changed if "audio" in small.tokens else expected == changed, f"{part.blocks.path} {part.path}"


@every
def test_attention_mixes_tokens_and_a_feed_forward_does_not(small: SmallDenoiser) -> None:
    for part in parts(small):
        given = tree_leaves(part.given)
        for stream in part.streams:
            source = held(small, part.blocks, stream, given)
            target = held(small, part.blocks, stream, tree_leaves(part.returned))
            assert source is not None, f"{part.path} is given nothing of {stream}"
            assert target is not None
            if small.tokens[stream] == 1:
                continue
            first = source.place.start or 0
            shape = given[source.index].shape[:-1]

            def start(leaf: Tensor, source: Held = source, first: int = first, shape: torch.Size = shape) -> Tensor:
                matches = leaf.shape[:-1] == shape
                return at(small, leaf, source.tokens, slice(first, first + 1)) if matches else torch.zeros_like(leaf)

            plain, edited = (
                sequence(small, items[target.index], target.tokens) for items in (tree_leaves(part.returned), part.again(start))
            )
            assert plain is not None
            item = tree_leaves(part.returned)[target.index]
            # Where frames, or places, are rows of their own (Latte), attention reaches to the end of such a row.
            reach = item.shape[1] if item.ndim == 3 and len(item) > len(plain) else plain.shape[1]
            last = (target.place.stop or reach) - 1
            mixed = last in differing(plain, edited, ROUNDING)
            assert mixed == (part.site == "attn"), f"{part.blocks.path} {part.path}"


@every
def test_cross_attention_reads_something_else(small: SmallDenoiser) -> None:
    for part in parts(small):
        if part.site == "cross_attn":
            own = (small.tokens[main(small)], total(small, part.blocks))

            def elsewhere(leaf: Tensor, own: tuple[int, int] = own) -> Tensor:
                return torch.full_like(leaf, float(all(sequence(small, leaf, tokens) is None for tokens in own)))

            assert not torch.equal(tree_leaves(part.returned)[0], part.again(elsewhere)[0])


@every
def test_lists_aside_run_and_no_list_with_attention_is_forgotten(small: SmallDenoiser) -> None:
    model, arguments = built(small.name)
    lists = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {path for path in lists if not any(path.startswith(f"{other}.") for other in lists)}
    ran: set[str] = set()
    handles = [
        child.register_forward_hook(lambda *_, path=path: ran.add(path))
        for path in outer | set(small.aside)
        for child in model.get_submodule(path).modules()
    ]
    try:
        result(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    blocks = {part.path for part in small.blocks}
    assert set(small.aside) <= ran - blocks
    inner = {path: [name for name, _ in model.get_submodule(path).named_modules()] for path in ran & outer}
    attends = {path for path, names in inner.items() if any("attn" in name or "attention" in name for name in names)}
    assert attends <= blocks | set(small.aside)


def test_nothing_is_drawn_from_the_generators_of_torch() -> None:
    before = torch.get_rng_state()
    denoiser("FluxTransformer2DModel", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(InputError, match="no small denoiser is called 'Flux'"):
        denoiser("Flux")


def test_every_class_of_diffusers_is_there_or_refused_with_a_reason() -> None:
    found = set()
    for module in pkgutil.iter_modules(classes.__path__):
        for name, value in vars(importlib.import_module(f"{classes.__name__}.{module.name}")).items():
            if inspect.isclass(value) and issubclass(value, diffusers.ModelMixin) and value.__module__.endswith(module.name):
                found.add(name)
    tables = [table for name, table in vars(small_denoisers).items() if name.isupper() and isinstance(table, dict)]
    assert sorted(name for table in tables for name in table) == sorted(found)
    assert all(reason for table in tables for reason in table.values())
