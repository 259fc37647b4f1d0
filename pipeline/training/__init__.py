"""Training the estimator: losses, data, and the loop."""
