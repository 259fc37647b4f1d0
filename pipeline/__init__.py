"""Everything that depthmill does to one segment, in plain Python: no Ray below this folder."""
