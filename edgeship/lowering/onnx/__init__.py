"""TorchProgram to ONNX: export the graph without weights, then place each weight as it was decided."""
