"""How the embedded checkpoint was made: VAE and both UNets together, from nothing, on rendered scenes."""
