"""The estimator: checkpoints on disk, the network, and the labeler that runs it."""
