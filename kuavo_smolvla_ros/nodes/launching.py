"""The launch system's view of `nodes.bringup`.

Only launch files import this: `launch` cannot be had without a ROS installation.
"""

from __future__ import annotations

import os
from typing import Any

from kuavo_smolvla_ros import dds
from kuavo_smolvla_ros.nodes.bringup import BRINGUPS, LOOPBACK, Process


def description(name: str) -> Any:
    """The launch description of a bringup, its arguments declared with their meaning."""
    from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable

    from launch import LaunchDescription

    bringup = BRINGUPS[name]
    arguments = (*bringup.arguments, LOOPBACK)

    def start(context: Any) -> list[Any]:
        given = {a.name: context.launch_configurations[a.name] for a in arguments}
        loopback = LOOPBACK.read(given.pop(LOOPBACK.name))
        # A profile that the operator set is kept, except for what must stay on this machine.
        own = dds.own_profile(os.environ) is not None and not loopback
        variables = {} if own else dds.environment(loopback)
        environment = [SetEnvironmentVariable(key, value) for key, value in variables.items()]
        return [*environment, *(_action(process) for process in bringup.processes(given))]

    declared = [
        DeclareLaunchArgument(
            argument.name,
            default_value=argument.text,
            description=argument.meaning,
            choices=list(argument.choices) or None,
        )
        for argument in arguments
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start)])


def _action(process: Process) -> Any:
    from launch.actions import ExecuteProcess, Shutdown
    from launch_ros.actions import Node
    from launch_ros.parameter_descriptions import ParameterValue

    common = {"output": "screen", "on_exit": Shutdown(reason=f"{process.name} ended")}
    if process.command:
        return ExecuteProcess(cmd=list(process.command), name=process.name, **common)
    # Without its type a text would be read again as YAML: '1' as a number, '' as nothing at all.
    typed = {n: ParameterValue(v, value_type=type(v)) for n, v in process.parameters.items()}
    return Node(
        package=process.package,
        executable=process.executable,
        name=process.name,
        namespace=process.namespace,
        parameters=[typed] if typed else [],
        **common,
    )
