"""Running segments on Ray: the only folder that imports it."""
