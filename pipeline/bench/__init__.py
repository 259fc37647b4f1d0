"""What a machine does with a checkpoint and an input: measured, beside what it could do, and what to change."""
