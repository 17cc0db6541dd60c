"""A Kuavo in Gazebo, with a checkpoint also policy and executor; `--show-args` lists the arguments."""

from kuavo_smolvla_ros.nodes.launching import description


def generate_launch_description():
    return description("gazebo")
