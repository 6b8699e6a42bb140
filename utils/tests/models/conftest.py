import pytest

from utils.models import adapters, loading
from utils.tests import tiny


@pytest.fixture(scope="module")
def stirred(base):
    """The tiny base with an adapter as after a training."""
    return tiny.stir(adapters.add(loading.load_base(base), tiny.RECIPE), std=0.3).eval()
