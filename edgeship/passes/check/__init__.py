"""The check passes."""
