"""edgeship: take a trained model to verified artifacts for a phone or a board."""

__version__ = "0.1.0"
