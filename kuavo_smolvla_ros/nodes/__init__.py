"""Thin ROS 2 nodes; the only rclpy imports of the package live here."""
