import pytest
import torch

from utils.models import adapters, loading
from utils.tests import tiny


@pytest.fixture(scope="module")
def stirred(base):
    """The tiny base with an adapter as after a training: lora_B is not zero, so every weight of it matters."""
    model = adapters.add(loading.load_base(base), tiny.RECIPE)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.eval()
