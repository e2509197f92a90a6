"""The lens: a pipeline with every block of its denoisers open to view. The only object that most users hold.

    lens = dl.load("reasoner")
    run = lens.run(image=image, prompt="...", seed=0, record=dl.at(block=6, step=0))

The pipeline runs itself: the lens calls it with its own arguments, and a run in which nothing is recorded gives the
same bits as the pipeline alone (`Lens.plain`). What the lens adds are a CPU generator for every sample, the step clock,
and taps on the blocks that were asked for; all of it is gone when the run is over.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_lens import batching, decoding, loading, obstacles
from dit_lens.activations import Activations
from dit_lens.architectures import Architecture, Guidance, lookup
from dit_lens.architectures.finding import find
from dit_lens.architectures.guidance import Outline, outline, settings_of
from dit_lens.calls import DenoiserCall, in_form_of, sample_of
from dit_lens.check_report import CheckReport
from dit_lens.checks import check
from dit_lens.describe import Description, describe
from dit_lens.editor import Editor, as_edits
from dit_lens.edits import Edit
from dit_lens.errors import InputError, listed
from dit_lens.hooks import HookEngine
from dit_lens.latent_edits import ReplaceLatents
from dit_lens.loops import LoopClock, guidance_scale, loop_guidance, watch_loop
from dit_lens.pictures import shown
from dit_lens.record import Record, Recorder, as_records
from dit_lens.replay import Answers, Replay, Resume, clock_of, differentiable, forecast_of, starts, with_leaves
from dit_lens.rows import by_branch, of_branch
from dit_lens.run import Run
from dit_lens.schedule import Clock, Forecast, StepClock, forecast, forecast_with
from dit_lens.selection import Extent, Selector
from dit_lens.taps import Attention, Bypass, Engine, Result, Tap, replaced_attribute
from dit_lens.turns import one_at_a_time

ENGINES = ("nnsight", "hooks")
LIMIT_BYTES = 4 * 10**9
"""How much a run keeps at most, unless told otherwise."""


def load(
    model: str | Path,
    engine: str = "nnsight",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Lens:
    """A lens on a pipeline that is loaded here.

    Args:
        model: `reasoner` (bundled), the folder of a pipeline, or the id of one on the Hugging Face hub.
        engine: `nnsight`, or `hooks` for plain torch hooks; both give the same numbers.
        device: where to put it; a GPU if there is one, when left out. dtype: the precision to compute in.

    Raises:
        InputError: there is no such model, its files are damaged, or its architecture is not known.
    """
    pipe, folder = loading.load_pipeline(model, device, dtype)
    return Lens(pipe, engine, name=str(model), folder=folder)


def wrap(pipe: Any, engine: str = "nnsight") -> Lens:
    """A lens on a diffusers pipeline that you loaded yourself; it stays on its device and in its precision.

    Raises:
        InputError: the pipeline's architecture is not known.
    """
    return Lens(pipe, engine, name=type(pipe).__name__)


class Lens:
    """A wrapped pipeline.

    Attributes:
        pipe: the pipeline itself, unchanged. architecture: what is known about its family. name: what was loaded.
    """

    def __init__(self, pipe: Any, engine: str, name: str, folder: Path | None = None) -> None:
        obstacles.check_whole(pipe)
        self.pipe = pipe
        self._architecture = lookup(pipe)
        self._outlines: dict[Any, Outline] = {}
        self._forecasts: dict[Any, Forecast] = {}
        self.name = name
        self.engine = engine
        self._folder = folder
        if engine not in ENGINES:
            raise InputError(f"there is no engine {engine!r}; write {' or '.join(ENGINES)}")

    def __repr__(self) -> str:
        return f"Lens({self.name!r}, {type(self.pipe).__name__}, engine={self.engine!r})"

    @property
    def architecture(self) -> Architecture:
        """What is known about the pipeline's family: its record, or what was found by watching it.

        Raises:
            InputError: there is no record, and it was not watched yet.
        """
        if self._architecture is None:
            raise InputError(
                f"there is no record for a {type(self.pipe).__name__}, so it is watched in its first run: call"
                " lens.discover(...) with the arguments of a run, or describe it with dl.register(Architecture(...))"
            )
        return self._architecture

    def discover(self, **inputs: Any) -> Architecture:
        """Find out what the pipeline's blocks, streams and sites are by watching its first denoiser call; once is enough.

        `run`, `forecast` and `extent` do it by themselves where there is no record. It costs the beginning of a run, and about
        thirty times the beginning of a denoiser call.

        Args:
            inputs: the pipeline's arguments, as for `run`.

        Raises:
            InputError: what was seen allows no answer; the message says what was seen.
        """
        if self._architecture is None:
            with self._alone(progress=False):
                self._know(inputs)
        return self.architecture

    def _know(self, inputs: Mapping[str, Any]) -> Architecture:
        """The architecture, found with these arguments where it is not known."""
        if self._architecture is None:
            with batching.beginning(self.pipe, inputs) as arguments:
                self._architecture = find(self.pipe, arguments)
        return self._architecture

    @property
    def hash(self) -> str:
        """SHA-256 of the weights: of the files where the lens loaded a folder, of the values in memory elsewhere.

        Adapters (LoRA) may come, change and go while the lens is there: with them it is of what is in memory now, and of
        how they are set.
        """
        adapters = obstacles.adapters(self.pipe)
        if not adapters:
            return self._loaded_hash
        return hashlib.sha256("\n".join([self._memory_hash(), *adapters]).encode()).hexdigest()

    @cached_property
    def _loaded_hash(self) -> str:
        return self._memory_hash() if self._folder is None else loading.folder_hash(self._folder)

    def _memory_hash(self) -> str:
        parts = getattr(self.pipe, "components", None) or self.architecture.denoisers(self.pipe)
        return loading.state_hash({name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)})

    def describe(self) -> Description:
        """Experts, blocks, streams, sites, guidance, schedule and token layout; print it to see a table."""
        return describe(self.name, self.pipe, self.architecture)

    def check(self, **inputs: Any) -> CheckReport:
        """Check on short runs of this model that the lens sees it truly; print the report to see a table.

        It costs some ten short runs, and thirty to a hundred calls of each denoiser.

        Args:
            inputs: the pipeline's arguments; what is not given is chosen (a prompt, a picture, 3 steps), but for its sizes.

        Raises:
            InputError: the pipeline needs further arguments, or is refused: the message says what was seen.
        """
        return check(self, inputs)

    def forecast(self, **inputs: Any) -> Forecast:
        """The schedule that a run with these pipeline arguments will follow: timesteps, sigmas, experts, branches."""
        with self._alone(progress=False):
            return self._forecast(inputs)

    def extent(self, **inputs: Any) -> Extent:
        """All that there is to select from in a run with these pipeline arguments: blocks, steps, branches, sites."""
        with self._alone(progress=False):
            return self._extent(self._forecast(inputs))

    def plain(self, seed: batching.Seeds = 0, progress: bool = False, **inputs: Any) -> Any:
        """The pipeline itself, with the same generators as `run` and nothing attached: what a run is compared with.

        A batch of different images is the one thing that the pipeline cannot do by itself; see
        `batching.encode_row_by_row`.

        Args:
            seed, inputs: as for `run`; here `output_type` and `return_dict` are yours to give too.

        Returns:
            What the pipeline returns.
        """
        call = batching.prepare(self.pipe, seed, inputs, reserved=("generator",))
        with self._alone(progress), call.context(self.pipe):
            return self.pipe(**call.arguments)

    def run(
        self,
        seed: batching.Seeds = 0,
        record: Selector | Record | Iterable[Selector | Record] = (),
        edits: Edit | ReplaceLatents | Iterable[Edit | ReplaceLatents] = (),
        decode: bool = True,
        progress: bool = False,
        limit_bytes: int = LIMIT_BYTES,
        keep_calls: bool = False,
        answers: Mapping[tuple[int, str], Tensor | Resume] | None = None,
        until: int | None = None,
        **inputs: Any,
    ) -> Run:
        """Run the pipeline, with its trajectory and what `record` selects.

        Args:
            seed: one seed, or a list: every prompt is then run with each of them, prompt-major. Prompts of the same seed
                start from the same noise; a list of lists gives each prompt seeds of its own.
            record: selectors, or records with reducers and sinks; see `dit_lens.at` and `dit_lens.Record`.
            edits: changes to make on the way, in the order in which they act; see `dit_lens.edits`. What is recorded is
                what they left.
            decode: whether to decode the video.
            progress: whether to show the pipeline's progress bar.
            limit_bytes: refuse a run that would keep more than this of activations.
            keep_calls: whether to keep every denoiser call in `Run.calls`, for `replay`.
            answers: what is known of denoiser calls, by (step, branch), and need not be computed again: the output (see
                `Run.answers`), or a `dl.Resume` with the streams that some block takes.
            until: the last step to run; the run then ends there, without a video.
            inputs: the pipeline's own keyword arguments. `prompt` may be a list; images may be PIL images, lists of
                them, or tensors of shape (3, H, W) or (P, 3, H, W) in [0, 1].

        Returns:
            The run, on the CPU.

        Raises:
            InputError: arguments that the pipeline lacks, a selection that is out of range or matches nothing, one that
                would keep too much, or edits that cannot be made; before anything runs where that can be known.
        """
        reserved = ("generator", "output_type", "return_dict")
        call = batching.prepare(self.pipe, seed, inputs, reserved)
        records, changes = as_records(record), as_edits(edits)
        arguments = {**call.arguments, "output_type": "pt" if decode else "latent"}
        taken = inspect.signature(type(self.pipe).__call__).parameters
        arguments = {name: value for name, value in arguments.items() if name in taken}
        with self._alone(progress):
            foreseen = self._forecast(inputs)
            reading = bool(records or changes or answers or keep_calls)
            obstacles.check(self.pipe, self.architecture.denoisers(self.pipe), reading)
            self._check_until(until, decode, foreseen)
            extent = self._extent(foreseen)
            recorder = Recorder(records, extent, self._width, limit_bytes) if records else None
            editor = self._editor(changes, extent, call.seeds, call.groups, recorder)
            stored = Answers(answers or {}, foreseen, self.pipe, self.architecture)
            stored.check_reach([*editor.cells, *(recorder.cells if recorder else ())])

            def begin(clock: StepClock) -> None:
                for part in (editor, recorder):
                    if part is not None:
                        part.begin(clock)

            clock = self._clock(foreseen, inputs, begin=begin, rewrite=editor.rewrite, keep_calls=keep_calls, until=until)

            def run() -> Any:
                with stored.serving(clock):
                    return clock.stopping(lambda: self.pipe(**arguments))

            # Edits first: what is recorded is what they left.
            taps = [*editor.taps, *(recorder.taps if recorder else ())]
            with clock, call.context(self.pipe):
                output = self._tapped(run, clock, taps, [*stored.bypasses(clock), *editor.bypasses], editor.attentions)
            stored.check_asked(clock.step)
        fired = editor.finish()
        activations = recorder.finish() if recorder else Activations()
        video = shown(output) if decode else None
        return self._run(call, clock, video, activations, fired)

    def replay(
        self,
        call: DenoiserCall,
        record: Selector | Record | Iterable[Selector | Record] = (),
        edits: Edit | ReplaceLatents | Iterable[Edit | ReplaceLatents] = (),
        taps: Sequence[Tap] = (),
        bypasses: Sequence[Bypass] = (),
        attentions: Sequence[Attention] = (),
        resume: Resume | None = None,
        gradients: bool = False,
        limit_bytes: int = LIMIT_BYTES,
    ) -> Replay:
        """Make one denoiser call again, alone: no text is encoded, no other step runs, nothing is decoded.

        Args:
            call: one of `Run.calls`, of a run of this lens.
            record, edits: as for `run`; what belongs to other calls is not looked for. Edits of latents are for `run`.
            taps, bypasses, attentions: what an engine does on the way. The visitors of taps get the tensors themselves,
                with gradients those of the graph, of the rows of the call's branch.
            resume: where to start, and from which stored streams, instead of at the first block.
            gradients: whether to keep the graph, from the latents (or the streams of `resume`) to the velocity. Weights
                have no part in it.
            limit_bytes: as for `run`.

        Returns:
            The velocity, the same bits as the denoiser's output in the run where nothing is changed, and what was recorded.

        Raises:
            InputError: a selection matches nothing in this call, or the call cannot be made again.
        """
        obstacles.check(self.pipe, self.architecture.denoisers(self.pipe), reading=True, gradients=gradients)
        call.check_unchanged()
        denoiser, foreseen = self.architecture.denoisers(self.pipe)[call.expert], forecast_of(call)
        records, changes = as_records(record), as_edits(edits)
        elsewhere = [str(edit) for edit in changes if isinstance(edit, ReplaceLatents)]
        if elsewhere:
            raise InputError(f"{listed(elsewhere)} is between calls, and a call that is made again has its latents; use run()")
        if gradients:
            call, resume = with_leaves(call, resume)
        with self._alone(progress=False), differentiable(denoiser) if gradients else torch.no_grad():
            stored = Answers(starts(call, resume), foreseen, self.pipe, self.architecture)
            clock = clock_of(call, self.pipe, self.architecture)
            extent = self._extent(foreseen if resume is None else replace(foreseen, branches=(call.branch,)))
            recorder = Recorder(records, extent, self._width, limit_bytes) if records else None
            editor = self._editor(changes, extent, call.seeds, call.prompts, recorder)
            stored.check_reach([*editor.cells, *(recorder.cells if recorder else ())])
            editor.begin(clock)
            if recorder is not None:
                recorder.begin(clock)
            output = self._tapped(
                lambda: denoiser(*call.args, **call.kwargs),
                clock,
                [*of_branch(clock, call.branch, taps), *editor.taps, *(recorder.taps if recorder else ())],
                [*stored.bypasses(clock), *bypasses, *editor.bypasses],
                [*attentions, *editor.attentions],
            )
        editor.finish()
        activations = recorder.finish() if recorder else Activations()
        rows = sample_of(output).chunk(len(clock.shared))[clock.shared.index(call.branch)]
        return Replay(call, in_form_of(call.latents, rows), activations)

    def decode(
        self, latents: Float[Tensor, ...], rows: int | None = None
    ) -> Float[Tensor, "*batch video_frames video_height video_width 3"]:
        """Latents (of a run, or an x0-hat) as video in [0, 1], on the CPU.

        Args:
            latents: (..., channels, frames, height, width), on any device, scaled as the denoiser sees them.
            rows: how many to decode at a time; by default few on the CPU, and as many as `decoding.DECODED_LATENTS` holds on an
                accelerator.

        Raises:
            InputError: the pipeline's latents are scaled otherwise than by a mean and a deviation of each channel.
        """
        return decoding.decode(self.pipe, latents, rows)

    def encode(
        self, video: Float[Tensor, "batch frames height width 3"]
    ) -> Float[Tensor, "batch channels latent_frames latent_height latent_width"]:
        """Videos in [0, 1] as latents, scaled as the denoiser sees them: the most likely ones, on the CPU.

        Raises:
            InputError: as of `decode`.
        """
        return decoding.encode(self.pipe, video)

    def _tapped(
        self,
        function: Callable[[], Result],
        clock: Clock,
        taps: Sequence[Tap],
        bypasses: Sequence[Bypass] = (),
        attentions: Sequence[Attention] = (),
    ) -> Result:
        """Run a function with taps and the like in place; without any, no engine has a part in it."""
        if not (taps or bypasses or attentions):
            return function()
        return self._engine.call(function, *by_branch(clock, taps, bypasses, attentions))

    @cached_property
    def _engine(self) -> Engine:
        if self.engine == "hooks":
            return HookEngine(self.pipe, self.architecture)
        # Imported when a trace is first needed: it takes seconds, and it changes a few things for the whole process.
        from dit_lens.tracing import TracingEngine

        return TracingEngine(self.pipe, self.architecture)

    def _check_until(self, until: int | None, decode: bool, foreseen: Forecast) -> None:
        steps = len(foreseen.timesteps)
        if until is not None and not 0 <= until < steps:
            raise InputError(f"until={until} is no step of this run; write 0 to {steps - 1}")
        if until is not None and decode:
            raise InputError(f"a run until step {until} ends before there is a video; write decode=False")

    def _extent(self, foreseen: Forecast) -> Extent:
        """What there is to select from."""
        architecture, denoisers = self.architecture, self.architecture.denoisers(self.pipe)
        stacks = {name: tuple(block.stack for block in architecture.blocks(module)) for name, module in denoisers.items()}
        known = (architecture.guidance or Guidance()).branches
        return Extent(
            blocks={name: len(found) for name, found in stacks.items()},
            forecast=foreseen,
            branches=tuple(dict.fromkeys((*known, *foreseen.branches))),
            streams=architecture.streams,
            sites=architecture.sites,
            heads=architecture.heads(next(iter(denoisers.values()))),
            stacks=stacks,
        )

    @property
    def _width(self) -> int:
        """Channels of a visual token."""
        return self.architecture.width(next(iter(self.architecture.denoisers(self.pipe).values())))

    def _editor(
        self,
        edits: tuple[Edit | ReplaceLatents, ...],
        extent: Extent,
        seeds: tuple[int, ...],
        prompts: tuple[int, ...],
        recorder: Recorder | None,
    ) -> Editor:
        recorded = recorder.selections if recorder else ()
        return Editor(edits, extent, getattr(self.pipe, "scheduler", self.pipe), self._width, seeds, prompts, recorded)

    def _run(
        self,
        call: batching.Call,
        clock: StepClock,
        video: Tensor | None,
        activations: Activations,
        fired: Mapping[int, int],
    ) -> Run:
        assert clock.layout is not None
        steps = range(clock.step)
        branches = tuple(clock.branches)
        return Run(
            seeds=call.seeds,
            prompts=call.prompts,
            layout=clock.layout,
            scheduler=type(getattr(self.pipe, "scheduler", self.pipe)).__name__,
            timesteps=tuple(clock.timesteps),
            sigmas=torch.tensor(clock.sigmas, dtype=torch.float64).float(),
            experts=tuple(clock.experts),
            branches=branches,
            latents=torch.stack(clock.samples),
            outputs={name: torch.stack([clock.outputs[step, name] for step in steps]) for name in ("guided", *branches)},
            weights=tuple(clock.weights),
            video=video,
            activations=activations,
            fired=fired,
            text_tokens=clock.text_tokens,
            calls={place: replace(kept, seeds=call.seeds, prompts=call.groups) for place, kept in clock.calls.items()},
            sign=clock.sign,
            held=clock.held,
        )

    def _forecast(self, inputs: dict[str, Any]) -> Forecast:
        architecture = self._know(inputs)
        if architecture.loop is not None:
            key = tuple(sorted((name, settings_of(value)) for name, value in inputs.items()))
            if key not in self._forecasts:
                self._forecasts[key] = watch_loop(self.pipe, architecture, inputs)
            return self._forecasts[key]
        if architecture.guidance is not None:
            defaults = inspect.signature(type(self.pipe).__call__).parameters
            steps, scale = (inputs.get(name, defaults[name].default) for name in ("num_inference_steps", "guidance_scale"))
            return forecast(self.pipe, architecture, steps, scale)
        # What the pipeline makes of its arguments is seen where it begins; prompts and pictures have no part in it.
        settings = tuple(sorted((name, settings_of(value)) for name, value in inputs.items()))
        key = (settings, type(self.pipe.scheduler), repr(self.pipe.scheduler.config))
        if key not in self._outlines:
            with batching.beginning(self.pipe, inputs) as arguments:
                self._outlines[key] = outline(self.pipe, architecture.denoisers(self.pipe), arguments)
        seen = self._outlines[key]
        return forecast_with(self.pipe, architecture, seen.scheduler, seen.guidance)

    def _clock(self, foreseen: Forecast, inputs: Mapping[str, Any], **named: Any) -> StepClock:
        """The clock of a run."""
        if self.architecture.loop is not None:
            named["guidance"] = loop_guidance(foreseen)
            return LoopClock(self.pipe, self.architecture, guidance_scale(self.pipe, inputs), foreseen, **named)
        guidance = self.architecture.guidance or loop_guidance(foreseen)
        return StepClock(self.pipe, self.architecture, guidance=guidance, **named)

    @contextmanager
    def _alone(self, progress: bool) -> Iterator[None]:
        """One run of a pipeline at a time: the clock, the taps and nnsight all sit in the pipeline's own modules."""
        bar = {**getattr(self.pipe, "_progress_bar_config", {}), "disable": not progress}
        with one_at_a_time(self.pipe), replaced_attribute(self.pipe, "_progress_bar_config", bar):
            yield
