"""A process in which Triton interprets its kernels, for the tests that run them without a GPU."""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch


def ready() -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process whose Triton interprets; here, and for other tests, kernels stay compiled ones."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(ready).result()  # starts the process
        yield lambda fn, *args: pool.submit(fn, *args).result(timeout=100)
