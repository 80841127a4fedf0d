"""The parts of `fastreward.patch.trl`."""
