"""One way down: a module imports only what lies below it, nnsight stays in one file, and nothing is unpickled."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = """
dit_lens.errors dit_lens.turns dit_lens.side_by_side
dit_lens.files
dit_lens.reasoner.board dit_lens.reasoner.settings
dit_lens.reasoner.unmixing
dit_lens.reasoner.tasks.base
dit_lens.reasoner.tasks.bounce dit_lens.reasoner.tasks.circle dit_lens.reasoner.tasks.maze
    dit_lens.reasoner.tasks.pattern dit_lens.reasoner.tasks.permanence dit_lens.reasoner.tasks.tictactoe
dit_lens.reasoner.tasks
dit_lens.reasoner.data dit_lens.reasoner.folders dit_lens.reasoner.team dit_lens.reasoner.vbvr
dit_lens.reasoner.cases
dit_lens.reasoner.models
dit_lens.reasoner.train_dit dit_lens.reasoner.train_vae
dit_lens.reasoner dit_lens.reasoner.train
dit_lens.sites dit_lens.attention
dit_lens.architectures.layout dit_lens.architectures.stack dit_lens.architectures.watching dit_lens.architectures.arguments
dit_lens.architectures.record dit_lens.architectures.discovery dit_lens.architectures.inside
dit_lens.architectures.anatomy dit_lens.architectures.guidance
dit_lens.architectures dit_lens.architectures.finding
dit_lens.taps dit_lens.visual_tokens
dit_lens.noise
dit_lens.calls
dit_lens.schedule
dit_lens.selection dit_lens.rows dit_lens.pictures dit_lens.loops
dit_lens.activations dit_lens.reducers dit_lens.grid
dit_lens.record dit_lens.attention_maps
dit_lens.ports dit_lens.detours dit_lens.obstacles
dit_lens.hooks dit_lens.tracing dit_lens.check_report dit_lens.one_call
dit_lens.conformance_modules dit_lens.conformance_streams
dit_lens.conformance
dit_lens.run dit_lens.watched_run dit_lens.first_inputs
dit_lens.knowing dit_lens.shards dit_lens.directions dit_lens.donors dit_lens.replay
dit_lens.store
dit_lens.edits
dit_lens.knockout dit_lens.latent_edits
dit_lens.editor
dit_lens.batching dit_lens.decoding dit_lens.loading dit_lens.describe dit_lens.encoded dit_lens.checks
dit_lens.lens
dit_lens.layer_lens dit_lens.pairs
dit_lens.plants.parts dit_lens.plants.table
dit_lens.plants.stream dit_lens.plants.readings dit_lens.small_pipelines.making dit_lens.small_pipelines.record
    dit_lens.small_pipelines.schedules dit_lens.small_denoisers.record dit_lens.small_denoisers.refused
    dit_lens.small_denoisers.uncompiled dit_lens.small_denoisers.common
dit_lens.small_pipelines.texts dit_lens.small_pipelines.vaes dit_lens.small_denoisers.crossed
dit_lens.small_pipelines.audio dit_lens.small_pipelines.crossed dit_lens.small_pipelines.images
    dit_lens.small_pipelines.videos dit_lens.small_pipelines.wan dit_lens.small_denoisers.wan
    dit_lens.small_denoisers.ltx dit_lens.small_denoisers.lumina dit_lens.small_denoisers.sana dit_lens.small_denoisers.sounds
    dit_lens.small_denoisers.older dit_lens.small_denoisers.proteins dit_lens.small_denoisers.reading
    dit_lens.small_denoisers.videos dit_lens.small_denoisers.cogs dit_lens.small_denoisers.experts dit_lens.small_denoisers.flux
    dit_lens.small_denoisers.hunyuan dit_lens.small_denoisers.joint dit_lens.small_denoisers.kandinsky
    dit_lens.small_denoisers.refined dit_lens.small_denoisers.sequences
