"""How many cores BLAS uses for the matrix products of a sampler's steps."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from types import ModuleType

# From SOME multiplications in a step on, sharing its products may be quicker: steps that are repeated try that out,
# others share MANY.
SOME, MANY = 1 << 25, 1 << 28
# What is known of how long steps take moves to the last one by a part of the difference. That of the way not taken
# shrinks with each step, so that it is tried again, the later the slower it was.
NEWEST, FORGOTTEN = 1 / 4, 1 / 256


@dataclass
class Known:
    """Of steps of one size: seconds with one core and with all; which of the two the last one took."""

    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    taken: int | None = None


class Cores:
    """A setting of the process: BLAS leaves each product to one core, or shares it among all.

    Its threads wait for each other after each product, which takes long where another program keeps a core busy; and
    what the system calls cores may be threads of one.
    """

    def __init__(self, ops: ModuleType) -> None:
        self._ops = ops
        self._one, self._on_one = ExitStack(), False  # entered while steps on one core follow each other
        self._known: defaultdict[int, Known] = defaultdict(Known)

    def rest(self) -> None:
        """To be called where no step follows: products of others have all cores again."""
        self._one.close()

    @contextmanager
    def step(self, multiplications: int, repeated: bool) -> Iterator[None]:
        """To enter for a step of so many. repeated: whether steps like it follow each other: it is done as was quicker
        in the last ones of as many multiplications."""
        known = self._known[multiplications] if repeated and multiplications >= SOME else None
        shared = multiplications >= MANY if known is None else known.seconds[1] < known.seconds[0]
        if shared:
            self._one.close()
        elif not self._on_one:
            self._on_one = True
            self._one.enter_context(self._ops.on_one_core())
            self._one.callback(setattr, self, "_on_one", False)
        begin = perf_counter()
        yield
        if known is not None:
            taken, other = (1, 0) if shared else (0, 1)
            newest = NEWEST if taken == known.taken else 1
            known.seconds[taken] += newest * (perf_counter() - begin - known.seconds[taken])
            known.seconds[other] *= 1 - FORGOTTEN
            known.taken = taken
