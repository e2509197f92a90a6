"""Discovery on denoisers that are written here, so that what it must find is known, and on some of diffusers' own."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from dit_lens.architectures import Patches, Stack
from dit_lens.architectures.discovery import Found, Undecided, discover
from dit_lens.small_denoisers import denoiser as small_denoiser

WIDTH, TEXT = 12, 5


class Block(nn.Module):
    """Streams in, streams out, in a given order; every token of one stream hears of all others."""

    def __init__(self, order: tuple[str, ...], inplace: bool = False) -> None:
        super().__init__()
        self.order, self.inplace = order, inplace
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, picture: Tensor, words: Tensor, embedding: Tensor) -> Any:
        heard = self.mix(torch.cat([picture, words], dim=1)).mean(dim=1, keepdim=True) + embedding[:, None]
        if self.inplace:
            picture += heard
        else:
            picture = picture + heard
        streams = {"picture": picture, "words": words + 2 * heard, "embedding": embedding}
        found = tuple(streams[name] for name in self.order)
        return found if len(found) > 1 else streams["picture"]


class Single(nn.Module):
    """One sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, sequence: Tensor, embedding: Tensor) -> Tensor:
        return sequence + self.mix(sequence).mean(dim=1, keepdim=True) + embedding[:, None]


class Denoiser(nn.Module):
    """A DiT of video whose parts are called as nobody calls them.

    ``order`` is what its dual blocks return; ``joined`` the order of what follows in one sequence, with `r` for registers;
    ``ways`` what else is odd about it.
    """

    def __init__(self, order: tuple[str, ...] = ("picture",), joined: str = "", dual: int = 3, **ways: bool) -> None:
        super().__init__()
        self.order, self.joined, self.ways = order, joined, ways
        self.look = nn.Conv3d(4, WIDTH, (1, 2, 1), (1, 2, 1))
        self.speak, self.clock = nn.Linear(6, WIDTH), nn.Linear(1, WIDTH)
        self.prepare_refiner = nn.ModuleList([Single() for _ in range(2)])
        self.strange_name = nn.ModuleList([Block(order, ways.get("inplace", False)) for _ in range(dual)])
        self.rest = nn.ModuleList([Single() for _ in range(2)])
        self.registers = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.out = nn.Linear(WIDTH, 8)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        latents = hidden_states.transpose(1, 2) if self.ways.get("frames_first") else hidden_states
        picture = self.look(latents).flatten(2).mT
        words, embedding = self.speak(encoder_hidden_states), self.clock(timestep[:, None])
        for block in self.prepare_refiner:
            words = block(words, embedding)
        if self.ways.get("shuffled"):
            picture = picture[:, torch.arange(picture.shape[1]).flip(0)]
        for number, block in enumerate(self.strange_name):
            found = block(picture, embedding=embedding, words=words)
            found = dict(zip(self.order, found if isinstance(found, tuple) else (found,), strict=True))
            picture, words = found["picture"], found.get("words", words)
            if self.ways.get("hints"):
                picture = picture + 0.1
            if self.ways.get("back_and_forth"):
                words = self.rest[number % 2](words, embedding)
        if self.joined:
            parts = {"v": picture, "t": words, "r": self.registers.expand(len(picture), -1, -1)}
            sequence = torch.cat([parts[part] for part in self.joined], dim=1)
            for block in self.rest:
                sequence = block(sequence, embedding)
            start = sum(parts[part].shape[1] for part in self.joined[: self.joined.index("v")])
            picture = sequence[:, start : start + picture.shape[1]]
        return self.out(picture)


class Turned(Denoiser):
    """With its arguments in another order."""

    def forward(self, timestep: Tensor, encoder_hidden_states: Tensor | None, hidden_states: Tensor, words: Tensor) -> Tensor:  # pyright: ignore
        return super().forward(hidden_states, timestep, words)


