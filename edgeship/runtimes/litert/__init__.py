"""LiteRT on this machine: the interpreter, and a reader of .tflite files."""
