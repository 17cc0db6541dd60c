"""Many ways to say each task, for a language model that begins with random weights.

SmolVLM2 knows that a parcel is a package. The experiment's tiny network knows no word, so it must hear each
task in many wordings before it can be asked in one it has not heard. Sentences are put together from parts;
those that are held out for the trials are left out.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from kuavo_smolvla_ros.learning.paraphrases import held_out_paraphrases

COUNT = 600
SHARE = 0.7
"""Of the samples, how many carry one of these in the place of the task's own sentence."""

_TAKE = ("pick up", "grasp", "take", "grab", "get", "lift", "collect", "fetch", "pick", "remove", "catch")
_BELT = (
    "from the conveyor belt", "off the conveyor belt", "from the belt", "off the belt", "from the conveyor",
    "off the conveyor", "off the moving belt", "from the running belt", "that moves on the conveyor",
    "as it goes by on the belt",
)  # fmt: skip
_BOTTLES = (
    "from the cluttered bottles", "out of the clutter", "from the pile", "among the bottles",
    "in the clutter",
    "from the daily chemical products", "out of the pile of bottles", "among the products",
)  # fmt: skip

# A sentence is one of the patterns, with every part in braces replaced by one of its wordings.
Parts = Mapping[str, Sequence[str]]
_TASKS: Mapping[str, tuple[Sequence[str], Parts]] = {
    "task1_moving_grasp": (
        (
            "{take} {thing} {belt}, {put} and {push}",
            "{take} {thing} {belt}, {put}, then {push}",
            "{take} {thing} {belt}, {put}, and then {push}",
            "first {take} {thing} {belt}, next {put}, finally {push}",
            "{put_thing} {belt} on the table and {push}",
            "{take} {thing} {belt} and {push}",
        ),
        {
            "take": _TAKE,
            "belt": _BELT,
            "thing": ("the moving object", "the object", "the part", "the moving part", "the item"),
            "put": (
                "put it on the table", "place it on the table", "set it down on the table",
                "lay it on the table", "put it down on the table",
            ),
            "put_thing": ("put the object", "place the moving object", "set the item", "lay the part"),
            "push": (
                "push it to the designated area", "push it to the marked area", "push it to the target",
                "slide it to its place", "slide it into the target zone", "shift it to the marked place",
                "move it over the table to its spot", "push it along the table to the zone",
                "push it across to the designated place",
            ),
        },
    ),
    "task2_weighing": (
        (
            "{take} {thing} {belt}, {weigh}, then {store}",
            "{take} {thing} {belt}, {weigh}, and {store}",
            "{take} {thing} {belt} and {weigh}, afterwards {store}",
            "first {weigh_thing} {belt} on the scale, then {store}",
            "{weigh_thing} {belt} on the electronic scale, then {store}",
            "{put_thing} on the scale, {wait} and {store}",
            "{take} {thing} {belt} onto the scale, then {store}",
        ),
        {
            "take": _TAKE,
            "belt": _BELT,
            "thing": ("the package", "the parcel", "the box", "the packet"),
            "weigh": (
                "weigh it on the electronic scale", "weigh it on the scale", "put it on the scale",
                "place it on the electronic scale", "set it on the scale to weigh it", "weigh it",
            ),
            "weigh_thing": ("weigh the package", "weigh the parcel", "weigh the box"),
            "put_thing": ("put the package", "place the parcel", "set the box", "put the parcel"),
            "wait": ("wait for the weight", "weigh it", "let it be weighed", "read its weight"),
            "store": (
                "put it into the storage container", "place it in the designated container",
                "put it in the container", "store it in the container", "drop it into the bin",
                "move it to the storage bin", "pick it up again and put it into the container",
                "place it in the storage bin",
            ),
        },
    ),
    "task3_placement": (
        (
            "{take} {thing} {bottles}, {hand} and {put}",
            "{take} {thing} {bottles}, {hand}, then {put}",
            "{take} {thing} {bottles} and {put} after you {hand}",
            "first {take} {thing} {bottles}, then {hand}, and {put}",
            "{take} {thing}, {hand} and {put}",
        ),
        {
            "take": (*_TAKE, "choose"),
            "bottles": _BOTTLES,
            "thing": ("a bottle", "one bottle", "one of the bottles", "a chemical bottle", "the bottle"),
            "hand": (
                "transfer it to the other hand", "hand it over to the other hand", "pass it to the other",
                "give it to your other hand", "change hands", "swap hands", "switch hands", "hand it over",
            ),
            "put": (
                "place it in the specified pose with the label up", "put it down with its label facing up",
                "lay it down with the label facing up", "set it down so that its label is up",
                "place it with the label on top", "put it in the given pose, label up",
                "lay it in the required pose with the label upwards",
            ),
        },
    ),
    "task4_sorting": (
        (
            "{go}, {take} {thing}, {turn}, {walk} and {put}",
            "{go}, {take} {thing}, {turn} and {put}",
            "{go} and {take} {thing}, then {turn} and {put}",
            "{go}, {take} {thing}, then {walk} and {put}",
            "{take} {thing} from the rack, {turn} and {put}",
            "{take} {thing} at the rack, then {walk} and {put}",
            "first {go} and {take} {thing}, then {turn}, {walk} and {put}",
        ),
        {
            "take": _TAKE,
            "thing": ("the workpiece", "the piece", "the work piece", "the workpiece there"),
            "go": (
                "go to the rack", "walk to the rack", "move to the rack", "go over to the flow rack",
                "move from the starting point to the rack", "walk from the start to the shelf",
                "step over to the rack",
            ),
            "turn": ("turn around", "turn round", "turn", "turn back"),
            "walk": (
                "go to the placement rack", "walk to the other rack", "move to the placement rack",
                "carry it to the other rack", "bring it to the placement rack",
            ),
            "put": (
                "place it in the designated position", "put it in its position", "put it into its place",
                "place it on the placement rack", "set it down in its slot", "put it down on the other rack",
                "place it in its place in the bin",
            ),
        },
    ),
}  # fmt: skip


def wordings(task: str, count: int = COUNT) -> tuple[str, ...]:
    """So many sentences for a task, always the same ones, none of them held out."""
    patterns, parts = _TASKS[task]
    held_out = set(held_out_paraphrases()[task])
    chance = random.Random(task)
    found: dict[str, None] = {}
    while len(found) < count:
        filled = chance.choice(patterns).format_map(
            {name: chance.choice(given) for name, given in parts.items()}
        )
        sentence = filled[0].upper() + filled[1:]
        if sentence not in held_out:
            found[sentence] = None
    return tuple(found)
