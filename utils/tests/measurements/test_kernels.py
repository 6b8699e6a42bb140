"""Kernel names of real profiles (H100, H200, T4) and what they are counted as."""

import sys

import pytest

from utils.tests.measurements import FOLDER

sys.path.insert(0, str(FOLDER))
from benchmark import kernels

NAMES = {
    "matmul": ["sm90_xmma_gemm_f16f16_f16f32_f32_tn_n", "nvjet_hsh_128x256_64x4", "turing_fp16_s1688gemm_fp16_128x128"],
    "dequantize": ["void kDequantizeBlockwise<__half, 512, 64, 8, 2>(float*, unsigned char*)", "_nf4_dequant_kernel"],
    "attention": ["fmha_cutlassF_f16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)"],
    "fused": ["_rms_norm_forward_kernel", "_swiglu_backward_kernel", "_triton_rope", "liger_cross_entropy_kernel"]
    + ["_rms_layernorm_backward", "_DWf_DW_dfg_kernel", "triton_poi_fused_add_mul_0"],
    "elementwise": ["void at::native::vectorized_elementwise_kernel<4, ...>", "Memcpy DtoD (Device -> Device)"],
    "transfer": ["Memcpy HtoD (Pinned -> Device)"],
}


@pytest.mark.parametrize("kind", NAMES)
def test_kind(kind):
    assert {kernels.kind_of(name) for name in NAMES[kind]} == {kind}


def test_busy_time_counts_overlap_once_and_no_transfers():
    events = [("gemm", 0, 4), ("add", 2, 4), ("add", 9, 1), ("Memcpy HtoD", 0, 9)]
    times = kernels.Times([(name, start * 10**6, length * 10**6) for name, start, length in events])
    assert times.busy == pytest.approx(7) and times.launches == 4
    assert dict(times.by_kind) == pytest.approx({"matmul": 4, "elementwise": 5, "transfer": 9})
    assert times.top(1) == [["Memcpy HtoD", 9.0, 1]]


def test_annotations_are_no_work_and_kernels_with_a_lambda_are():
    copy = "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::"
    copy += "{lambda()#3}::operator()() const::{lambda(float)#1}, 4>"
    assert kernels.is_work(copy) and kernels.is_work("Memcpy DtoD (Device -> Device)")
    for name in ("Optimizer.step#PagedAdamW8bit.step", "ProfilerStep#3", "Stream Wait Event", "Context Sync"):
        assert not kernels.is_work(name)
