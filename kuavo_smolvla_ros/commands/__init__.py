"""One module per subcommand of `kuavo-smolvla`.

A module offers `configure(parser)` and `run(args) -> int`, and keeps heavy imports (torch, mujoco, rclpy)
inside `run`, so that `--help` answers at once and works where an extra is not installed.
"""
