"""Which dtype to compute in, on which machine; which process of several this is."""

import pytest
import torch

from utils import hardware, runtime


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(None, torch.float32), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_dtype_follows_the_capability(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # as a T4 says
    assert hardware.compute_dtype(capability) is dtype


@pytest.mark.parametrize(("forced", "capability"), [("7.5", (7, 5)), ("8.0", (8, 0)), ("12.0", (12, 0))])
def test_a_capability_can_be_forced(monkeypatch, forced, capability):
    monkeypatch.setenv("QLORA_CAPABILITY", forced)
    assert hardware.capability() == capability


@pytest.mark.parametrize("forced", ["7", "7.5.0", "T4", "7,5", "."])
def test_a_malformed_capability_is_refused_with_an_example(monkeypatch, forced):
    monkeypatch.setenv("QLORA_CAPABILITY", forced)
    with pytest.raises(runtime.Stop, match="is no compute capability. Write major.minor, as in 7.5"):
        hardware.capability()


@pytest.mark.parametrize("found", [None, (7, 5), (9, 0)])
def test_capability_is_that_of_the_gpu_in_use(monkeypatch, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found)
    assert hardware.capability() == found


def test_one_process_alone_is_the_main_one():
    assert hardware.processes() == 1
    assert hardware.is_main()
    assert hardware.from_main("value") == "value"
    hardware.wait_for_all()


def test_a_process_uses_the_gpu_of_its_local_rank(monkeypatch):
    assert hardware.device() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hardware.device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert hardware.device() == torch.device("cuda", 1)


def test_memory_of_the_process_is_known():
    assert 0.01 < hardware.process_peak() < 1000
    assert hardware.reset_peak() == hardware.peak() == 0  # no GPU here
