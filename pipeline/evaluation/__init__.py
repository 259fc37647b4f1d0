"""Evaluation on public sets: depth as Marigold measures it, normals as DSINE does."""
