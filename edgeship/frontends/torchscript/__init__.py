"""TorchScript archives (``torch.jit.save``) by an interpreter of our own, which runs none of their code."""
