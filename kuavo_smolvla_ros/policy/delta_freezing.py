"""What trains with a delta expert: it alone. The plan says so of every other part."""

from __future__ import annotations

from dataclasses import replace

from kuavo_smolvla_ros.policy.freeze_plan import FreezePlan, FreezeSettings, plan_freezing


def plan_delta(settings: FreezeSettings, num_vision_layers: int, parts: tuple[str, ...]) -> FreezePlan:
    """Everything of plain SmolVLA frozen, the delta expert's `parts` trained.

    Freezing settings may still be there, for they are stored with the checkpoint that is refined. They are
    checked, and reported as void.
    """
    plan = plan_freezing(settings, num_vision_layers).everything_frozen()
    void = settings.given
    warnings = (f"{', '.join(void)} is void: train_delta_expert freezes all but the delta expert",)
    return replace(
        plan.with_extra(dict.fromkeys(parts, True)),
        decided_by="train_delta_expert",
        warnings=warnings if void else (),
    )
