"""Every operation written out in float64 torch: slow, obvious, never optimised. The truth in tests and `verify`."""
