"""How good a model is: likelihood, statistics of samples, features, metrics."""
