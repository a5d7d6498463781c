"""How much at once, and what a GPU has room for."""

import torch

from .array import DEVICE, INTERPRETED

MICRO_BATCH_TOKENS = 16_384  # about, that go through the layers together
CHUNK_TOKENS = 8192  # of prompts that a step of sampling takes in where others decode; fewer take as long
HEAD_BYTES = 1 << 30  # of logits that exist at once, counted in float32
BATCH_INVARIANT = True  # whether training's products give a row the same bits in any batch, as sampling's do

OutOfMemory = torch.OutOfMemoryError  # what an op raises that finds no room for its output


def prepare(device: str | None = None) -> None:
    """To be called once in the thread that computes: kernels are launched on this thread's current device."""
    if not INTERPRETED:
        torch.cuda.set_device(device or DEVICE)


def free_memory(device: str | None = None) -> int | None:
    """Bytes that new arrays can take, or None where there is no GPU to ask."""
    if INTERPRETED:
        return None
    free, _ = torch.cuda.mem_get_info(device or DEVICE)
    cached = torch.cuda.memory_reserved(device or DEVICE) - torch.cuda.memory_allocated(device or DEVICE)
    return int(free + cached)
