"""A random model must be, byte for byte in size and type, what loading the real one gives."""

import pytest
import torch

from utils.models import loading
from utils.planning import random_model


def described(model):
    return {
        name: (type(t).__name__, t.dtype, tuple(t.shape), t.requires_grad)
        for name, t in model.state_dict(keep_vars=True).items()
        if "bitsandbytes__" not in name  # a little JSON text, as long as its numbers are
    }


@pytest.mark.parametrize("four_bit", [True, False])
def test_it_is_what_loading_gives_but_for_the_numbers(base, four_bit):
    loaded = loading.load_base(base, four_bit=four_bit)
    random = random_model.build(random_model.config(base), four_bit=four_bit)
    assert described(random) == described(loaded)
    assert not any(t.is_meta for t in [*random.parameters(), *random.buffers()])
    angles = [dict(model.named_buffers()) for model in (loaded, random)]
    assert angles[0].keys() == angles[1].keys() and all(angles[0][n].equal(angles[1][n]) for n in angles[0])
    with torch.no_grad():
        assert torch.isfinite(random(torch.arange(5, 25)[None]).logits).all()
