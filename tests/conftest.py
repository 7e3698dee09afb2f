"""What all tests share: a run in this process leaves no trace in the next test."""

import sys

import pytest


@pytest.fixture(autouse=True)
def as_before():
    """No kernels in C unless a test, or a run in it, asks for them. Tests that need no torch import none for this."""
    native = sys.modules.get("mrlm_cli.kernels.native")
    if native is not None:
        native.use(False)


@pytest.fixture(params=["torch", "c"])
def kernels(as_before, request):
    """A test runs once with torch's operators and once with the kernels in C."""
    if request.param == "c":
        from mrlm_cli.kernels import native

        if (reason := native.missing()) is not None:
            pytest.skip(f"no kernels in C: {reason}")
        native.use(True)
    return request.param
