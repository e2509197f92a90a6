"""Patterns: a row of sizes or colours that repeats every two or three objects; draw the next one.

After "A B A" both "B" (a period of two) and "A" (a period of three) are legal, so that part of the samples has two answers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, UInt8

from dit_lens.reasoner.board import OBJECT_COLOURS, SHAPES, SQUARES, Colour, blank, stamp
from dit_lens.reasoner.tasks.base import Answer, Sample, Score, Task, kept, reveal

SIZES: dict[str, Bool[np.ndarray, "3 3"]] = {
    "small": np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=bool),
    "medium": np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0]], dtype=bool),
    "large": np.ones((3, 3), dtype=bool),
}
COLOURS: dict[str, Colour] = {**OBJECT_COLOURS, "white": Colour.WHITE, "cyan": Colour.CYAN}
"""Colours of objects here; no prompt names them."""
COLUMNS = 4
PITCH = 4
"""Objects per row, and squares from one to the next."""
MARKER = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 1]], dtype=bool)
"""Grey corners where the next object goes."""
PERIODS = (2, 3)
AMBIGUOUS = 0.4
"""Share of samples with two legal answers."""


@dataclass(frozen=True)
class Sequence:
    """Symbols in reading order. Sizes are squares of one `fixed` colour; colours are objects of one `fixed` shape."""

    kind: str
    symbols: tuple[str, ...]
    fixed: str
    top: int
    """Row of the first line of objects, in squares."""


def continuations(symbols: tuple[str, ...]) -> tuple[str, ...]:
    """The next symbol under every period of two or three that the symbols allow, each once."""
    legal = {
        symbols[-period]
        for period in PERIODS
        if len(symbols) >= period and all(symbols[i] == symbols[i - period] for i in range(period, len(symbols)))
    }
    return tuple(sorted(legal))


@cache
def sequences(kind: str) -> dict[int, tuple[tuple[str, ...], ...]]:
    """Every sequence of three to seven symbols with a period of two or three, by the number of its legal continuations."""
    alphabet = list(SIZES) if kind == "size" else list(COLOURS)
    found: dict[int, set[tuple[str, ...]]] = {1: set(), 2: set()}
    for period in PERIODS:
        for unit in itertools.product(alphabet, repeat=period):
            if len(set(unit)) > 1:
                for length in range(3, 8):
                    symbols = tuple(itertools.islice(itertools.cycle(unit), length))
                    found[len(continuations(symbols))].add(symbols)
    return {count: tuple(sorted(each)) for count, each in found.items()}


class PatternTask(Task):
    """Continue a sequence; where two rules fit, either is legal (superposition)."""

    name = "pattern"
    wordings = (
        "Continue the {kind} pattern: draw the next object.",
        "The {kind}s repeat every two or three objects. Fill in the marked place.",
        "Which {kind} comes next? Complete the sequence.",
        "Complete the row of objects according to its {kind} pattern.",
    )

    def generate(self, random: np.random.Generator) -> Sequence:
        kind = ("size", "colour")[random.integers(2)]
        group = sequences(kind)[2 if random.random() < AMBIGUOUS else 1]
        symbols = group[random.integers(len(group))]
        fixed = list(COLOURS if kind == "size" else SHAPES)
        return Sequence(kind, symbols, fixed[random.integers(len(fixed))], int(random.integers(0, SQUARES - 2 * PITCH + 1)))

    def solve(self, puzzle: Sequence) -> tuple[Answer, ...]:
        return continuations(puzzle.symbols)

    def words(self, puzzle: Sequence) -> dict[str, str]:
        return {"kind": puzzle.kind}

    def vocabulary(self) -> list[dict[str, str]]:
        return [{"kind": "size"}, {"kind": "colour"}]

    def canonical(self, puzzle: Sequence) -> bytes:
        # The row at which the pattern stands does not make another puzzle.
        return repr((puzzle.kind, puzzle.symbols, puzzle.fixed)).encode()

    def _first(self, puzzle: Sequence) -> UInt8[np.ndarray, "16 16"]:
        picture = blank()
        for place, symbol in enumerate(puzzle.symbols):
            stamp(picture, *_object(puzzle, symbol, place))
        stamp(picture, MARKER, *_corner(puzzle, len(puzzle.symbols)), Colour.GREY)
        return picture

    def draw(self, puzzle: Sequence, answer: Answer, frames: int) -> UInt8[np.ndarray, "frames 16 16"]:
        glyph, row, column, colour = _object(puzzle, str(answer), len(puzzle.symbols))
        # The marker's corners go as the object is drawn over them, so every square of the place is a square of the stroke.
        stroke = [(row + y, column + x, colour if glyph[y, x] else int(Colour.BLACK)) for y in range(3) for x in range(3)]
        return reveal(self._first(puzzle), [stroke], frames)

    def masks(self, puzzle: Sequence) -> dict[str, Bool[np.ndarray, "16 16"]]:
        first = self._first(puzzle)
        answer = np.zeros((SQUARES, SQUARES), dtype=bool)
        row, column = _corner(puzzle, len(puzzle.symbols))
        answer[row : row + 3, column : column + 3] = True
        sequence = (first != Colour.BLACK) & ~answer
        return {"sequence": sequence, "answer": answer, "background": ~sequence & ~answer}

    def wrong(self, puzzle: Sequence, random: np.random.Generator) -> Answer:
        """A symbol of the alphabet that continues no legal period."""
        alphabet = SIZES if puzzle.kind == "size" else COLOURS
        return str(random.choice([s for s in alphabet if s not in continuations(puzzle.symbols)]))

    def alphabet(self, puzzle: Sequence) -> tuple[Answer, ...]:
        """Every symbol that could be drawn, legal or not."""
        return tuple(SIZES if puzzle.kind == "size" else COLOURS)

    def judge(self, boards: UInt8[np.ndarray, "frames 16 16"], sample: Sample) -> Score:
        """The symbol at the marked place in the last frame: right if it is a legal continuation and the sequence is unchanged."""
        last, puzzle = boards[-1], sample.puzzle
        row, column = _corner(puzzle, len(puzzle.symbols))
        place = last[row : row + 3, column : column + 3]
        alphabet = SIZES if puzzle.kind == "size" else COLOURS
        wrong = {}
        for symbol in alphabet:
            glyph, _, _, colour = _object(puzzle, symbol, len(puzzle.symbols))
            wrong[symbol] = int((place != np.where(glyph, colour, Colour.BLACK)).sum())
        symbol = min(wrong, key=lambda s: wrong[s])
        if wrong[symbol] > 1:
            return Score(False, None, None, "nothing that belongs to the pattern was drawn")
        if symbol not in sample.answers:
            return Score(False, symbol, None, "does not continue the pattern")
        if not kept(last, self._first(puzzle), ~sample.masks["answer"]):
            return Score(False, symbol, None, "the sequence changed")
        return Score(True, symbol, sample.answers.index(symbol))


def _corner(puzzle: Sequence, place: int) -> tuple[int, int]:
    row, column = divmod(place, COLUMNS)
    return puzzle.top + PITCH * row, PITCH * column


def _object(puzzle: Sequence, symbol: str, place: int) -> tuple[Bool[np.ndarray, "3 3"], int, int, int]:
    """Glyph, row, column and colour of a symbol at a place."""
    if puzzle.kind == "size":
        return SIZES[symbol], *_corner(puzzle, place), int(COLOURS[puzzle.fixed])
    return SHAPES[puzzle.fixed], *_corner(puzzle, place), int(COLOURS[symbol])
