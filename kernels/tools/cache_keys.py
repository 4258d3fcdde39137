"""Keys of the entries of Triton's cache that launches ask for; nothing is compiled or started.

    with standing_in(90, remembers=False), collecting_keys() as keys:
        kernel[grid](x, y, BLOCK=64)
    keys    # ["5fd3..."]: what a GPU of capability 9.0 would look up before it compiles

Triton's own launcher makes them, from the arguments as a launch gives them: types, values of 1,
divisibility by 16 of numbers and of addresses, compile-time arguments, options, beside the source
of the kernel and the versions of the compiler. So two sides that compute keys in this way agree
where their launches do.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

__all__ = ["collecting_keys", "is_cached"]


class _KeyCollector(triton.AsyncCompileMode):
    """Takes the place of the compiler, and gives the launcher nothing: it returns at once."""

    def __init__(self) -> None:
        super().__init__(executor=None)
        self.keys: list[str] = []

    def submit(
        self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]
    ) -> None:
        """Called by the launcher for a kernel that it does not remember."""
        self.keys.append(hashlib.sha256(key.encode()).hexdigest())


@contextmanager
def collecting_keys() -> Iterator[list[str]]:
    """Collect the key of each launch inside the `with` block, in order, instead of launching.

    A kernel that the process has compiled before, for the same device, has no key to be asked for.
    """
    with _KeyCollector() as collector:
        yield collector.keys


def is_cached(key: str, kernel: str) -> bool:
    """Whether Triton's cache has the entry, for the kernel whose function has this name."""
    # As `triton.compile` asks, and names its files.
    metadata = f"{kernel[:150]}.json"
    return metadata in (get_cache_manager(key).get_group(metadata) or {})
