"""GPU operators of the EchoVideo transformer, each beside a plain PyTorch reference."""

from echovideo_kernels.attention import attention

__all__ = ["attention"]
