"""Keys of Triton's cache that depend on a kernel alone, not on what its process launched before.

Triton 3.6 counts the constants of a function among its caller's, which enter the caller's key, only
where the function was hashed before: a kernel that shares functions with one launched earlier gets
another key than in a process of its own, and is compiled again.
"""

import triton
from triton.runtime.jit import JITCallable

__all__ = ["settle_cache_key"]


def settle_cache_key(kernel: triton.JITFunction) -> None:
    """Have Triton hash the functions that a kernel calls, then the kernel; once in a process."""
    if kernel.hash is None:
        _hash_callees_first(kernel)


def _hash_callees_first(function: JITCallable) -> None:
    for name in function.fn.__code__.co_names:
        callee = function.fn.__globals__.get(name)
        if isinstance(callee, JITCallable) and callee.hash is None:
            _hash_callees_first(callee)
    _ = function.cache_key
