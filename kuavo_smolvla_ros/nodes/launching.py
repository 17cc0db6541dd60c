"""The launch system's view of `nodes.bringup`.

Only launch files import this: `launch` cannot be had without a ROS installation.
"""

from __future__ import annotations

from typing import Any

from kuavo_smolvla_ros import dds
from kuavo_smolvla_ros.nodes.bringup import BRINGUPS


def description(name: str) -> Any:
    """The launch description of a bringup, its arguments declared with their meaning."""
    from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable, Shutdown
    from launch_ros.actions import Node

    from launch import LaunchDescription

    bringup = BRINGUPS[name]

    def start(context: Any) -> list[Any]:
        given = {a.name: context.launch_configurations[a.name] for a in bringup.arguments}
        return [
            Node(
                package="kuavo_smolvla_ros",
                executable=process.executable,
                name=process.name,
                namespace=process.namespace,
                parameters=[dict(process.parameters)],
                output="screen",
                on_exit=Shutdown(reason=f"{process.name} ended"),
            )
            for process in bringup.processes(given)
        ]

    declared = [
        DeclareLaunchArgument(
            argument.name,
            default_value=argument.text,
            description=argument.meaning,
            choices=list(argument.choices) or None,
        )
        for argument in bringup.arguments
    ]
    environment = [SetEnvironmentVariable(key, value) for key, value in dds.environment().items()]
    return LaunchDescription([*environment, *declared, OpaqueFunction(function=start)])
