"""From a request to a bundle: planner, executor, cache."""
