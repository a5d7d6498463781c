"""Every op of a LoRA transformer in Triton, forward and backward: the equations of `reference/`, to be fast.

    op_forward(inputs..., scalars...) -> (out, saved)
    op_backward(dout, saved) -> gradients, in the order of the forward's arguments, frozen inputs left out
    op(...) -> out              no gradient
    op_(...) -> None            writes in place

`saved` is opaque: only its own backward unpacks it. Arrays are torch tensors, which torch only allocates: weights
and activations bfloat16 or float32, an adapter's gradients and moments float32; float64 goes too, for gradient
checks. Sums are formed in float32 (in float64 for float64).

Each row's bits depend on that row alone: the tiles in which a sum is formed are fixed by the shapes of the
weights, never by the batch; there are no atomics and no autotuning.
"""

from .adamw import adamw_, global_norm
from .array import DEVICE, DTYPE, array, place, to_numpy, zeros
from .attention import attention_backward, attention_forward, attention_plan, decoding_plan
from .embedding import embedding
from .logprob import logprob_backward, logprob_forward
from .lora_linear import (
    lora_linear_backward,
    lora_linear_forward,
    lora_panels,
    lora_weight,
)
from .memory import (
    BATCH_INVARIANT,
    CHUNK_TOKENS,
    HEAD_BYTES,
    MICRO_BATCH_TOKENS,
    OutOfMemory,
    free_memory,
    prepare,
)
from .replay import Replays
from .rms_norm import rms_norm_backward, rms_norm_forward
from .rope import rope_backward, rope_forward, rope_table
from .sample import sample, tempered_logprob
from .side_by_side import on_one_core, side_by_side, width
from .swiglu import swiglu_backward, swiglu_forward

__all__ = [
    "BATCH_INVARIANT",
    "CHUNK_TOKENS",
    "DEVICE",
    "DTYPE",
    "HEAD_BYTES",
    "MICRO_BATCH_TOKENS",
    "OutOfMemory",
    "Replays",
    "adamw_",
    "array",
    "attention_backward",
    "attention_forward",
    "attention_plan",
    "decoding_plan",
    "embedding",
    "free_memory",
    "global_norm",
    "logprob_backward",
    "logprob_forward",
    "lora_linear_backward",
    "lora_linear_forward",
    "lora_panels",
    "lora_weight",
    "on_one_core",
    "place",
    "prepare",
    "rms_norm_backward",
    "rms_norm_forward",
    "rope_backward",
    "rope_forward",
    "rope_table",
    "sample",
    "side_by_side",
    "swiglu_backward",
    "swiglu_forward",
    "tempered_logprob",
    "to_numpy",
    "width",
    "zeros",
]
