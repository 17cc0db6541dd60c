"""SmolVLA and what we add: freezing, own numerics, inference (torch; no ROS)."""
