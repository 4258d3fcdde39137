"""C++ kernels for CPUs: fused AVX-512 convolutions in bf16, batch norm in bf16 and fp32.

Read backend.py first: the steps of a fused block, each convolution by a fused kernel or by oneDNN.
conv.cpp holds the convolutions, conv_strided.cpp the inner loops of stride 2, block.cpp a whole
block of inference, and conv.h what they share; batchnorm.cpp and simd.h batch norm.
build.py compiles them once a machine and calls them by ctypes.
"""
