"""Qualcomm's Hexagon through the HTP emulator that onnxruntime-qnn carries."""
