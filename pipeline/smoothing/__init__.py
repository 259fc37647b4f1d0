"""Temporal smoothing: one scale and shift a frame, so that the depth of a video does not flicker."""
