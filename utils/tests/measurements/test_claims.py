"""The arithmetic of chapter 08's experiments: its rounding is bitsandbytes', its gradients are the derived ones."""

import json
from statistics import NormalDist

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

from utils import runtime

CHAPTER = json.loads((runtime.ROOT / "notebooks" / "08_claims_measured.ipynb").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def course() -> dict:
    """What the chapter's cells define that the study takes from it."""
    names = {"torch": torch, "get_4bit_type": get_4bit_type, "NormalDist": NormalDist}
    for beginning in ("NF4 =", "def fake_quantize(", "def lorentz("):
        sources = ("".join(cell["source"]) for cell in CHAPTER["cells"] if cell["cell_type"] == "code")
        exec(next(s for s in sources if any(line.startswith(beginning) for line in s.splitlines())), names)
    return names


def test_rounding_to_nf4_is_that_of_bitsandbytes(course):
    weights = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.1
    packed, state = quantize_4bit(weights, blocksize=64, quant_type="nf4")
    difference = (course["round_trip"](weights, course["NF4"]) - dequantize_4bit(packed, state)).abs()
    assert difference.max() < 1e-6
    assert torch.equal(course["round_trip"](torch.zeros(2, 64), course["NF4"]), torch.zeros(2, 64))


def test_fake_quantization_has_the_rounded_value_and_the_gradient_of_the_identity(course):
    weights = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    factors, rounded = torch.arange(256.0).view(4, 64), course["round_trip"](weights, course["INT8"])
    fake = course["fake_quantize"](weights, course["INT8"])
    assert torch.allclose(fake, rounded, atol=1e-6) and not torch.allclose(fake, weights, atol=1e-4)
    (fake * factors).sum().backward()
    assert torch.equal(weights.grad, factors)


def test_the_gradient_of_the_penalty(course):
    weights = torch.linspace(-1, 1, 41, dtype=torch.float64).requires_grad_()
    course["lorentz"](0.3, 0.2)([weights]).backward()
    assert torch.allclose(weights.grad, 0.3 * 2 * weights / (0.2**2 + weights**2))
