"""The reference networks in plain torch, and the same networks on fused ops.

Read resnet.py first: the residual block and the networks, which define what is right. Then
conv_bn.py (one convolution with its batch norm on the fused ops, or by its modules), and
fused_modules.py (blocks and nets whose forward pass is fused). fuse.py turns a plain net into a
fused one. Beside them: kernel_status.py says which kernels would run here, whiten.py starts a first
convolution from training patches, summary.py lists layers, parameters and operations.
"""
