import pytest

from utils.tests import tiny


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The tiny base's tokenizer alone: this room needs no model."""
    return tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"), add_bos_token=True)
