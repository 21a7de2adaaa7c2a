"""Core ML on this machine: an evaluator of saved mlprograms that needs no macOS."""
