"""A toy experiment for the tests of what carries experiments: it measures squares, and can be made to stop half-way."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dit_lens.experiment import Context, Experiment, Part


@dataclass(frozen=True)
class Settings:
    """How many numbers to square."""

    count: int = 4
    places: tuple[float, ...] = (0, 1)


@dataclass
class Toy:
    """What the toy computed, and after how many units it is to stop."""

    computed: list[int] = field(default_factory=list)
    stop_after: int | None = None
    error: Callable[[], BaseException] = KeyboardInterrupt

    def square(self, number: int) -> Part:
        if self.stop_after is not None and len(self.computed) >= self.stop_after:
            raise self.error()
        self.computed.append(number)
        table = pd.DataFrame({"step": [number], "sigma": [1 / (1 + number)], "value": [number**2]})
        return Part(table, {"row": np.full((2, 3), number, dtype=np.float16)})

    def run(self, context: Context) -> pd.DataFrame:
        def job(number: int) -> Callable[[], Part]:
            return lambda: self.square(number)

        parts = context.units("squares", {f"n{i}": job(i) for i in range(context.settings.count)})
        assert all((part.arrays["row"] == i).all() for i, part in enumerate(parts.values()))
        results = pd.concat([part.table for part in parts.values()], ignore_index=True)
        figure = Figure()
        figure.subplots().plot(results["step"], results["value"])
        context.figure("curve", figure, "Squares", "Numbers & their <squares>.")
        context.film("film", np.zeros((2, 3, 4, 4, 3), dtype=np.uint8), ["one", "two"], "A film", "Nothing moves.")
        context.table("Numbers", results, "All of them.")
        return results

    def experiment(self) -> Experiment:
        presets = {"quick": Settings(), "full": Settings(count=6)}
        return Experiment("toy", "Toy", "Fig. 0", "What are the squares?", presets, self.run)
