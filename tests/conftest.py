"""Four virtual devices, a compile cache that all tests share, and the way to the real data."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from launcher import Launcher

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # launch.py and experiments/ are not installed

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

CACHE = "JAX_COMPILATION_CACHE_DIR"  # in the environment, so that workers and the runs that tests start share it
if CACHE not in os.environ:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="jaxcompute-tests-")
    os.environ["JAXCOMPUTE_TESTS_OWN_CACHE"] = str(os.getpid())
jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_unconfigure(config: pytest.Config) -> None:
    if os.environ.get("JAXCOMPUTE_TESTS_OWN_CACHE") == str(os.getpid()):
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Where the real data sets are; a test that needs them skips where they are not, except in CI."""
    given = os.environ.get("JAXCOMPUTE_DATA_DIR")
    if given and Path(given).is_dir():
        return Path(given)
    if os.environ.get("CI"):
        pytest.fail("CI must have real data: set JAXCOMPUTE_DATA_DIR")
    pytest.skip("no JAXCOMPUTE_DATA_DIR")


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """launch.py as a call."""
    with contextlib.closing(Launcher()) as launch:
        yield launch
