"""Set-up of every test: where kernels run, poisoned allocations, hypothesis profiles."""

import gc
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read where @triton.jit decorates, so before `kernels`
    if importlib.util.find_spec("triton"):  # Linux alone
        from tests.patch_once import speed_up_interpreter

        speed_up_interpreter()
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS asks for it
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one thread per worker: more would fight over the same cores

# torch fills what torch.empty gives with NaN (integers with their maximum) in this mode alone; a
# kernel that leaves a lane of its output unwritten is seen at once
torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True, warn_only=True)

QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
settings.register_profile(
    "ci", deadline=None, max_examples=30, print_blob=True, suppress_health_check=QUIET
)
settings.register_profile("gpu", settings.get_profile("ci"), max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gpu" if HAS_GPU else "ci"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped elsewhere")
    config.addinivalue_line("filterwarnings", "ignore:.*deterministic:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(scope="module", autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """Workers that share a GPU leave each other what a module's tests have kept."""
    yield
    if HAS_GPU and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