dit_lens.small_pipelines.unusual dit_lens.small_denoisers.chunked dit_lens.small_denoisers.wan_kin
dit_lens.small_pipelines dit_lens.small_denoisers
dit_lens.coverage.truth
dit_lens.coverage.rows
dit_lens.coverage.page
dit_lens.coverage dit_lens.coverage.__main__
dit_lens.small_pipelines.page
dit_lens.small_pipelines.__main__
dit_lens.plants.mechanisms
dit_lens.plants.model
dit_lens.plants.build dit_lens.plants.features
dit_lens.controls dit_lens.metrics dit_lens.statistics dit_lens.provenance
dit_lens.plots dit_lens.bench dit_lens.blends probes.change_points probes.linear probes.newton probes.ridge
dit_lens.branching dit_lens.readings dit_lens.sweeping
dit_lens.attribution
dit_lens.plants.tools
dit_lens.plants
dit_lens.plants.measured
dit_lens.plants.page
dit_lens.plants.__main__
dit_lens
probes.targets probes.controls probes.baselines probes.closer probes.logistic probes.features
probes.cells
probes.observed
probes.maps probes.levers probes.clip_targets
probes.causes probes.transfer probes.decided probes.clips
probes
dit_lens.claims dit_lens.clean
dit_lens.experiment
dit_lens.report
dit_lens.cli
experiments
experiments.energy experiments.paper experiments.second experiments.probe_figures experiments.arms experiments.probes_alone
    experiments.timing experiments.content_shares experiments.damage experiments.ablation_cases
experiments.noised experiments.noise_claims experiments.swapping experiments.merging experiments.readings
experiments.energy_figures experiments.layer_figures experiments.noise_figures experiments.propagation_figures
    experiments.layer_swap_figures experiments.layer_swap_claims experiments.ensemble_figures experiments.ensemble_claims
    experiments.step_lens_claims experiments.step_lens_figures experiments.decision_time_claims
experiments.decision_time_figures experiments.specialization_claims experiments.noise_tables
experiments.propagation_tables
experiments.benchmark_patching experiments.benchmark_probes experiments.held_out experiments.noise experiments.page
    experiments.probe_map experiments.propagation experiments.step_lens experiments.token_energy experiments.layer_swap
    experiments.ensemble experiments.decision_time experiments.layer_ablation experiments.specialization
"""
"""From the bottom up. An indented line goes on with the layer above it; modules of one layer do not import each other."""

RANK = {module: rank for rank, layer in enumerate(LAYERS.strip().replace("\n    ", " ").split("\n")) for module in layer.split()}
OURS = ("dit_lens", "probes", "experiments")
FILES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))
NEVER = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
"""Modules that unpickle or run what they read."""


def module_name(path: Path) -> str:
    """The name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Everything a file imports, at its top or later: modules by name, and names taken from our packages as modules of them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert node.module is not None
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in RANK else node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            assert node.args, f"{path}:{node.lineno}"
            if isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def test_every_module_has_its_layer() -> None:
    names = {module_name(path) for path in FILES}
    assert names - set(RANK) == set(), "new modules: write them into the layer where they belong"
    assert {name for name in set(RANK) - names if "." in name} == set(), "modules that are gone"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_module_imports_only_what_lies_below(path: Path) -> None:
    own = module_name(path)
    for name in imported(path):
        if name.split(".")[0] in OURS:
            assert name in RANK, f"{own} imports {name}, which is no module of ours"
            assert RANK[name] < RANK[own], f"{own} imports {name}, which lies above it or beside it"


def test_the_reasoner_knows_nothing_of_the_lens() -> None:
    for path in FILES:
        if module_name(path).startswith("dit_lens.reasoner"):
            ours = {name for name in imported(path) if name.split(".")[0] in OURS}
            allowed = {name for name in ours if name.startswith(("dit_lens.reasoner", "dit_lens.errors", "dit_lens.files"))}
            assert ours == allowed, module_name(path)


def test_the_command_line_the_report_and_the_runner_are_not_for_probes() -> None:
    above = ("dit_lens.cli", "dit_lens.report", "dit_lens.experiment", "experiments")
    for path in FILES:
        if module_name(path).startswith("probes"):
            assert not [name for name in imported(path) if name.startswith(above)], module_name(path)


def test_only_tracing_imports_nnsight() -> None:
    users = {module_name(path) for path in FILES if any(name.split(".")[0] == "nnsight" for name in imported(path))}
    assert users == {"dit_lens.tracing"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_is_unpickled_and_nothing_remote_is_run(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & NEVER
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("torch.load", "torch.hub", "np.load", "numpy.load", "torch.jit.load"), node.lineno
            assert node.attr not in ("read_pickle", "to_pickle"), node.lineno
        elif isinstance(node, ast.keyword):
            assert node.arg not in ("trust_remote_code", "allow_pickle"), node.value.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), node.lineno
