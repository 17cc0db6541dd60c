"""Language-conditioned policies on the Kuavo dual-arm humanoid, from recorded bags to safe motion."""

__version__ = "0.1.0"
