"""What all tests share: a run in this process leaves no trace in the next test."""

import pytest

from mrlm_cli.kernels import native


@pytest.fixture(autouse=True)
def as_before():
    """No kernels in C unless a test, or a run in it, asks for them."""
    native.use(False)


@pytest.fixture(params=["torch", "c"])
def kernels(as_before, request):
    """A test runs once with torch's operators and once with the kernels in C."""
    if request.param == "c":
        if (reason := native.missing()) is not None:
            pytest.skip(f"no kernels in C: {reason}")
        native.use(True)
    return request.param
