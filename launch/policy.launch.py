"""Policy and executor for a robot; `--show-args` lists the arguments."""

from kuavo_smolvla_ros.nodes.launching import description


def generate_launch_description():
    return description("policy")
