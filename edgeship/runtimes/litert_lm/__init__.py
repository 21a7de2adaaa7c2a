"""LiteRT-LM: LiteRT's engine for language models."""
