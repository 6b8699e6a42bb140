import pytest

from utils.tests import tiny
from utils.tests.environment import hermetic

hermetic()


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    """Folder of a tiny Llama with random weights and a tokenizer of Llama-2's kind."""
    import torch

    # Toys gain nothing from a second thread, and on a busy machine two that wait for each other take ten times as long.
    torch.set_num_threads(1)
    return tiny.make_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tokenizer(base):
    from utils.models import loading

    return loading.load_tokenizer(base)


@pytest.fixture
def adapted(base):
    """The tiny base in four bits with a fresh adapter, for this test alone."""
    from utils.models import adapters, loading

    return adapters.add(loading.load_base(base), tiny.RECIPE)


@pytest.fixture(scope="session")
def encoded(tokenizer):
    """The tiny rows as token ids and labels."""
    from utils.data import dataset

    return dataset.encode(tokenizer, tiny.ROWS, tiny.RECIPE.max_length)[0]
