"""Where the GPU's time goes: the kernels of a profiled stretch of code, by kind."""

import re
from collections import defaultdict
from contextlib import contextmanager

import torch
from torch.autograd import DeviceType

# (kind, parts of a kernel's name), asked in this order; what matches none is elementwise work: copies, casts, sums.
KINDS = (
    ("transfer", ("memcpy htod", "memcpy dtoh", "memcpy (htod", "memcpy (dtoh")),
    ("dequantize", ("kdequantize", "kquantize", "dequantize_blockwise", "nf4_dequant")),
    ("optimizer", ("koptimizer", "kpreconditionoptimizer", "multi_tensor_apply", "nonfinite", "non_finite")),
    ("attention", ("fmha", "flash", "attention", "_efficient_")),
    ("matmul", ("gemm", "gemv", "xmma", "nvjet", "cublas", "cutlass", "splitk", "wgmma", "_mma_")),
    (
        "fused",  # Triton kernels: Liger's, trl's output head, those of torch.compile, Unsloth's
        ("_rms_norm_", "_swiglu_", "rope", "cross_entropy", "element_mul_kernel", "triton_", "_forward_kernel")
        + ("_backward_kernel", "_geglu_", "_rms_layernorm_", "_fg_kernel", "_dfg_kernel"),
    ),
)
LIGER = ("rms_norm", "swiglu", "rope")  # every name must occur among the kernels where Liger is said to run


def kind_of(name: str) -> str:
    """The kind of a kernel: matmul, dequantize, attention, fused, optimizer, transfer, elementwise."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), "elementwise")


class Times:
    """Kernel times of one profiled stretch; all in milliseconds.

    `busy` is the time in which at least one kernel runs (transfers to and from the host left out: they may overlap);
    `by_kind` sums kernels by kind; `by_name` maps a kernel's name to [milliseconds, launches].
    """

    def __init__(self, events: list[tuple[str, int, int]]):
        self.by_kind, self.by_name = defaultdict(float), defaultdict(lambda: [0.0, 0])
        self.launches = len(events)
        spans = []
        for name, start, length in events:
            kind = kind_of(name)
            self.by_kind[kind] += length / 1e6
            self.by_name[name][0] += length / 1e6
            self.by_name[name][1] += 1
            if kind != "transfer":
                spans.append((start, start + length))
        self.busy, end = 0.0, 0
        for first, last in sorted(spans):
            self.busy += max(0, last - max(first, end)) / 1e6
            end = max(end, last)

    def top(self, count: int = 30) -> list[list]:
        """The longest kernels as [name, milliseconds, launches]."""
        names = sorted(self.by_name, key=lambda n: -self.by_name[n][0])[:count]
        return [[name[:100], round(self.by_name[name][0], 3), self.by_name[name][1]] for name in names]


@contextmanager
def profiled(into: list):
    """Append the `Times` of the block to `into`. Without a GPU it appends nothing."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        yield
        torch.cuda.synchronize()
    into.append(Times(_events(profile)))


def _events(profile) -> list[tuple[str, int, int]]:
    """(name, start, length) in nanoseconds of what ran on the GPU."""
    # Without torch's own event tree, which takes seconds for 14,000 kernels.
    on_gpu = [e for e in profile.profiler.kineto_results.events() if e.device_type() == DeviceType.CUDA]
    found = [(e.name(), e.start_ns(), e.duration_ns()) for e in on_gpu]
    return [event for event in found if is_work(event[0])]


def is_work(name: str) -> bool:
    """Whether it is a kernel or a copy, and no annotation ("Optimizer.step#AdamW.step") and no synchronization.

    Kernels have a # in their names, too ("...{lambda(float)#1}...").
    """
    return not re.fullmatch(r"[\w.]+#[\w.]+", name) and " Sync" not in name and "Event" not in name
