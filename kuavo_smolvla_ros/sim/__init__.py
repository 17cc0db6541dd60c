"""A simulated Kuavo: the robot's model, the four contest tasks, and scripted experts that solve them."""
