"""The layer between a public operation and a backend: dispatch, custom ops, memory, layouts."""
