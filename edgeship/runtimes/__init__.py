"""One engine a file or folder: open an artifact from disk, run it, read its weights back."""
