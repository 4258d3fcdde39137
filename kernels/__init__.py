"""Triton kernels of fastres, their plain-torch reference and their launch tables.

Imported as `fastres.kernels` and under no other name: a top-level package called `kernels`
belongs to Hugging Face, and two copies of one module would register every operator twice.
"""

if __name__ != "fastres.kernels":
    raise ImportError(f"import this package as fastres.kernels, not as {__name__}")
