"""The C launchers of compiled kernels, built before their first launch.

In Triton 3.6 every kernel is started by a C function of its own signature, which the first
launch has a C compiler make: a fifth of a second each, one after the other, in the process that
waits for them. A training step of ResNet-20 has 28 signatures. Triton 3.8 has one function for all.

Nothing here touches a GPU: the driver's library is linked against, and no context made.
"""

from typing import Any

__all__ = ["build_launcher"]


def build_launcher(kernel: Any) -> bool:
    """Have the launcher of a compiled kernel in Triton's cache, where its first launch looks.

    Args:
        kernel: what `JITFunction.run(..., warmup=True)` returns.

    Returns: whether it is there; False where this Triton needs none, or the driver's library is
        missing, without which no launch would do either.
    """
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return False
    try:
        driver.library_dirs()
    except (AssertionError, OSError):
        return False
    # A launcher takes this type as it finds it when it is loaded, once a process.
    if driver.PyCUtensorMap is None:
        driver.CudaUtils()
    driver.CudaLauncher(kernel.src, kernel.metadata)
    return True
