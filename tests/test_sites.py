"""Every site of a Wan block: it is the tensor it claims to be, and what replaces it takes effect, on both engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import BLOCKS, WIDTH, arguments, tiny_pipeline
from test_tracing import untouched
from torch import Tensor, nn
from torch.nn import functional

import dit_lens as dl
from dit_lens.architectures import WAN
from dit_lens.hooks import HookEngine
from dit_lens.taps import Tap, replaced_attribute
from dit_lens.tracing import TracingEngine

HEADS = 2
LAYOUT = (2, 2, 2)
NAMES = [site.name for site in WAN.sites]
REPLACEABLE = [site.name for site in WAN.sites if not site.read_only]
PER_HEAD = ["q", "k", "v", "qk", "heads"]
PARTS = ["attn_contribution", "cross_attn_contribution", "mlp_contribution"]
BLOCK = 1
ENGINES = [TracingEngine, HookEngine]


@pytest.fixture
def recorded(image_pipe: Any, engine: str) -> dl.Run:
    """Every site of one block in one call, tokens in the order of the layout."""
    record = dl.at(block=BLOCK, step=1, branch="uncond", site="all")
    return dl.wrap(image_pipe, engine=engine).run(**arguments(image_pipe), seed=3, record=record)


def tokens(run: dl.Run, site: str) -> Tensor:
    """A recorded tensor as the model has it: (batch, tokens, ...)."""
    return run.activation(site=site, branch="uncond").detach().flatten(1, 3)


def edited(pipe: Any, engine_class: type, taps: list[Tap]) -> Tensor:
    """The latents of a run with taps."""
    call = {**arguments(pipe), "generator": [torch.Generator().manual_seed(3)], "output_type": "latent"}
    with replaced_attribute(pipe, "_progress_bar_config", {"disable": True}):
        return engine_class(pipe, WAN).call(lambda: pipe(**call), taps).frames


def heard(pipe: Any, path: str, what: str) -> list[Tensor]:
    """A list that a torch hook fills with the first input or the output of a module of the block, at every call."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found.append(args[0] if what == "input" else output)

    pipe.transformer.blocks[BLOCK].get_submodule(path).register_forward_hook(hook)
    return found


def test_sites_are_labelled_and_shaped(recorded: dl.Run) -> None:
    assert [cell.site for cell in recorded.activations.cells] == NAMES
    for entry in recorded.activations:
        channels = WIDTH // HEADS * (2 if entry.cell.site == "qk" else 1)
        rows = (HEADS, channels) if entry.cell.site in PER_HEAD else (WIDTH,)
        assert entry.tensor.shape == (1, *LAYOUT, *rows)
        assert (entry.cell.block, entry.cell.step, entry.cell.branch) == (BLOCK, 1, "uncond")


def test_contributions_add_up_to_the_update(image_pipe: Any, engine: str) -> None:
    run = dl.wrap(image_pipe, engine=engine).run(**arguments(image_pipe), record=dl.at(site=[*PARTS, "update"]))
    for branch in ("cond", "uncond"):
        *parts, update = (run.activations.stack(branch=branch, site=site) for site in (*PARTS, "update"))
        assert torch.allclose(sum(parts, torch.zeros(())), update, rtol=0, atol=1e-5)
        assert all(part.abs().max() > 1e-3 for part in parts)


def test_each_contribution_is_what_the_stream_gains(image_pipe: Any, engine: str) -> None:
    """The oracle reads the stream between the modules, where the norms take it in."""
    before, middle, after = (heard(image_pipe, path, "input") for path in ("", "norm2", "norm3"))
    end = heard(image_pipe, "", "output")
    run = dl.wrap(image_pipe, engine=engine).run(**arguments(image_pipe), record=dl.at(block=BLOCK, site=PARTS, branch="cond"))
    for step in range(4):
        stream = [tensors[2 * step] for tensors in (before, middle, after, end)]
        for part, name in enumerate(PARTS):
            found = run.activation(step=step, site=name).flatten(1, 3)
            assert torch.allclose(found, stream[part + 1] - stream[part], atol=1e-5), name