def call(frames_first: bool = False, text: int = TEXT) -> dict[str, Tensor]:
    """Two frames of 6 by 3 places: 2 * 3 * 3 tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, 4, 6, 3) if frames_first else (2, 4, 2, 6, 3)
    return {
        "hidden_states": torch.randn(shape, generator=generator),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": torch.randn(2, text, 6, generator=generator),
    }


def made(*arguments: Any, **ways: Any) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(*arguments, **ways).eval()


DUAL = {
    ("picture",): (("visual",), ("picture",), ()),
    ("picture", "words"): (("visual", "text"), ("picture", "words"), ()),
    ("words", "picture"): (("text", "visual"), ("words", "picture"), ()),
    ("words", "embedding", "picture"): (("text", "visual"), ("words", "picture"), (0, 2)),
}


@pytest.mark.parametrize("text", [TEXT, 18], ids=["few words", "as many words as visual tokens"])
@pytest.mark.parametrize("order", DUAL)
def test_streams_are_told_by_what_moves_them(order: tuple[str, ...], text: int) -> None:
    found = discover(made(order), call(text=text))
    (stack,) = found.stacks
    assert stack.path == "strange_name"
    assert (stack.streams, stack.parameters, stack.places) == DUAL[order]
    assert stack.returned == (3 if len(order) == 3 else 0)
    assert not stack.joined
    assert found.aside == ("prepare_refiner",)
    assert found.tokens == {"visual": 18, **({"text": text} if "words" in order else {})}


def test_latents_need_not_be_the_first_argument() -> None:
    torch.manual_seed(0)
    given = call()
    given |= {"words": given.pop("encoder_hidden_states"), "encoder_hidden_states": None}  # pyright: ignore
    (stack,) = discover(Turned(("words", "picture")), given).stacks
    assert (stack.streams, stack.parameters, stack.places) == DUAL["words", "picture"]


@pytest.mark.parametrize(("joined", "streams"), [("tv", ("text", "visual")), ("vt", ("visual", "text")), ("v", ("visual",))])
def test_a_joined_sequence_is_taken_apart(joined: str, streams: tuple[str, ...]) -> None:
    found = discover(made(("words", "picture"), joined), call())
    assert [stack.path for stack in found.stacks] == ["strange_name", "rest"]
    assert found.stacks[1] == Stack("rest", streams, ("sequence",), width=WIDTH)
    assert found.stacks[1].joined == (len(streams) > 1)


class OneSequence(Denoiser):
    """Joined from the start."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        self.strange_name = nn.ModuleList()
        return super().forward(hidden_states, timestep, encoder_hidden_states)


@pytest.mark.parametrize(
    ("joined", "streams"),
    [("tv", ("text", "visual")), ("vt", ("visual", "text")), ("rvt", ("extra", "visual", "text")), ("vr", ("visual", "extra"))],
)
def test_a_sequence_that_is_joined_from_the_start(joined: str, streams: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    found = discover(OneSequence(("words", "picture"), joined).eval(), call())
    registers = 3 if len(streams) == 3 else 0
    assert found.stacks == (Stack("rest", streams, ("sequence",), extra=registers, width=WIDTH),)
    assert found.tokens == {name: {"text": TEXT, "visual": 18, "extra": 3}[name] for name in streams}
    assert found.patches == Patches("cfhw", (1, 2, 1))


def test_patches_are_measured() -> None:
    assert discover(made(), call()).patches == Patches("cfhw", (1, 2, 1))
    assert discover(made(frames_first=True), call(frames_first=True)).patches == Patches("fchw", (1, 2, 1))
    # Tokens in an order that is not that of the latents: no layout is better than a wrong one.
    assert discover(made(shuffled=True), call()).patches is None


@pytest.mark.parametrize("way", ["inplace", "hints"])
def test_neither_adding_in_place_nor_between_blocks_confuses(way: str) -> None:
    for order in (("picture",), ("words", "picture")):
        (stack,) = discover(made(order, **{way: True}), call()).stacks
        assert stack.in_place == (way == "inplace")
        assert (stack.streams, stack.parameters, stack.places) == DUAL[order]


def test_the_denoiser_and_the_random_state_are_left_as_they_were() -> None:
    denoiser, arguments = made(("words", "picture"), "tv"), call()
    before = {name: value.clone() for name, value in (*denoiser.state_dict().items(), *arguments.items())}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    discover(denoiser, arguments)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in (*denoiser.state_dict().items(), *arguments.items()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.modules())


class Nothing(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Single(), Single()])

    def forward(self, numbers: Tensor) -> Tensor:
        sequence = torch.nn.functional.one_hot(numbers, WIDTH).float()
        for block in self.blocks:
            sequence = block(sequence, sequence[:, 0])
        return sequence


