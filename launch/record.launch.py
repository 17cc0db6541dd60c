"""Records episodes of a running robot or simulator; `--show-args` lists the arguments."""

from kuavo_smolvla_ros.nodes.launching import description


def generate_launch_description():
    return description("record")
