"""How many cores BLAS uses for the matrix products of a sampler's steps."""

from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from types import ModuleType

# Sharing the products of a step may be quicker if it has SOME multiplications or more. Steps that are repeated try that
# out; one that is not shares them if it has MANY.
SOME, MANY = 1 << 25, 1 << 28
NEWEST = 1 / 4  # how much a step counts in the running mean
OUTLIER = 2  # times the mean, which is all that counts of a longer step
FORGOTTEN = 1 / 256  # by how much the mean of the way not taken shrinks with each step


@dataclass
class Known:
    """Of steps that are alike: the running means of their seconds with one core and with all, and which of the two the
    last step took. The smaller one is taken; 0 where there was no step yet. The other one shrinks, so that it is tried
    again, the later the slower it was."""

    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    taken: int | None = None

    def note(self, taken: int, seconds: float) -> None:
        mean = self.seconds[taken]
        if taken == self.taken and mean > 0:
            seconds = mean + NEWEST * (min(seconds, OUTLIER * mean) - mean)
        self.seconds[taken] = seconds
        self.seconds[1 - taken] *= 1 - FORGOTTEN
        self.taken = taken


class Cores:
    """A setting of the process: BLAS leaves each product to one core, or shares it among all.

    Its threads wait for each other after each product, which takes long where another program keeps a core busy; and
    what the system calls cores may be threads of one.
    """

    def __init__(self, ops: ModuleType) -> None:
        self._ops = ops
        self._one, self._on_one = ExitStack(), False
        self._known: defaultdict[Hashable, Known] = defaultdict(Known)

    def rest(self) -> None:
        """To be called where no step follows: a step on one core leaves BLAS there for the next one."""
        self._one.close()
        self._on_one = False

    @contextmanager
    def step(self, multiplications: int, alike: Hashable = None) -> Iterator[None]:
        """To enter for a step. alike: what else steps have in common that take about as long; None where it is not
        repeated. One that raises is not counted."""
        tried = alike is not None and multiplications >= SOME
        known = self._known[multiplications.bit_length(), alike] if tried else None
        shared = multiplications >= MANY if known is None else known.seconds[1] < known.seconds[0]
        if shared:
            self.rest()
        elif not self._on_one:
            self._one.enter_context(self._ops.on_one_core())
            self._on_one = True
        begin = perf_counter()
        yield
        if known is not None:
            known.note(int(shared), perf_counter() - begin)
