"""The whole road in small, on this machine: what `make demo` walks."""
