"""The torch program: the common form of every model, its weights on disk, and what compression decided for each."""
