"""Parity with the objectives that other projects ship; needs the extra `peers`."""
