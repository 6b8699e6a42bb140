"""A watch on a training run: the time, the memory and the losses of each step."""

import time

from transformers import TrainerCallback

from utils import memory
from utils.benchmark import kernels


class Watch(TrainerCallback):
    """Takes the times of steps: first some to warm up, then some by the clock, then some in the profiler."""

    def __init__(self, warm: int, timed: int, profiled: int):
        self.warm, self.until = warm, warm + timed
        self.steps = self.until + profiled
        self.seconds, self.times, self.skipped, self.gradients = [], [], 0, None
        self.losses, self.useful, self.profile = [], [], None
        self.memory = []  # of each step, in GiB: before, after the forward pass, peaks of the forward pass and of all

    def close(self) -> None:
        """End a profile that an error has left open."""
        if self.profile:
            self.profile.__exit__(None, None, None)
            self.profile = None

    def on_step_begin(self, args, state, control, **kwargs):
        _synchronize()
        self.useful.append(0)
        self.memory.append([memory.allocated()])
        memory.reset_peak()
        self.began = time.perf_counter()
        self.profile = kernels.profiled(self.times) if state.global_step >= self.until else None
        if self.profile:
            self.profile.__enter__()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        import torch

        if self.gradients is None or self.gradients:
            return
        found = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
        if all(torch.isfinite(g).all() for g in found.values()):  # else the scaler skips this step, and lowers itself
            self.gradients.update(found)
            control.should_training_stop = True

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        _synchronize()
        self.memory[-1].append(memory.peak()[0])
        if self.profile:
            self.close()
        elif state.global_step > self.warm:
            self.seconds.append(time.perf_counter() - self.began)
        self.skipped += bool(getattr(optimizer, "step_was_skipped", False))


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
