"""A value that a `with` block replaces in every thread of the process.

A context variable would not do: autograd runs the backward passes of CUDA tensors in threads of its
own, which see none of the caller's context.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

__all__ = ["Override"]

T = TypeVar("T")


class Override(Generic[T]):
    """Holds `value`, None outside of all `with` blocks."""

    def __init__(self) -> None:
        self.value: T | None = None

    @contextmanager
    def set(self, value: T) -> Iterator[None]:
        """Hold `value` inside the `with` block; blocks nest."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before
