"""Call a service of a node, or say a sentence on a topic: what `ros2 service call` and `ros2 topic pub` do.

For machines without ROS's own tools, such as an environment made of wheels. Services are those without
arguments (std_srvs/Trigger); with a TEXT it is published once, as std_msgs/String, when somebody listens.
"""

from __future__ import annotations

import argparse

from kuavo_smolvla_ros.errors import UsageError

EPILOG = """examples:
  kuavo-smolvla call /recorder/start
  kuavo-smolvla call /executor/stop
  kuavo-smolvla call /policy/instruction "Pick up the package from the conveyor belt, ..."

exit status: 0 done, 1 refused or nobody there, 2 used wrongly"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("name", help="of the service, or of the topic if TEXT is given; begins with /")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what to say")
    parser.add_argument("--loopback", action="store_true", help="the nodes were started with loopback:=true")


def run(args: argparse.Namespace) -> int:
    from kuavo_smolvla_ros import dds

    if not args.name.startswith("/"):
        raise UsageError(
            f"'{args.name}' is no full name; services and topics begin with /, as /recorder/start"
        )
    if args.text is not None and not args.text.strip():
        raise UsageError("there is nothing to say: TEXT is empty")
    dds.apply(loopback=args.loopback)  # before rclpy is read
    from std_msgs.msg import String

    from kuavo_smolvla_ros.nodes.remote import Remote

    with Remote() as remote:
        if args.text is not None:
            remote.say(args.name, String(data=args.text))
            return 0
        done, answer = remote.trigger(args.name)
    print(answer)
    return 0 if done else 1
