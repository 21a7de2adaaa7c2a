"""QDQ or float ONNX to Qualcomm's Hexagon: context binary and DLC, made in a child process."""
