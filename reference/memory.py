"""How much at once, and what the C library does with the memory that arrays leave behind."""

import ctypes
import sys

MICRO_BATCH_TOKENS = 2048  # about, that go through the layers together
CHUNK_TOKENS = 256  # of prompts that a step of sampling takes in where others decode, who must not wait
HEAD_BYTES = 32 << 20  # of logits that exist at once; with half of it the head of L takes a fifth longer
BATCH_INVARIANT = False  # whether training's products give a row the same bits in any batch, as sampling's do

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
KEPT = 1 << 30  # bytes of free memory at the end of the heap before some goes back to the system
LARGEST = 32 << 20  # bytes of an array up to which it comes from the heap; glibc takes no more

OutOfMemory = MemoryError  # what an op raises that finds no room for its output


def prepare(device: str | None = None) -> None:
    """To be called once in the thread that computes: let glibc keep what is freed for the next array.

    A forward and backward pass makes and drops hundreds of arrays of a few megabytes. By default each one is a
    mapping of its own, whose pages the system clears one by one, which takes a fifth of the pass's time. Where
    there is no glibc, nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def free_memory(device: str | None = None) -> int | None:
    """Bytes that new arrays can take, or None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
