"""Reads an ONNX file into a torch module with static shapes; start at `importer.py`."""
