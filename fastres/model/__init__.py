"""The reference networks in plain torch, and the same networks on fused ops.

Read resnet.py first: the residual block and the networks, which define what is right. Then
conv_bn.py (a convolution with its batch norm, and what ops need of the two), residual_block.py
(layers in a row with a shortcut, by the ops or by their modules) and head.py (pooling with the
classifier, and the loss). interception.py says when modules must be called themselves;
running_stats.py moves the running statistics. fastres/fusion finds such layers in a network. Beside
them: kernel_status.py says which kernels would run here, whiten.py starts a first convolution from
training patches, summary.py lists layers, parameters and operations.
"""
