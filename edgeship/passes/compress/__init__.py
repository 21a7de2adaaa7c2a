"""The compress passes."""
