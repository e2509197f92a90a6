"""The command line. Every command ends with 0, or with 2 and one line that says what was wrong and what to write.

dit-lens reproduce --preset quick        every experiment, and the report
dit-lens run step-lens --samples 8       one experiment, its settings as options
dit-lens list | describe MODEL | check MODEL | report DIR
"""

import io
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm.auto import tqdm

from dit_lens import files
from dit_lens.claims import as_table
from dit_lens.errors import InputError, listed
from dit_lens.experiment import Experiment, experiments, read_manifest, run_experiment
from dit_lens.report import check_results, duration, write_report
from dit_lens.side_by_side import Ended, Job, side_by_side

ModelName = Annotated[str, tyro.conf.arg(help="reasoner (bundled), the folder of a pipeline, or a hub id")]


@dataclass(frozen=True)
class ModelOptions:
    """How to load a model, and what to override in its calls (a foreign model needs its own size and steps)."""

    model: ModelName = "reasoner"
    engine: Literal["nnsight", "hooks"] = "nnsight"
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None

    def load(self) -> Any:
        """The lens."""
        import torch

        from dit_lens.lens import load

        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"no device {self.device!r} here ({str(error).splitlines()[0]}): write cpu or cuda") from error
        return load(self.model, engine=self.engine, device=self.device, dtype=getattr(torch, self.dtype))

    def arguments(self) -> dict[str, Any]:
        """The pipeline arguments that were given."""
        names = ("height", "width", "num_inference_steps", "guidance_scale")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class CheckOptions(ModelOptions):
    """Check a model. What is not given is chosen from what its pipeline takes; its sizes are its own.

    Attributes:
        prompt, negative_prompt: what to ask for, and for what not. class_label: for models of classes.
        image: the file of a picture to start from. num_frames: of a video.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    class_label: int | None = None
    image: Path | None = None
    num_frames: int | None = None

    def inputs(self) -> dict[str, Any]:
        """The pipeline's arguments, as far as they are known; the bundled model gets a maze."""
        from PIL import Image, UnidentifiedImageError

        found: dict[str, Any] = {}
        if self.model == "reasoner":
            from dit_lens import reasoner

            found |= {**reasoner.task("maze").sample("test", 0).inputs, "num_inference_steps": 3}
        names = ("prompt", "negative_prompt", "num_frames")
        found |= {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.class_label is not None:
            found["class_labels"] = [self.class_label]
        if self.image is not None:
            try:
                found["image"] = Image.open(self.image).convert("RGB")
            except (OSError, UnidentifiedImageError) as error:
                raise InputError(f"no picture {self.image}: {error}") from None
        return {**found, **self.arguments()}


@dataclass(frozen=True)
class ExperimentOptions(ModelOptions):
    """Options of all that runs experiments. With ``tf32``, a GPU multiplies float32 matrices in TF32 (a third less time)."""

    tf32: bool = True

    def load(self) -> Any:
        import torch

        lens = super().load()
        if lens.pipe.device.type == "cuda":
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        return lens


@dataclass(frozen=True)
class ReproduceOptions(ExperimentOptions):
    """Run every experiment, or those named, and write the report. With ``jobs``, so many of them run at the same time, each in a
    process of its own: one alone leaves a GPU idle for much of the time."""

    preset: str = "quick"
    only: tuple[str, ...] = ()
    out: Path = Path("out")
    jobs: int = 1


@dataclass(frozen=True)
class RunOptions(ExperimentOptions):
    """Run one experiment. Its settings are options too: see dit-lens run EXPERIMENT --help."""

    preset: str = "quick"
    out: Path = Path("out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 where a check failed, 2 for wrong input, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Before transformers is imported: it would say on stderr what is not installed and not needed here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if not given or given[0] in ("-h", "--help"):
            print(USAGE)
            return 0
        return COMMANDS[_known("command", given[0], COMMANDS)](given[1:])
    except InputError as error:
        print(f"dit-lens: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dit-lens: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def reproduce(given: list[str]) -> int:
    options = _parsed(ReproduceOptions, given, "dit-lens reproduce")
    known = experiments()
    chosen = [known[_known("experiment", name, known)] for name in options.only or known]
    settings = [experiment.preset(options.preset) for experiment in chosen]
    if options.jobs < 1:
        raise InputError(f"--jobs {options.jobs}: write 1 or more")
    check_results(options.out, but=[experiment.name for experiment in chosen])
    if options.jobs > 1:
        return _run_side_by_side(chosen, options)
    _run([*zip(chosen, settings, strict=True)], options, ["reproduce", *given])
    return 0


def run(given: list[str]) -> int:
    known = experiments()
    if not given or given[0] in ("-h", "--help"):
        print(f"usage: dit-lens run EXPERIMENT [options]\n\nexperiments: {', '.join(known)}")
        return 0
    experiment = known[_known("experiment", given[0], known)]
    prog = f"dit-lens run {experiment.name}"
    wanted = [argument for argument in given[1:] if argument not in ("-h", "--help")]
    options, rest = _parsed(RunOptions, wanted, prog, return_unknown_args=True)
    if wanted != given[1:]:
        print(f"usage: {prog} [options] [settings]\n\nThe options are those of dit-lens reproduce; the settings:\n")
        rest = ["--help"]
    preset = experiment.preset(options.preset)
    settings = _parsed(type(preset), rest, prog, default=preset)
    _run([(experiment, settings)], options, ["run", *given])
    return 0


def list_(given: list[str]) -> int:
    _arguments(given, "list")
    for name, experiment in experiments().items():
        took = f" (full: about {experiment.minutes:g} min on a data-centre GPU)" if experiment.minutes else ""
        print(f"{name}\n  {experiment.question}\n  {experiment.source}\n  presets: {', '.join(experiment.presets)}{took}")
    return 0


def describe(given: list[str]) -> int:
    print(_model_options(given, "describe").load().describe())
    return 0


def check(given: list[str]) -> int:
    options = _model_options(given, "check", CheckOptions)
    inputs, lens = options.inputs(), options.load()
    print("Some ten short runs, and thirty to a hundred calls of each denoiser: minutes for a large model.", file=sys.stderr)
    report = lens.check(**inputs)
    print(report)
    return 0 if report.passed else 1


def report(given: list[str]) -> int:
    (folder,) = _arguments(given, "report", "DIR")
    print(write_report(Path(folder)))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "reproduce": reproduce,
    "run": run,
    "list": list_,
    "describe": describe,
    "check": check,
    "report": report,
}

USAGE = """\
usage: dit-lens COMMAND [options]

  reproduce        run every experiment (or --only NAME ...) and write report.html
  run EXPERIMENT   run one experiment; its settings are options
  list             the experiments and their presets
  describe MODEL   what the lens sees in a model: experts, blocks, streams, sites, guidance, schedule
  check MODEL      check on a short run that the lens sees a model truly
  report DIR       write report.html from the results in a folder

Models: reasoner (bundled), the folder of a diffusers pipeline, or a hub id. dit-lens COMMAND --help says more."""


def _run(chosen: list[tuple[Experiment, Any]], options: ReproduceOptions | RunOptions, given: list[str]) -> None:
    """Runs experiments with their settings, then writes the report of the folder."""
    files.check_writable(options.out)
    lens = options.load()
    command = shlex.join(["dit-lens", *given])
    verdicts: list[dict[str, Any]] = []
    for experiment, settings in chosen:
        manifest = run_experiment(
            experiment,
            lens,
            options.out,
            preset=options.preset,
            settings=settings,
            arguments=options.arguments(),
            command=command,
        )
        # After each, so that what is finished can be looked at while the rest goes on.
        page = write_report(options.out)
        print(f"{experiment.name}: {duration(manifest['wall_seconds'])}, see {page}")
        verdicts += manifest["claims"]
    if verdicts:
        print(f"\n{verdict_table(verdicts)}")


def _run_side_by_side(chosen: list[Experiment], options: ReproduceOptions) -> int:
    """Runs experiments as `_run` does, several at a time."""
    files.check_writable(options.out)
    words = _words(RunOptions(**{field.name: getattr(options, field.name) for field in fields(RunOptions)}))

    def job(experiment: Experiment) -> Job:
        command = (sys.executable, "-m", "dit_lens.cli", "run", experiment.name, *words)
        return Job(experiment.name, command, options.out / "logs" / f"{experiment.name}.txt", tuple(experiment.after))

    with tqdm(total=len(chosen), desc=f"experiments, {options.jobs} at a time", unit="experiment") as bar:

        def ended(one: Ended) -> None:
            manifest = read_manifest(options.out / one.job.name)
            if not one.code and manifest:
                tqdm.write(f"{one.job.name}: {duration(manifest['wall_seconds'])}, see {write_report(options.out)}")
            bar.update()

        failed = side_by_side([job(experiment) for experiment in _longest_first(chosen)], options.jobs, ended)
    for one in failed:
        print(f"dit-lens: {one.job.name} ended with {one.code}: {one.last_line} (all it said: {one.job.log})", file=sys.stderr)
    manifests = (read_manifest(options.out / experiment.name) for experiment in chosen)
    verdicts = [claim for manifest in manifests if manifest for claim in manifest["claims"]]
    if verdicts and not failed:
        print(f"\n{verdict_table(verdicts)}")
    return max((abs(one.code) for one in failed), default=0)


def _longest_first(chosen: Sequence[Experiment]) -> list[Experiment]:
    """By the minutes of each and of what waits for it, so that nothing long is left to run alone at the end."""

    def minutes(one: Experiment) -> float:
        return one.minutes + max((minutes(other) for other in chosen if one.name in other.after), default=0)

    return sorted(chosen, key=minutes, reverse=True)


def _words(options: RunOptions) -> list[str]:
    """What to write on the command line for these options."""
    words = []
    for field in fields(options):
        value, name = getattr(options, field.name), field.name.replace("_", "-")
        if value != field.default:
            words += [f"--{name}", str(value)] if value is not False else [f"--no-{name}"]
    return words


def verdict_table(verdicts: Sequence[dict[str, Any]]) -> str:
    """Claims and their verdicts as lines of text."""
    table = as_table(verdicts)
    table["statement"] = [textwrap.shorten(statement, 90, placeholder=" ...") for statement in table["statement"]]
    names = ["claim", "verdict", "committed full run", "statement"]
    width = {name: max(len(name), *table[name].str.len()) for name in names}
    rows = [names, *table[names].to_numpy().tolist()]
    return "\n".join("  ".join(f"{cell:<{width[name]}}" for name, cell in zip(names, row, strict=True)).rstrip() for row in rows)


def _model_options(given: list[str], command: str, kind: Any = ModelOptions) -> Any:
    """Options of a command that takes a model as its first word."""
    if given and not given[0].startswith("-"):
        given = ["--model", *given]
    return _parsed(kind, given, f"dit-lens {command} MODEL")


def _parsed(kind: Any, given: list[str], prog: str, **how: Any) -> Any:
    """Options as a dataclass. What tyro says of wrong ones, in a box of several lines, becomes one InputError."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(kind, args=given, prog=prog, **how)
    except SystemExit as end:
        if not end.code:
            raise
        _title, *lines = re.sub(r"\x1b\[[0-9;]*m|[\u2500-\u257f]+", " ", said.getvalue()).splitlines()
        raise InputError(" ".join(lines)) from None


def _arguments(given: list[str], command: str, *names: str) -> list[str]:
    """Exactly the named words."""
    if len(given) != len(names) or any(word.startswith("-") for word in given):
        raise InputError(f"write: {' '.join(['dit-lens', command, *names])}")
    return given


def _known(kind: str, name: str, known: dict[str, Any]) -> str:
    """A name that exists, or an InputError with what there is and what is nearest."""
    if name in known:
        return name
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"no {kind} {name!r}; there are {listed(known)}{hint}")


if __name__ == "__main__":
    sys.exit(main())
