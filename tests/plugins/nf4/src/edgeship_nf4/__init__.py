"""NormalFloat of four bits."""
