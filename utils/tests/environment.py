"""The environment of every test, set in one place and inherited by the kernels that nbval starts.

Called by the two conftest.py files (beside the notebooks and beside the tests), so that a plain `pytest`, one
notebook alone and `make test` all run in the same world: the pocket model, no GPU, no network.
"""

import os


def hermetic() -> None:
    """Set the variables that decide what runs, and drop what a developer's shell may have set."""
    for name in [n for n in os.environ if n.startswith("QLORA_") and n != "QLORA_OUTPUTS"]:
        del os.environ[name]
    os.environ.update(
        QLORA_PROFILE="pocket",
        CUDA_VISIBLE_DEVICES="",
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        GOMP_SPINCOUNT="1000",  # as runtime.bootstrap() does
    )
    if "PYTEST_XDIST_WORKER" in os.environ:  # two workers on two cores: a second thread each would wait for the other's
        os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("PYTHONWARNINGS", None)  # would switch on what runtime.quiet() leaves off
