"""What stands between a public operation and a backend: dispatch, custom ops, memory, layouts."""
