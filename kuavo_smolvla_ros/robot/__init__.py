"""What the robot is: one YAML, one translation between messages and vectors (no ROS, no torch)."""
