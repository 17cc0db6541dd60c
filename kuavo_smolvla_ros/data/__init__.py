"""Bags become LeRobot datasets, with a quality report (no ROS installation)."""
