"""TorchProgram to LiteRT: convert the graph with weights as inputs, then store each weight exactly as decided."""
