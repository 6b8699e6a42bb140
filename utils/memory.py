"""Memory that is held: of the GPU by torch's count, of this process by the system's. GiB throughout."""

import gc
import sys

GIB = 2**30


def allocated() -> float:
    """GiB of tensors on the GPU now; 0 without one."""
    import torch

    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def peak() -> tuple[float, float]:
    """Most allocated since `reset_peak`, and most reserved: GiB."""
    import torch

    if not torch.cuda.is_available():
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def process_peak() -> float:
    """Most memory that this process has held, in GiB; 0 where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def reset_peak() -> None:
    """Let `peak` begin anew."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def free() -> None:
    """Give unused memory back to the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
