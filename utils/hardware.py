"""The machine: which GPU and dtype, which of several processes this is, and what memory is held.

Memory is in GiB throughout: of the GPU by torch's count, of this process by the system's.
"""

import gc
import os
import sys
from functools import cache
from importlib.util import find_spec

from utils.runtime import Stop

GIB = 2**30
T4_GIB = 14.12  # for torch's tensors, of the 14.5 that a program in Colab has


def capability() -> tuple[int, int] | None:
    """Compute capability of the GPU in use, or None without one. QLORA_CAPABILITY=7.5 forces a T4's."""
    if forced := os.environ.get("QLORA_CAPABILITY"):
        try:
            major, minor = (int(part) for part in forced.split("."))
        except ValueError:
            raise Stop(f"QLORA_CAPABILITY={forced} is no compute capability. Write major.minor, as in 7.5") from None
        return major, minor
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def compute_dtype(capability: tuple[int, int] | None):
    """The torch dtype to compute in: fp32 without a GPU, fp16 below capability 8.0 (a T4), bf16 from there on.

    `torch.cuda.is_bf16_supported()` is not asked: it says yes on a T4, which only emulates bf16.
    """
    import torch

    if capability is None:
        return torch.float32
    return torch.float16 if capability < (8, 0) else torch.bfloat16


def follow_rules() -> None:
    """With QLORA_CAPABILITY below 8.0, hold a larger GPU to the rules of a T4 (its dtype follows anyway).

    A T4 has memory-efficient attention alone, and 14.12 GiB for torch.
    """
    import torch

    if os.environ.get("QLORA_CAPABILITY") and capability() < (8, 0) and torch.cuda.is_available():
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, T4_GIB * GIB / total), device())


def memory() -> float:
    """GiB of the GPU that a program can have, CUDA's own 0.3 among them; a T4's, where its rules are forced."""
    import torch

    free, total = torch.cuda.mem_get_info()
    ours = (free + torch.cuda.memory_reserved()) / GIB + 0.3
    return min(ours, total / GIB, T4_GIB + 0.4 if os.environ.get("QLORA_CAPABILITY") == "7.5" else ours)


@cache
def has_triton() -> bool:
    """Whether kernels written in Triton run here: on Nvidia's GPUs from capability 7.0 on."""
    import torch

    return (
        torch.cuda.is_available() and find_spec("triton") is not None and torch.cuda.get_device_capability() >= (7, 0)
    )


def device():
    """The torch device of this process: its own GPU, or the CPU without one."""
    import torch

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"


def processes() -> int:
    """How many processes train together (torchrun, accelerate and notebook_launcher set WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", 1))


def sharded() -> bool:
    """Whether the processes share one base, each a part of it: accelerate was started with an FSDP configuration."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def gathered(tensor):
    """`tensor` whole, where FSDP (its second version) has cut it among the processes; then all of them must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return int(os.environ.get("RANK", 0)) == 0


def from_main(value=None):
    """What the main process gives, in every process; all must call it. A value is anything that pickles."""
    import torch

    if processes() == 1 or not torch.distributed.is_initialized():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def wait_for_all() -> None:
    """Go on when every process has come here."""
    import torch

    if processes() > 1 and torch.distributed.is_initialized():
        torch.distributed.barrier()


def peak() -> float:
    """Most GiB of tensors on the GPU since `reset_peak`; 0 without one."""
    import torch

    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def reset_peak() -> float:
    """Let `peak` begin anew, from what is held now: the GiB that are returned."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return peak()


def process_peak() -> float:
    """Most GiB that this process has held; 0 where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def free() -> None:
    """Give unused memory back to the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
