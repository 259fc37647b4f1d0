"""The YAML configurations that ship with depthmill, as package data."""
