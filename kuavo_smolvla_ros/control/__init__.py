"""An action chunk becomes safe motion: plan by time, guard, stop (no ROS, no torch)."""
