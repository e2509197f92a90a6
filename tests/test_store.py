"""The store: what goes in comes out, bit for bit; nothing is half there; selecting is filtering; one tensor at a time."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import arguments, tiny_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dit_lens as dl
from dit_lens.activations import Entry
from dit_lens.shards import ShardWriter, read
from dit_lens.store import FORMAT

STEPS = ((0, 1.0), (1, 0.85), (2, 0.6))


def made_run(
    seeds: tuple[int, ...],
    blocks: tuple[int, ...] = (0, 1, 2),
    salt: int = 0,
    sigmas: tuple[tuple[int, float], ...] = STEPS,
) -> dl.Run:
    """A run without a pipeline: random tensors, two records (the stream, and its norm)."""
    generator = torch.Generator().manual_seed(1000 * salt + sum(seeds))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch, entries = len(seeds), []
    for (step, sigma), branch, block in itertools.product(sigmas, ("cond", "uncond"), blocks):
        cell = dl.Cell("transformer", step, branch, block, sigma=sigma, timestep=1000 * sigma, depth=block / 3)
        stream = random(batch, 1, 2, 2, 4)
        entries += [Entry(cell, 0, "full", stream.bfloat16()), Entry(cell, 1, "norm", stream.norm(dim=-1))]
    return dl.Run(
        seeds=seeds,
        prompts=("walk",) * batch,
        layout=dl.Layout(1, 2, 2),
        scheduler="FlowMatchEulerDiscreteScheduler",
        timesteps=tuple(1000 * sigma for _, sigma in sigmas),
        sigmas=torch.tensor([sigma for _, sigma in sigmas]),
        experts=("transformer",) * len(sigmas),
        branches=("cond", "uncond"),
        latents=random(len(sigmas) + 1, batch, 4, 1, 4, 4),
        outputs={name: random(len(sigmas), batch, 4, 1, 4, 4) for name in ("guided", "cond", "uncond")},
        weights=((1.0, -0.5),) * len(sigmas),
        activations=dl.Activations(entries),
    )


def assert_same(ours: dl.Run, theirs: dl.Run) -> None:
    """Every field of two runs, bit for bit."""
    for name in ("seeds", "prompts", "layout", "scheduler", "timesteps", "experts", "branches", "weights"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert torch.equal(ours.latents, theirs.latents)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert all(torch.equal(ours.outputs[name], theirs.outputs[name]) for name in ours.outputs)
    assert ours.activations.to_pandas().equals(theirs.activations.to_pandas())
    for one, other in zip(ours.activations, theirs.activations, strict=True):
        assert one.tensor.dtype == other.tensor.dtype
        assert torch.equal(one.tensor, other.tensor)


def files(store: dl.Store) -> list[str]:
    return sorted(str(p.relative_to(store.folder)) for p in store.folder.rglob("*") if p.is_file() and p.name != ".lock")


@pytest.fixture
def store(tmp_path: Path) -> dl.Store:
    return dl.Store(tmp_path / "store")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dl.Store, list[dl.Run]]:
    """Three runs of two, one and three rows, the last without block 2; labels by row and by run."""
    store = dl.Store(tmp_path_factory.mktemp("filled") / "store")
    runs = [made_run((0, 1)), made_run((0,), salt=1), made_run((2, 0, 5), (0, 1), salt=2)]
    store.append(runs[0], "m", task="maze", sample=[3, 4])
    store.append(runs[1], "m", task="maze", sample=4, split="test")
    store.append(runs[2], "m", task="circle", sample=[4, 5, 6])
    return store, runs


def test_a_run_comes_back_as_it_was(filled: tuple[dl.Store, list[dl.Run]]) -> None:
    for store in (filled[0], dl.Store(filled[0].folder)):
        assert len(store) == 3
        for number, run in enumerate(filled[1]):
            assert_same(run, store.run(number))
    with pytest.raises(dl.InputError, match="has no run 3; there is 0, 1, 2"):
        filled[0].run(3)


def test_the_tables_say_what_there_is(filled: tuple[dl.Store, list[dl.Run]]) -> None:
    store, runs = filled
    rows = store.rows
    assert rows["run"].tolist() == [0, 0, 1, 2, 2, 2]
    assert rows["row"].tolist() == [0, 1, 0, 0, 1, 2]
    assert rows["seed"].tolist() == [0, 1, 0, 2, 0, 5]
    assert rows["sample"].tolist() == [3, 4, 4, 4, 5, 6]
    assert rows["task"].tolist() == ["maze"] * 3 + ["circle"] * 3
    assert rows["split"].isna().tolist() == [True, True, False, True, True, True]
    assert set(rows["model"]) == {"m"}
    index = store.index
    assert len(index) == sum(len(run.activations) for run in runs)
    assert index["bytes"].sum() == sum(run.activations.nbytes for run in runs)
    first = index.iloc[0]
    assert (first["run"], first["step"], first["sigma"], first["timestep"], first["depth"]) == (0, 0, 1.0, 1000.0, 0.0)
    assert (first["shape"], first["dtype"], first["reduce"]) == ((2, 1, 2, 2, 4), "bfloat16", "full")
    assert (store.folder / "runs" / "000000" / first["shard"]).exists()


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "block": st.sampled_from([0, 2, [0, 2], range(1, 3), slice(1, None), "all"]),
    "step": st.sampled_from([1, [0, 2], slice(0, 2), "all"]),
    "branch": st.sampled_from(["cond", ["uncond"], ["cond", "uncond"], "all"]),
    "sigma": st.sampled_from([(0.7, 1.0), (0.5, 2.0), 0.85, [1.0, 0.60001]]),
    "depth": st.sampled_from([(0.3, 1.0), 0.3333]),
    "record": st.sampled_from([0, 1]),
    "reduce": st.sampled_from(["full", ["norm"]]),
    "shape": st.just((2, 1, 2, 2)),
    "run": st.sampled_from([0, [1, 2]]),
    "sample": st.sampled_from([4, [3, 6], range(5, 9)]),
    "seed": st.sampled_from([0, [1, 2]]),
    "task": st.sampled_from(["maze", "circle", ["maze", "circle"]]),
    "split": st.just("test"),
}
LEVELS = ("sigma", "depth", "timestep")


def fits(name: str, value: Any, wanted: Any) -> bool:
    """Whether a value is what was asked for, written the slow and plain way."""
    if wanted == "all" or wanted is None:
        return True
    if isinstance(wanted, tuple) and name in LEVELS:
        return wanted[0] <= value < wanted[1]
    if isinstance(wanted, slice):
        return value in range(10)[wanted]
    several: Any = wanted if isinstance(wanted, list | range) else [wanted]
    return any(abs(value - one) < 1e-4 * one if name in LEVELS else value == one for one in several)


@settings(deadline=None, max_examples=80)
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_selecting_is_filtering(filled: tuple[dl.Store, list[dl.Run]], wanted: dict[str, Any]) -> None:
    store, runs = filled
    rows = store.rows
    of_rows = {name: value for name, value in wanted.items() if name in rows}
    of_cells = {name: value for name, value in wanted.items() if name not in rows}
    expected = []
    for number, run in enumerate(runs):
        labels = rows[rows["run"] == number]
        kept = [i for i, (_, row) in enumerate(labels.iterrows()) if all(fits(n, row[n], v) for n, v in of_rows.items())]
        for entry in run.activations if kept else ():
            facts = {**vars(entry.cell), "record": entry.record, "reduce": entry.reduce, "shape": tuple(entry.tensor.shape)}
            if all(fits(name, facts[name], value) for name, value in of_cells.items()):
                expected.append((number, entry, kept))
    if not expected:
        with pytest.raises(dl.InputError, match=r"nothing (is stored|was recorded)"):
            store.select(**wanted)
        return
    for found, (number, entry, kept) in zip(store.select(**wanted), expected, strict=True):
        assert (found.run, found.cell, found.record, found.reduce) == (number, entry.cell, entry.record, entry.reduce)
        assert (found.cell.sigma, found.cell.depth) == (entry.cell.sigma, entry.cell.depth)
        assert torch.equal(found.tensor, entry.tensor[kept])
        assert found.rows["row"].tolist() == kept


def test_a_stack_has_the_rows_of_all_runs_and_says_what_they_are(filled: tuple[dl.Store, list[dl.Run]]) -> None:
    store, runs = filled
    stacked, rows = store.stack(block=1, step=2, branch="uncond", record=0)
    assert torch.equal(stacked, torch.cat([run.activation(1, 2, "uncond", record=0) for run in runs]))
    assert rows.equals(store.rows)
    some, rows = store.stack(block=1, step=2, reduce="norm", sample=[4, 6])
    assert rows[["run", "row"]].to_numpy().tolist() == [[0, 1], [1, 0], [2, 0], [2, 2]]
    for tensor, (run, row) in zip(some, rows[["run", "row"]].to_numpy(), strict=True):
        assert torch.equal(tensor, runs[run].activation(1, 2, record=1)[row])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"block": 7, "step": 0}, "nothing is stored at block=7; there is 0, 1, 2"),
        ({"block": 1}, "several: name step=, one of 0, 1, 2"),
        ({"step": 1, "record": 0}, "several: name block=, one of 0, 1, 2"),
        ({"step": 1, "block": 1}, "several: name record=, one of 0, 1"),
        ({"blok": 1}, "the store has no blok; write some of run, row, seed"),
        ({"step": 1, "sigma": (0.0, 0.5)}, r"nothing is stored at sigma=\(0.0, 0.5\); there is 0.6, 0.85, 1.0"),
    ],
)
def test_what_cannot_be_stacked_is_said(filled: tuple[dl.Store, list[dl.Run]], wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(dl.InputError, match=message):
        filled[0].stack(**wanted)


def test_runs_of_other_models_schedules_and_shapes_are_not_mixed(store: dl.Store) -> None:
    store.append(made_run((0,)), "one")
    store.append(made_run((1,)), "two")
    with pytest.raises(dl.InputError, match=r"2 models.*name model=, one of one, two, or model='all'"):
        store.select(block=1)
    assert {found.run for found in store.select(model="two")} == {1}
    assert {found.run for found in store.select(model="all")} == {0, 1}
    assert {found.run for found in store.select(run=0)} == {0}
    assert len(store.stack(block=1, step=1, record=0, model=["one", "two"])[0]) == 2
    store.append(made_run((2,), sigmas=((0, 1.0), (1, 0.5))), "two")
    with pytest.raises(dl.InputError, match=r"several: name sigma=, one of 0\.5, 0\.85"):
        store.stack(block=1, step=1, record=0, model="two")
    assert len(store.stack(block=1, step=1, record=0, model="two", sigma=0.5)[0]) == 1
    store.append(half(made_run((2,))), "two")
    with pytest.raises(dl.InputError, match="different shapes or precisions"):
        store.stack(block=1, step=0, record=0, model="two")


def half(run: dl.Run) -> dl.Run:
    entries = [Entry(e.cell, e.record, e.reduce, e.tensor[..., :1].half()) for e in run.activations]
    return dl.Run(**{**vars(run), "activations": dl.Activations(entries)})


def test_a_result_without_rows_is_whole_or_refused(store: dl.Store) -> None:
    run = made_run((0, 1))
    entries = [Entry(e.cell, 0, "total", e.tensor.float().sum()) for e in run.activations][:1]
    store.append(dl.Run(**{**vars(run), "activations": dl.Activations(entries)}), "m", sample=[1, 2])
    assert next(store.select()).tensor.shape == ()
    with pytest.raises(dl.InputError, match="'total' left no axis for the rows"):
        next(store.select(sample=1))
    with pytest.raises(dl.InputError, match="'total' left no axis for the rows"):
        store.stack()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"block": 3}, "block cannot be a label"),
        ({"seed": 3}, "seed cannot be a label"),
        ({"task": 3}, "the label task is a text in run 0, and 3 is a number"),
        ({"sample": [1, 2, 3]}, "the label sample has 3 values, and the run 2 rows; write one value, or 2"),
        ({"sample": ["a", 1]}, "numbers, texts or booleans, of one kind"),
        ({"sample": [None, 1]}, "numbers, texts or booleans, of one kind"),
        ({"model": ""}, "model= takes the hash"),
    ],
)
def test_labels_that_cannot_be(store: dl.Store, labels: dict[str, Any], message: str) -> None:
    store.append(made_run((0, 1)), "m", task="maze")
    before = files(store)
    with pytest.raises(dl.InputError, match=message):
        store.append(made_run((0, 1)), **{"model": "m", **labels})
    assert files(store) == before
    assert len(store) == 1


def test_a_run_streams_into_the_store_in_shards(store: dl.Store) -> None:
    pipe = tiny_pipeline()
    lens = dl.wrap(pipe, engine="hooks")
    record = [dl.at(block=[0, 2]), dl.Record(dl.at(site="update"), dl.norm)]
    kept = lens.run(**arguments(pipe), seed=[4, 5], record=[*record, dl.at(block=1, step=0)], decode=False)
    held: list[int] = []
    with store.writing(lens.hash, shard_bytes=4000, sample=[8, 9]) as part:
        records = part.streamed(record)
        assert [item.reduce for item in records] == [dl.full, dl.norm]
        run = lens.run(**arguments(pipe), seed=[4, 5], record=[*records, dl.at(block=1, step=0)], decode=False)
        held.append(len(run.activations))
        part.keep(run)
        with pytest.raises(dl.InputError, match="run 0 is written already"):
            part.keep(run)
    assert held == [2]
    shards = store.index.groupby("shard")["bytes"].sum()
    assert len(shards) > 3
    assert shards.iloc[:-1].between(4000, 4000 + store.index["bytes"].max(), inclusive="left").all()
    assert set(store.rows["model"]) == {lens.hash}
    theirs = store.run(part.number)
    assert len(theirs.activations) == len(kept.activations)
    for entry in kept.activations:
        cell = {axis: getattr(entry.cell, axis) for axis in ("block", "step", "branch", "site")}
        assert torch.equal(theirs.activation(**cell, record=entry.record), entry.tensor)
        assert torch.equal(store.stack(**cell, record=entry.record)[0], entry.tensor)
    with pytest.raises(dl.InputError, match="must stand after the streamed ones"), store.writing(lens.hash) as part:
        part.keep(lens.run(**arguments(pipe), record=[dl.at(block=1), *part.streamed(dl.at(block=0))], decode=False))
    with pytest.raises(dl.InputError, match="leave sink= out"), store.writing(lens.hash) as part:
        part.streamed(dl.Record(dl.at(), sink=lambda *_: None))
    assert len(store) == 1


def test_a_shard_is_written_as_soon_as_it_is_full_and_holds_no_more(tmp_path: Path) -> None:
    writer, alive = ShardWriter(tmp_path, shard_bytes=1000), []
    for block in range(20):
        tensor = torch.full((100,), float(block))
        alive.append(weakref.ref(tensor))
        writer.add(Entry(dl.Cell("transformer", 0, "cond", block), 0, "full", tensor))
        del tensor
        assert sum(ref() is not None for ref in alive) <= 2
        assert len(list(tmp_path.glob("*.safetensors"))) == (block + 1) // 3
    table = writer.finish()
    assert [entry.tensor[0].item() for entry in read(tmp_path, table.itertuples())] == list(range(20))


def test_views_and_odd_shapes_are_stored(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    odd = [base.T, base[1:2], base[:, ::2], torch.tensor(3.5), torch.zeros(0, 3), base > 3, base]
    writer = ShardWriter(tmp_path)
    for block, tensor in enumerate(odd):
        writer.add(Entry(dl.Cell("transformer", 0, "cond", block), 0, "own", tensor))
    for entry, tensor in zip(read(tmp_path, writer.finish().itertuples()), odd, strict=True):
        assert torch.equal(entry.tensor, tensor)


def test_reading_holds_one_tensor_and_comes_to_a_shard_only_when_it_is_its_turn(store: dl.Store) -> None:
    with store.writing("m", shard_bytes=1) as part:
        part.keep(made_run((0, 1)))
    alive: list[Any] = []
    for found in store.select(record=0):
        assert sum(ref() is not None for ref in alive) == 0
        alive.append(weakref.ref(found.tensor))
        del found
    assert len(alive) == 18
    shards = store.index["shard"].unique()
    (store.folder / "runs" / "000000" / shards[4]).write_bytes(b"rubbish")
    reading = store.select()
    assert len([next(reading) for _ in range(4)]) == 4
    with pytest.raises(dl.InputError, match=rf"the shard .*{shards[4]} is damaged or missing.*record its run again"):
        next(reading)


def test_what_is_read_can_be_changed_without_changing_the_store(filled: tuple[dl.Store, list[dl.Run]]) -> None:
    store, runs = filled
    next(store.select(record=0)).tensor.zero_()
    gc.collect()
    assert torch.equal(next(store.select(record=0)).tensor, runs[0].activations.entries[0].tensor)


@pytest.mark.parametrize("damage", ["truncate", "remove", "swap"])
def test_a_damaged_shard_is_named(store: dl.Store, damage: str) -> None:
    store.append(made_run((0,)), "m")
    store.append(made_run((0, 1)), "m")
    shard = store.folder / "runs" / "000000" / "activations-0.safetensors"
    if damage == "truncate":
        os.truncate(shard, shard.stat().st_size - 10)
    elif damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes((store.folder / "runs" / "000001" / shard.name).read_bytes())
    with pytest.raises(dl.InputError, match=r"the shard .*000000/activations-0\.safetensors"):
        list(dl.Store(store.folder).select())
    assert len(list(dl.Store(store.folder).select(run=1))) == 36


def test_damaged_tables_and_trajectories_are_named(store: dl.Store) -> None:
    store.append(made_run((0,)), "m")
    folder = store.folder / "runs" / "000000"
    (folder / "run.safetensors").write_bytes(b"")
    with pytest.raises(dl.InputError, match="000000 cannot be read"):
        store.run(0)
    (folder / "rows.parquet").write_bytes(b"rubbish")
    with pytest.raises(dl.InputError, match=r"the tables of the run in .*000000 are damaged"):
        len(dl.Store(store.folder))


def test_a_folder_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(dl.InputError, match="is no store: it has no readable"):
        dl.Store(tmp_path)
    with pytest.raises(dl.InputError, match="is no store"):
        dl.Store(tmp_path / "note.txt")
    for content in ("{", "[]"):
        (tmp_path / "store.json").write_text(content)
        with pytest.raises(dl.InputError, match="is no store"):
            dl.Store(tmp_path)
    (tmp_path / "store.json").write_text(json.dumps({"dit_lens_store": 99}))
    with pytest.raises(dl.InputError, match=f"has format 99, and this version reads {FORMAT}"):
        dl.Store(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["note.txt", "store.json"]


def test_an_empty_store_is_made_by_its_first_run_only(store: dl.Store) -> None:
    assert len(store) == 0
    assert store.rows.empty
    assert store.index.empty
    with pytest.raises(dl.InputError, match="holds no runs"):
        store.select(block=3)
    assert not store.folder.exists()
    bare = dl.Run(**{**vars(made_run((0,))), "activations": dl.Activations()})
    assert store.append(bare, "m", task="maze") == 0
    assert_same(store.run(0), bare)
    with pytest.raises(dl.InputError, match="nothing"):
        store.select(task="maze")


def test_an_exception_leaves_nothing_and_what_was_there_untouched(store: dl.Store) -> None:
    store.append(made_run((0,)), "m")
    before = {path: path.read_bytes() for path in store.folder.rglob("*.*") if path.is_file()}
    with pytest.raises(KeyboardInterrupt), store.writing("m", shard_bytes=1) as part:
        interrupted(part)
    with pytest.raises(dl.InputError, match="nothing was kept"), store.writing("m"):
        pass
    assert len(dl.Store(store.folder)) == 1
    assert store.append(made_run((3,)), "m") == 1
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("kept", ["partial shard", "shard", "everything but the index", "truncated partial index"])
def test_what_a_killed_writer_left_is_ignored_and_then_removed(store: dl.Store, kept: str) -> None:
    store.append(made_run((0,)), "m")
    store.append(made_run((1,)), "m")
    dead = store.folder / "runs" / "000001"
    index = (dead / "index.parquet").read_bytes()
    (dead / "index.parquet").unlink()
    if kept == "truncated partial index":
        (dead / ".index.parquet.1.partial").write_bytes(index[:50])
    elif kept != "everything but the index":
        for name in ("rows.parquet", "run.json", "run.safetensors"):
            (dead / name).unlink()
        if kept == "partial shard":
            shard = dead / "activations-0.safetensors"
            os.truncate(shard, 100)
            shard.rename(dead / ".activations-0.safetensors.partial")
    again = dl.Store(store.folder)
    assert len(again) == 1
    assert {found.run for found in again.select()} == {0}
    assert dead.exists()
    assert again.append(made_run((2,)), "m") == 1
    assert_same(again.run(1), made_run((2,)))
    assert not list(store.folder.rglob("*.partial"))
    # Another reader that was open all the time sees the new run.
    assert len(dl.Store(store.folder)) == 2


def interrupted(part: Any) -> None:
    """A run that is stopped after its first activation."""
    (record,) = part.streamed(dl.at())
    entry = made_run((1,)).activations.entries[0]
    record.sink(entry.cell, entry.tensor)
    assert list(part._folder.glob("*.safetensors"))
    raise KeyboardInterrupt


def hang(folder: Path, ready: Any) -> None:
    """A writer that has written a shard and then waits for its end."""
    with dl.Store(folder).writing("m", shard_bytes=1) as part:
        part._shards.add(made_run((1,)).activations.entries[0])
        ready.set()
        signal.pause()


@pytest.fixture
def hanging(store: dl.Store) -> Iterator[Any]:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hang, args=(store.folder, ready))
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_living_writer_keeps_its_folder_and_a_killed_one_loses_it(store: dl.Store, hanging: Any) -> None:
    assert store.append(made_run((5,)), "m") == 1
    assert (store.folder / "runs" / "000000" / "activations-0.safetensors").exists()
    assert len(store) == 1
    hanging.kill()
    hanging.join()
    with store.writing("m") as one, store.writing("m") as other:
        # The dead writer's folder is gone; two writers in one process have folders of their own.
        assert not (store.folder / "runs" / "000000").exists()
        assert {one.number, other.number} == {2, 3}
        other.keep(made_run((7,)))
        one.keep(made_run((6,)))
    assert [store.run(number).seeds for number in (1, 2, 3)] == [(5,), (6,), (7,)]
    assert isinstance(store.rows, pd.DataFrame)
    assert store.rows["run"].tolist() == [1, 2, 3]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    store = dl.Store(tmp_path / "store")
    (tmp_path / "store").write_text("in the way")
    with pytest.raises(dl.InputError, match=r"cannot write in .*store"):
        store.append(made_run((0,)), "m")
