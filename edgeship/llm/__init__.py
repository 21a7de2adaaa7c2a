"""What is special about decoder language models: a fixed-shape step, caches, generation."""
