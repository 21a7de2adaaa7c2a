"""Ways into torch: each reads one kind of source and ends in a module that `torch.export` accepts."""
