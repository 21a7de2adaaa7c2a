"""The lower passes."""
