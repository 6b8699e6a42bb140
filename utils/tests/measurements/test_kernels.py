"""Kernel names of real profiles (H100, H200, T4) and what they are counted as."""

import pytest


NAMES = {
    "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1": "matmul",
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT": "matmul",
    "turing_fp16_s1688gemm_fp16_128x128_ldg8_f2f_tn": "matmul",
    "void kDequantizeBlockwise<__half, 512, 64, 8, 2>(float*, unsigned char*, float*, __half*, int, int)": "dequantize",
    "fmha_cutlassF_f16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)": "attention",
    "_rms_norm_forward_kernel": "fused",
    "_swiglu_backward_kernel": "fused",
    "_triton_rope": "fused",
    "liger_cross_entropy_kernel": "fused",
    "_nf4_dequant_kernel": "dequantize",
    "_rms_layernorm_backward": "fused",
    "_DWf_DW_dfg_kernel": "fused",
    "triton_poi_fused_add_mul_0": "fused",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>>": "elementwise",
    "Memcpy DtoD (Device -> Device)": "elementwise",
    "Memcpy HtoD (Pinned -> Device)": "transfer",
}


@pytest.mark.parametrize("name", NAMES)
def test_kind(name):
    assert kernels.kind_of(name) == NAMES[name]


def test_busy_time_counts_overlap_once_and_no_transfers():
    ms = 1_000_000
    times = kernels.Times(
        [("gemm", 0, 4 * ms), ("add", 2 * ms, 4 * ms), ("add", 9 * ms, ms), ("Memcpy HtoD", 0, 9 * ms)]
    )
    assert times.busy == pytest.approx(7) and times.launches == 4
    assert dict(times.by_kind) == pytest.approx({"matmul": 4, "elementwise": 5, "transfer": 9})
    assert times.top(1) == [["Memcpy HtoD", 9.0, 1]]
