"""One environment for all tests here. See `machine`."""

import pytest

from tests.emulation.machine import compile_driver, make_machine


@pytest.fixture(scope="session")
def machine(tmp_path_factory):
    return make_machine(compile_driver(tmp_path_factory.mktemp("driver")))