def test_attention_follows_from_its_parts(image_pipe: Any, recorded: dl.Run) -> None:
    q, k, v = (tokens(recorded, site).transpose(1, 2) for site in ("q", "k", "v"))
    weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
    heads = tokens(recorded, "heads")
    assert torch.allclose((weights @ v).transpose(1, 2), heads, atol=1e-5)
    assert torch.equal(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2), heads)
    out = image_pipe.transformer.blocks[BLOCK].attn1.to_out[0]
    by_head = torch.einsum("bthc,dhc->btd", heads, out.weight.detach().unflatten(1, (HEADS, -1))) + out.bias.detach()
    assert torch.allclose(by_head, tokens(recorded, "attn"), atol=1e-5)


def test_queries_and_keys_are_normalised_and_rotated(image_pipe: Any, engine: str) -> None:
    """The oracle rotates pairs of channels as complex numbers, by angles from the positions of the tokens."""
    attention = image_pipe.transformer.blocks[BLOCK].attn1
    taken = heard(image_pipe, "attn1", "input")
    run = dl.wrap(image_pipe, engine=engine).run(**arguments(image_pipe), record=dl.at(block=BLOCK, site=["q", "k", "v"]))
    size = WIDTH // HEADS
    widths = (size - 2 * (2 * (size // 6)), 2 * (size // 6), 2 * (size // 6))
    places = torch.cartesian_prod(*(torch.arange(length) for length in LAYOUT))
    angles = [places[:, axis, None] / 10000 ** (torch.arange(0, width, 2) / width) for axis, width in enumerate(widths)]
    turn = torch.polar(torch.ones(()), torch.cat(angles, dim=-1))[None, :, None]
    for index, (step, branch) in enumerate((step, branch) for step in range(4) for branch in ("cond", "uncond")):
        projected = {
            "q": attention.norm_q(attention.to_q(taken[index])),
            "k": attention.norm_k(attention.to_k(taken[index])),
            "v": attention.to_v(taken[index]),
        }
        for name, value in projected.items():
            rows = value.unflatten(-1, (HEADS, -1))
            if name != "v":
                rows = torch.view_as_real(torch.view_as_complex(rows.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
            found = run.activation(step=step, branch=branch, site=name).flatten(1, 3)
            assert torch.allclose(found, rows, atol=1e-5), name


@pytest.mark.parametrize(("site", "path"), [("attn", "attn1"), ("cross_attn", "attn2"), ("mlp", "ffn")])
def test_module_sites_are_what_the_module_returns(image_pipe: Any, engine: str, site: str, path: str) -> None:
    outputs = heard(image_pipe, path, "output")
    run = dl.wrap(image_pipe, engine=engine).run(**arguments(image_pipe), record=dl.at(block=BLOCK, site=site))
    assert len(outputs) == len(run.activations) == 8
    for output, entry in zip(outputs, run.activations, strict=True):
        assert torch.equal(entry.tensor.flatten(1, 3), output)


@pytest.mark.parametrize("site", REPLACEABLE)
def test_a_replacement_takes_effect_and_both_engines_agree(any_pipe: Any, site: str) -> None:
    calls: list[Tensor] = []

    def change(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        return tensor.flip(1) * 1.5 + 1

    results = [edited(any_pipe, engine, [Tap("transformer", BLOCK, site, change)]) for engine in ENGINES]
    steps = 8 if any_pipe.transformer_2 is None else sum(t >= 800 for t in any_pipe.scheduler.timesteps) * 2
    assert len(calls) == 2 * steps, "once at every call of the block, and at no other attention"
    assert torch.equal(*results)
    assert not torch.equal(results[0], edited(any_pipe, HookEngine, []))
    untouched(any_pipe)


@pytest.mark.parametrize("engine_class", ENGINES)
@pytest.mark.parametrize("site", [name for name in REPLACEABLE if name != "update"])
def test_an_equal_replacement_changes_no_bit(image_pipe: Any, engine_class: type, site: str) -> None:
    plain = edited(image_pipe, HookEngine, [])
    assert torch.equal(edited(image_pipe, engine_class, [Tap("transformer", BLOCK, site, Tensor.clone)]), plain)


@pytest.mark.parametrize("engine_class", ENGINES)
def test_a_replacement_is_what_the_rest_of_the_block_sees(image_pipe: Any, engine_class: type) -> None:
    """Taps in the reverse of the order of execution; zero values leave the bias, and a zero update the stream."""
    block = image_pipe.transformer.blocks[BLOCK]
    after: list[Tensor] = []
    attention: list[Tensor] = []
    zeros = torch.zeros_like
    taps = [
        Tap("transformer", BLOCK, "resid", lambda tensor: after.append(tensor)),
        Tap("transformer", BLOCK, "update", zeros),
        Tap("transformer", BLOCK, "resid", lambda tensor: after.append(tensor)),
        Tap("transformer", BLOCK, "attn", lambda tensor: attention.append(tensor)),
        Tap("transformer", BLOCK, "v", zeros),
        Tap("transformer", BLOCK, "q", lambda tensor: tensor * 3),
    ]
    taken = heard(image_pipe, "", "input")
    edited(image_pipe, engine_class, taps)
    for index, before in enumerate(taken):
        assert torch.equal(after[2 * index + 1], before)
        assert not torch.equal(after[2 * index], before)
        assert torch.allclose(attention[index], block.attn1.to_out[0].bias.expand_as(attention[index]), atol=1e-6)


@pytest.mark.parametrize("engine_class", ENGINES)
@pytest.mark.parametrize(
    ("site", "given", "message"),
    [
        ("mlp_contribution", torch.zeros_like, r"'mlp_contribution' of block 1 is read-only; replace 'mlp' instead"),
        ("qk", torch.zeros_like, r"'qk' of block 1 is read-only; replace 'q' or 'k' instead"),
        ("heads", lambda tensor: tensor[:, :1], r"'heads' of block 1 has shape \(1, 8, 2, 8\), .* it \(1, 1, 2, 8\)"),
        (
            "logits",
            torch.zeros_like,
            r"the blocks in 'blocks' have no site 'logits' in the stream 'visual'; there is q, k, v, qk, heads, attn",
        ),
    ],
)
def test_what_cannot_be_replaced_is_refused(image_pipe: Any, engine_class: type, site: str, given: Any, message: str) -> None:
    with pytest.raises(dl.InputError, match=message):
        edited(image_pipe, engine_class, [Tap("transformer", BLOCK, site, given)])
    untouched(image_pipe)


def test_an_exception_at_any_site_leaves_the_pipeline_as_it_was(image_pipe: Any, engine: str) -> None:
    lens = dl.wrap(image_pipe, engine=engine)
    plain = edited(image_pipe, HookEngine, [])

    def fail(activation: Tensor, cell: dl.Cell) -> Tensor:
        raise ZeroDivisionError("on purpose")

    for site in NAMES:
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            lens.run(**arguments(image_pipe), record=dl.Record(dl.at(site=site, block=BLOCK, step=1), fail))
        untouched(image_pipe)
    assert torch.equal(edited(image_pipe, HookEngine, []), plain)


def test_heads_are_selected(image_pipe: Any, engine: str) -> None:
    here = {"block": BLOCK, "step": 1, "branch": "cond"}
    corner = torch.tensor([[True, False], [False, False]])
    records = [
        dl.at(**here, site="heads"),
        dl.at(**here, site=PER_HEAD, head=1),
        dl.at(**here, site="heads", head=[-1, 0], frames=0),
        dl.at(**here, site="heads", head=0, tokens=corner),
        dl.Record(dl.at(**here, site="heads"), dl.norm),
        dl.Record(dl.at(**here, site="heads"), dl.frame_mean),
        dl.Record(dl.at(**here, site="heads"), dl.region_mean(corner)),
    ]
    run = dl.wrap(image_pipe, engine=engine).run(**arguments(image_pipe), record=records)
    whole, one, both, places, norms, means, region = (run.activation(site="heads", record=index) for index in range(len(records)))
    assert torch.equal(one, whole[..., 1:, :])
    assert torch.equal(both, whole[:, :1])
    assert torch.equal(places, whole[:, :, 0, 0, :1])
    assert torch.equal(norms, whole.norm(dim=-1))
    assert torch.allclose(means, whole.mean(dim=(2, 3)))
    assert torch.equal(region, whole[:, :, 0, 0])
    assert str(records[1]) == "at(block=1, step=1, branch='cond', site=['q', 'k', 'v', 'qk', 'heads'], head=1)"


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"head": 0}, r"at\(head=0\): head= belongs to the sites q, k, v, qk, heads; name them with site="),
        ({"head": 0, "site": "all"}, r"head= belongs to the sites q, k, v, qk, heads"),
        ({"head": 2, "site": "q"}, r"head 2 is out of range: there are 2 heads, write 0 to 1"),
    ],
)
def test_heads_that_do_not_exist_are_refused(image_pipe: Any, selection: dict[str, Any], message: str) -> None:
    with pytest.raises(dl.InputError, match=message):
        dl.wrap(image_pipe, engine="hooks").run(**arguments(image_pipe), record=dl.at(**selection))


@pytest.mark.parametrize("reduce", [dl.full, dl.norm, dl.frame_mean, dl.region_mean(torch.ones(2, 2))])
@pytest.mark.parametrize("head", [None, 1])
def test_the_bytes_of_every_site_are_known_before(image_pipe: Any, reduce: Any, head: int | None) -> None:
    image_pipe.transformer.to(torch.bfloat16)
    lens = dl.wrap(image_pipe, engine="hooks")
    record = dl.Record(dl.at(site="all" if head is None else PER_HEAD, head=head), reduce)
    kept = lens.run(**arguments(image_pipe), record=record).activations.nbytes
    lens.run(**arguments(image_pipe), record=record, limit_bytes=kept)
    with pytest.raises(dl.InputError, match="would keep"):
        lens.run(**arguments(image_pipe), record=record, limit_bytes=kept - 1)


def test_half_precision_is_the_same_on_both_engines() -> None:
    pipe = tiny_pipeline()
    pipe.transformer.to(torch.bfloat16)
    traced, hooked = (
        dl.wrap(pipe, engine=name).run(**arguments(pipe), record=dl.at(site="all")) for name in ("nnsight", "hooks")
    )
    assert len(traced.activations) == len(NAMES) * BLOCKS * 8
    for ours, theirs in zip(traced.activations, hooked.activations, strict=True):
        assert ours.cell == theirs.cell
        assert torch.equal(ours.tensor, theirs.tensor), ours
        in_float32 = ours.cell.site in [*PARTS, "update"]
        assert ours.tensor.dtype == (torch.float32 if in_float32 else torch.bfloat16), ours


class OwnProcessor:
    """An attention processor that goes another way than torch's scaled dot-product attention."""

    def __call__(self, attn: Any, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
        return attn.to_out[0](attn.to_v(hidden_states))


def test_attention_without_the_expected_call_is_named(image_pipe: Any, engine: str) -> None:
    image_pipe.transformer.blocks[BLOCK].attn1.set_processor(OwnProcessor())
    lens = dl.wrap(image_pipe, engine=engine)
    where = {
        "nnsight": r"processor of blocks.1.attn1 never calls dispatch_attention_fn",
        "hooks": r"blocks.1.attn1 called .* 0 times",
    }
    with pytest.raises(dl.InputError, match=where[engine]):
        lens.run(**arguments(image_pipe), record=dl.at(block=BLOCK, site="k"))
    untouched(image_pipe)
    lens.run(**arguments(image_pipe), record=dl.at(block=BLOCK, site=["heads", "attn"]))


def test_a_gate_may_differ_from_token_to_token() -> None:
    """Wan2.2 TI2V has a modulation for every token."""
    block = nn.Module()
    block.table = nn.Parameter(torch.randn(1, 3, 5))
    modulation = torch.randn(2, 7, 3, 5)
    gate = dl.Gate(1, chunks=3, table="table", modulation="temb")
    found = gate.of(block, {"temb": modulation})
    assert torch.equal(found, block.table[:, 1] + modulation[:, :, 1])
    assert torch.equal(gate.of(block, {"temb": modulation[:, 0]})[:, 0], found[:, 0])