def test_what_was_made_of_a_stream_is_still_that_stream() -> None:
    """Registers that came from nowhere stand beside words and a picture that are no longer bit by bit what blocks returned."""
    (_, joined) = discover(made(("words", "picture"), "rtv"), call()).stacks
    assert joined == Stack("rest", ("extra", "text", "visual"), ("sequence",), extra=3, width=WIDTH)


def test_what_cannot_be_told_is_not_guessed() -> None:
    with pytest.raises(Undecided, match="a Nothing hands tokens through no list of modules"):
        discover(Nothing(), {"hidden_states": torch.randn(1, 4, 3)})
    with pytest.raises(Undecided, match="back and forth between strange_name, rest;"):
        discover(made(("words", "picture"), back_and_forth=True), call())
    with pytest.raises(Undecided, match="a Numbers takes no latents"):
        discover(Numbers(), {"numbers": torch.ones(2, 3, dtype=torch.long)})


def small(denoiser: nn.Module) -> nn.Module:
    """The denoiser with no weight at 0, so that no block is idle."""
    generator = torch.Generator().manual_seed(0)
    for weight in denoiser.parameters():
        weight.data = 0.15 * torch.randn(weight.shape, generator=generator)
    return denoiser.eval()


def test_wan_is_found_as_its_record_says() -> None:
    denoiser = small(
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
            freq_dim=16, ffn_dim=32, num_layers=3,
        )
    )  # fmt: skip
    inputs = {"timestep": torch.tensor([500]), "encoder_hidden_states": torch.randn(1, 7, 16)}
    found = discover(denoiser, {"hidden_states": torch.randn(1, 4, 3, 8, 6), **inputs})
    stack = Stack("blocks", ("visual",), ("hidden_states",), width=24)
    assert found == Found("hidden_states", (stack,), (), {"visual": 36}, Patches("cfhw", (1, 2, 2)))


def test_what_a_text_is_padded_with_is_text_and_a_padded_picture_is_refused() -> None:
    """How many tokens of padding there are depends on the prompt and the size, and no record could say it."""
    denoiser, arguments = small_denoiser("ZImageTransformer2DModel")
    for words in (20, 40, 64):
        found = discover(denoiser, {**arguments, "cap_feats": [torch.randn(words, 16) for _ in range(2)]})
        assert found.tokens == {"visual": 32, "text": 32 if words == 20 else 64}
        assert [stack.streams for stack in found.stacks] == [("visual",), ("visual", "text")]
    with pytest.raises(Undecided, match="extra tokens in the sequences of samples that come as a list"):
        discover(denoiser, {**arguments, "x": [torch.randn(4, 1, 8, 12) for _ in range(2)]})


def test_dual_and_joined_blocks_of_auraflow() -> None:
    denoiser = small(
        diffusers.AuraFlowTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, out_channels=4, pos_embed_max_size=64,
        )
    )  # fmt: skip
    inputs = {"timestep": torch.tensor([0.5]), "encoder_hidden_states": torch.randn(1, 7, 32)}
    found = discover(denoiser, {"hidden_states": torch.randn(1, 4, 8, 6), **inputs})
    dual, joined = found.stacks
    assert (dual.path, dual.streams) == ("joint_transformer_blocks", ("text", "visual"))
    assert dual.parameters == ("encoder_hidden_states", "hidden_states")
    assert (joined.path, joined.streams) == ("single_transformer_blocks", ("text", "visual"))
    assert joined.joined
    assert found.tokens == {"text": 7 + 8, "visual": 12}  # with 8 registers, which it has as text
    assert found.patches == Patches("chw", (2, 2))
