"""What bench_ops.py measures: each op on the sizes of an 8B model, and who else can do the same work."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from minitinker import kernels
from minitinker.model.transformer import head_chunks

OURS = "minitinker"
EPS, SCALE = 1e-6, 2.0


@dataclass(frozen=True)
class Sizes:
    """tokens go through the layers, `lengths` is how they are packed; sequences decode, each after `past` keys."""

    tokens: int = 8192
    d: int = 4096
    ffn: int = 14_336
    vocab: int = 151_936
    rank: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 36
    lengths: tuple[int, ...] = (1024,) * 8
    ragged: tuple[int, ...] = (3000, 200, 1500, 64, 2048, 700, 460, 220)
    sequences: int = 64
    past: int = 2048
    head_bytes: int = kernels.HEAD_BYTES


SMALL = Sizes(12, 32, 48, 96, 4, 4, 2, 16, 1, (6, 6), (7, 4, 1), 3, 5, 4 * 96 * 5)


@dataclass(frozen=True)
class Contender:
    """run gets what prepare returns, which is not timed, and returns the arrays that all contenders agree on."""

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Work:
    """The first contender is minitinker. amount: bytes that have to be moved, or operations of the products."""

    name: str
    contenders: list[Contender]
    amount: float
    unit: str = "GB/s"  # or TFLOP/s
    agree: Callable[[Any, Any], bool] = field(default=lambda ours, theirs: close(ours, theirs))


def close(ours: Any, theirs: Any) -> bool:
    """Whether arrays differ by no more than rounding to their dtype does a few times over."""
    for one, other in zip(ours, theirs, strict=True):
        most = 2e-2 if torch.bfloat16 in (one.dtype, other.dtype) else 1e-4
        one, other = one.double(), other.double()
        if not (one - other).norm() <= most * other.norm():
            return False
    return True


def works(sizes: Sizes, dtype: torch.dtype, compiled: bool) -> Iterator[tuple[str, Callable[[], list[Work]]]]:
    """(op, what makes its works): the arrays of one op at a time. compiled: torch.compile takes part, too."""
    maker = Maker(sizes, dtype, compiled)
    for op in ("rms_norm", "rope", "swiglu", "lora_linear", "attention", "logprob", "sample", "adamw"):
        yield op, getattr(maker, op)


class Maker:
    """The methods are named after the ops."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, compiled: bool) -> None:
        self.sizes, self.dtype, self.compiled = sizes, dtype, compiled
        self.random = torch.Generator(kernels.DEVICE).manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self.random, device=kernels.DEVICE)
        return drawn.to(dtype or self.dtype)

    def torchs(self, function: Callable[..., Any], name: str = "torch eager") -> list[tuple[str, Any]]:
        """(name, function) as it is and, where that takes part, compiled."""
        eager = [(name, function)]
        compiled_name = name.replace("eager", "compiled")
        return [*eager, (compiled_name, torch.compile(function))] if self.compiled else eager

    def rms_norm(self) -> list[Work]:
        x, w = self.randn(self.sizes.tokens, self.sizes.d), self.randn(self.sizes.d)
        dy = self.randn(*x.shape)
        others = self.torchs(lambda x: functional.rms_norm(x, w.shape, w, EPS))
        if liger := installed("liger_kernel.transformers.functional"):
            others.append(("Liger", lambda x: liger.liger_rms_norm(x, w, EPS, in_place=False)))
        forward = [Contender(OURS, lambda _: kernels.rms_norm_forward(x, w, EPS)[:1])]
        saved = kernels.rms_norm_forward(x, w, EPS)[1]
        backward = [Contender(OURS, lambda _: (kernels.rms_norm_backward(dy, saved),))]
        return both("rms_norm", forward, backward, others, [x], [dy], (2 * size(x), 3 * size(x)))

    def rope(self) -> list[Work]:
        s = self.sizes
        q, k = (self.randn(s.tokens, heads, s.head_dim) for heads in (s.heads, s.kv_heads))
        dq, dk = self.randn(*q.shape), self.randn(*k.shape)
        positions = kernels.array(np.arange(s.tokens))
        frequencies = kernels.array(10_000.0 ** -np.linspace(0, 1, s.head_dim // 2, endpoint=False))
        cos, sin = kernels.rope_table(positions, frequencies)
        halves = [x[:, s.head_dim // 2 :] for x in (cos, sin)]

        def turn(x: torch.Tensor) -> torch.Tensor:
            (x1, x2), (c, s) = x.chunk(2, dim=-1), (half[:, None] for half in halves)
            return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1).to(x.dtype)

        others = self.torchs(lambda q, k: (turn(q), turn(k)))
        if liger := installed("liger_kernel.transformers.functional"):
            wide = [torch.cat([half, half], -1)[None] for half in halves]

            def liger_turn(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
                turned = liger.liger_rope(q[None].transpose(1, 2), k[None].transpose(1, 2), *wide)
                return [x.transpose(1, 2)[0] for x in turned]

            others.append(("Liger", liger_turn))
        saved = kernels.rope_forward(q, cos, sin)[1]
        forward = [Contender(OURS, lambda _: [kernels.rope_forward(x, cos, sin)[0] for x in (q, k)])]
        backward = [Contender(OURS, lambda _: [kernels.rope_backward(dx, saved) for dx in (dq, dk)])]
        moved = 2 * size(q, k) + 2 * size(*halves)
        return both("rope", forward, backward, others, [q, k], [dq, dk], (moved, moved))

    def swiglu(self) -> list[Work]:
        gate, up, dy = (self.randn(self.sizes.tokens, self.sizes.ffn) for _ in range(3))
        others = self.torchs(lambda gate, up: functional.silu(gate) * up)
        if liger := installed("liger_kernel.transformers.functional"):
            others.append(("Liger", liger.liger_swiglu))
        saved = kernels.swiglu_forward(gate, up)[1]
        forward = [Contender(OURS, lambda _: kernels.swiglu_forward(gate, up)[:1])]
        backward = [Contender(OURS, lambda _: kernels.swiglu_backward(dy, saved))]
        return both("swiglu", forward, backward, others, [gate, up], [dy], (3 * size(gate), 5 * size(gate)))

    def lora_linear(self) -> list[Work]:
        """Beside PEFT's arithmetic, and beside the frozen product alone, without A and B and their gradients."""
        s = self.sizes
        x, dy, w = self.randn(s.tokens, s.d), self.randn(s.tokens, s.d), self.randn(s.d, s.d) / s.d**0.5
        a, b = self.randn(1, s.rank, s.d) / s.d**0.5, self.randn(1, s.d, s.rank) / s.rank**0.5
        scale = kernels.array(np.array([SCALE], np.float32))

        def ours() -> Any:
            return kernels.lora_linear_forward(x, w, None, a, b, scale, None)

        def ours_both(_: Any) -> list[torch.Tensor]:
            y, saved = ours()
            return [y, *kernels.lora_linear_backward(dy, saved)]

        def peft(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, w) + functional.linear(functional.linear(x, a[0]), b[0]) * SCALE

        forward, backward = [Contender(OURS, lambda _: ours()[:1])], [Contender(OURS, ours_both)]
        for name, function in self.torchs(peft, "PEFT eager"):
            forward.append(Contender(name, lambda _, f=function: [f(x, a, b)]))
            backward.append(Contender(name, lambda _, f=function: with_gradients(f, [x, a, b], [dy])))
        forward.append(Contender("cuBLAS, W alone", lambda _: [x @ w.mT, w]))  # two: not to be compared
        backward.append(Contender("cuBLAS, W alone", lambda _: [x @ w.mT, dy @ w]))
        flops = 2 * x.numel() * s.d

        def agree(ours: Any, theirs: Any) -> bool:  # the frozen product alone is another function
            return len(theirs) != len(ours) or close(ours, theirs)

        return [
            Work("lora_linear forward", forward, flops, "TFLOP/s", agree),
            Work("lora_linear forward + backward", backward, 2 * flops, "TFLOP/s", agree),
        ]

    def attention(self) -> list[Work]:
        s = self.sizes
        found = [self._attention("attention", s.lengths), self._attention("ragged attention", s.ragged)]
        return [*found[0], *found[1], self._decoding()]

    def _attention(self, name: str, lengths: tuple[int, ...]) -> list[Work]:
        """torch gets the sequences padded, which is not timed, and may look at what it pads with."""
        s, n = self.sizes, np.array(lengths)
        starts, scale = np.cumsum(n) - n, s.head_dim**-0.5
        plan = kernels.attention_plan(starts, n, starts, n)
        q, k, v = (self.randn(n.sum(), heads, s.head_dim) for heads in (s.heads, s.kv_heads, s.kv_heads))
        do = self.randn(*q.shape)
        rows = torch.cat([torch.arange(m) + i * n.max() for i, m in enumerate(n)]).to(q.device)

        def padded(x: torch.Tensor) -> torch.Tensor:
            """(tokens, heads, head_dim) -> (sequences, heads, longest, head_dim)."""
            filled = x.new_zeros(len(n) * n.max(), *x.shape[1:])
            filled[rows] = x.detach()
            return filled.view(len(n), n.max(), *x.shape[1:]).transpose(1, 2)

        def packed(x: torch.Tensor) -> torch.Tensor:
            return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])[rows]

        def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def graph() -> Any:
            inputs = [padded(x).requires_grad_() for x in (q, k, v)]
            return sdpa(*inputs), inputs, padded(do)

        def agree(ours: Any, theirs: Any) -> bool:
            return close(ours, [packed(x) for x in theirs])

        saved = kernels.attention_forward(q, k, v, plan, scale)[1]
        once = [padded(x) for x in (q, k, v)]
        forward = [
            Contender(OURS, lambda _: kernels.attention_forward(q, k, v, plan, scale)[:1]),
            Contender("torch SDPA", lambda _: [sdpa(*once)]),
        ]
        backward = [
            Contender(OURS, lambda _: kernels.attention_backward(do, saved)),
            Contender("torch SDPA", lambda given: torch.autograd.grad(*given), graph),
        ]
        flops = 2 * float((n * (n + 1)).sum()) * s.heads * s.head_dim
        return [
            Work(f"{name} forward", forward, flops, "TFLOP/s", agree),
            Work(f"{name} backward", backward, 2.5 * flops, "TFLOP/s", agree),
        ]

    def _decoding(self) -> Work:
        s = self.sizes
        n = np.full(s.sequences, s.past)
        plan = kernels.attention_plan(np.arange(s.sequences), np.ones_like(n), np.cumsum(n) - n, n)
        q = self.randn(s.sequences, s.heads, s.head_dim)
        k, v = (self.randn(n.sum(), s.kv_heads, s.head_dim) for _ in range(2))
        keys, values = (x.view(s.sequences, s.past, *x.shape[1:]).transpose(1, 2) for x in (k, v))

        def sdpa(_: Any) -> list[torch.Tensor]:
            return [
                functional.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)[:, :, 0]
            ]

        ours = Contender(OURS, lambda _: kernels.attention_forward(q, k, v, plan, s.head_dim**-0.5)[:1])
        return Work("attention, decoding", [ours, Contender("torch SDPA", sdpa)], size(q, k, v, q))

    def logprob(self) -> list[Work]:
        """Logprobs of targets and the gradient of the states before a frozen head, for the loss -sum logprobs."""
        s = self.sizes
        h, w = self.randn(s.tokens, s.d), self.randn(s.vocab, s.d) / s.d**0.5
        targets = torch.randint(s.vocab, (s.tokens,), generator=self.random, device=h.device)
        net: Any = SimpleNamespace(
            ops=SimpleNamespace(HEAD_BYTES=s.head_bytes), config=SimpleNamespace(vocab_size=s.vocab)
        )

        def ours(_: Any) -> list[torch.Tensor]:
            loss, dh = torch.zeros((), device=h.device), torch.empty_like(h)
            for rows in head_chunks(net, len(h)):
                logits, saved_head = kernels.lora_linear_forward(h[rows], w, None, None, None, None, None)
                y, saved = kernels.logprob_forward(logits, targets[rows, None])
                dlogits = kernels.logprob_backward(torch.full_like(y, -1), saved)
                dh[rows] = kernels.lora_linear_backward(dlogits, saved_head)[0]
                loss -= y.sum()
            return [loss, dh]

        def eager(h: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(functional.linear(h, w).float(), targets, reduction="sum")

        others = self.torchs(eager)
        if liger := installed("liger_kernel.transformers"):
            fused = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")
            others.append(("Liger", lambda h: fused(w, h, targets)))
        if cce := installed("cut_cross_entropy"):
            others.append(
                ("cut_cross_entropy", lambda h: cce.linear_cross_entropy(h, w, targets, reduction="sum"))
            )
        contenders = [Contender(OURS, ours)]
        for name, function in others:
            contenders.append(Contender(name, lambda _, f=function: with_gradients(f, [h], [None])))
        flops = 4 * h.numel() * s.vocab
        return [Work("logprob with the head, forward + backward", contenders, flops, "TFLOP/s")]

    def sample(self) -> list[Work]:
        """torch draws with the same uniforms, sorting where something is cut, and in float32."""
        s = self.sizes
        logits = 3 * self.randn(s.sequences, s.vocab)
        uniforms = torch.rand(s.sequences, generator=self.random, device=logits.device).double()
        temperature = torch.full_like(uniforms, 0.8)

        def draw(_: Any, top_k: int, top_p: float) -> list[torch.Tensor]:
            p = torch.softmax(logits.float() / 0.8, -1)
            logprobs, order = p.log(), None
            if top_k > 0:
                p, order = p.sort(-1, descending=True)
                p[:, top_k:] = 0
                p = torch.where(p.cumsum(-1) - p < top_p * p.sum(-1, keepdim=True), p, 0)
                p = torch.zeros_like(p).scatter_(-1, order, p)  # the draw goes in the order of ids
            running = p.cumsum(-1)
            drawn = (uniforms[:, None] * running[:, -1:]).float()
            tokens = torch.searchsorted(running, drawn, right=True).clamp(max=s.vocab - 1)
            return [tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]]

        def agree(ours: Any, theirs: Any) -> bool:  # sums in float32 let some tokens slip by one
            same = ours[0] == theirs[0]
            return bool(same.float().mean() >= 0.6) and close([ours[1][same]], [theirs[1][same]])

        found = []
        for name, k, p in (("sample", -1, 1.0), ("sample, top_k 50, top_p 0.95", 50, 0.95)):
            top_k = torch.full_like(uniforms, k, dtype=torch.int64)
            top_p = torch.full_like(uniforms, p)
            given = (logits, uniforms, temperature, top_k, top_p)
            ours = Contender(OURS, lambda _, given=given: kernels.sample(*given))
            theirs = Contender("torch eager", lambda _, k=k, p=p: draw(_, k, p))
            found.append(Work(name, [ours, theirs], size(logits), agree=agree))
        return found

    def adamw(self) -> list[Work]:
        """The adapters of all linears of all layers, with a copy in the activations' dtype; torch has a tensor each,
        as PEFT gives it them, or one buffer as we have."""
        s = self.sizes
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        linears = [
            (s.d, q),
            (s.d, kv),
            (s.d, kv),
            (q, s.d),
            (s.d, s.ffn),
            (s.d, s.ffn),
            (s.ffn, s.d),
        ] * s.layers
        lengths = [s.rank * n for pair in linears for n in pair]
        start, grad = (self.randn(sum(lengths), dtype=torch.float32) for _ in range(2))
        options = {"lr": 1e-4, "eps": 1e-12, "weight_decay": 0.01}
        param, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        copy = torch.empty(len(start), dtype=self.dtype, device=start.device)

        def ours(_: Any) -> list[torch.Tensor]:
            kernels.adamw_(param, grad, m, v, copy, 1.0, 1, beta1=0.9, beta2=0.95, max_norm=0.0, **options)
            return [param, copy]

        def fused(name: str, pieces: list[int]) -> Contender:
            own, own_copy = start.clone(), torch.empty_like(copy)
            tensors, copies = list(own.split(pieces)), list(own_copy.split(pieces))
            for tensor, gradient in zip(tensors, grad.split(pieces), strict=True):
                tensor.grad = gradient
            optimizer = torch.optim.AdamW(tensors, betas=(0.9, 0.95), fused=True, **options)

            def step(_: Any) -> list[torch.Tensor]:
                optimizer.step()
                torch._foreach_copy_(copies, tensors)
                return [own, own_copy]

            return Contender(name, step)

        others = [
            fused("torch fused, a tensor each", lengths),
            fused("torch fused, one buffer", [len(start)]),
        ]
        moved = 7 * size(start) + size(copy)
        return [Work("adamw", [Contender(OURS, ours), *others], moved)]


def both(
    name: str,
    forward: list[Contender],
    backward: list[Contender],
    others: list[tuple[str, Callable[..., Any]]],
    inputs: list[torch.Tensor],
    douts: list[torch.Tensor],
    moved: tuple[float, float],
) -> list[Work]:
    """Works of a forward and of its backward alone, with autograd functions added to our contenders. Some of those
    write over their inputs or over dout, so each turn gets copies, untimed, as is the forward before a backward."""

    def fresh() -> list[torch.Tensor]:
        return [x.clone() for x in inputs]

    for label, function in others:

        def graph(f: Callable[..., Any] = function) -> Any:
            leaves = [x.requires_grad_() for x in fresh()]
            return f(*(x.view_as(x) for x in leaves)), leaves, [dout.clone() for dout in douts]

        forward.append(Contender(label, lambda given, f=function: listed(f(*given)), fresh))
        backward.append(Contender(label, lambda given: torch.autograd.grad(*given), graph))
    return [
        Work(f"{name} {direction}", contenders, amount)
        for direction, contenders, amount in zip(
            ("forward", "backward"), (forward, backward), moved, strict=True
        )
    ]


def with_gradients(
    function: Callable[..., Any], inputs: list[torch.Tensor], douts: Any
) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad([out], leaves, douts)]


def listed(x: Any) -> list[torch.Tensor]:
    return [x] if isinstance(x, torch.Tensor) else list(x)


def size(*arrays: torch.Tensor) -> float:
    """In bytes."""
    return float(sum(x.numel() * x.element_size() for x in arrays))


def installed(name: str) -> Any:
    """The module, or None where it is not there or there is no GPU for it."""
    if not torch.cuda.is_available() or importlib.util.find_spec(name.partition(".")[0]) is None:
        return None
    return importlib.import_module(name)
