"""One stage, from its first step or from where it was stopped to its last."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.adapters import merged, with_adapter_rates, write_adapter
from kuavo_smolvla_ros.learning.averaging import ResultWeights
from kuavo_smolvla_ros.learning.checkpointing import (
    STATE_FOLDER,
    Progress,
    is_low,
    optimizer_tensors,
    read_state,
    replace_last,
    require_space,
    restore_optimizer,
    write_state,
)
from kuavo_smolvla_ros.learning.feature_cache import open_cache
from kuavo_smolvla_ros.learning.feed import make_loader, places, seed_everything, step_noise
from kuavo_smolvla_ros.learning.interruption import Interruption
from kuavo_smolvla_ros.learning.meters import Meters
from kuavo_smolvla_ros.learning.mixed_dataset import TASK_NUMBER, MixedDataset
from kuavo_smolvla_ros.learning.outputs import RunLog
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.settings import RunSettings
from kuavo_smolvla_ros.learning.sharding import full, shard, whole
from kuavo_smolvla_ros.learning.stage import BEST, LAST
from kuavo_smolvla_ros.learning.validation import TaskResult, Validator
from kuavo_smolvla_ros.policy.checkpoint import atomic_folder
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy

Judge = Callable[[Mapping[int, TaskResult]], dict[str, Any]]
Say = Callable[[str], None]


class TrainingError(UserError):
    """Training cannot go on; the last good checkpoint is kept."""


@dataclass(frozen=True)
class Tools:
    """What the trainer uses and does not decide."""

    accelerator: Any
    log: RunLog
    say: Say
    judge: Judge  # validation results to verdicts, for the log
    write_card: Callable[[Path, Progress], None]
    interruption: Interruption
    fitting_batch: Callable[[int], int | None]  # a smaller per-device batch that fits the device's memory


class StageTrainer:
    """The loop. Step n of a stage does the same, whatever happened between it and step n - 1."""

    def __init__(
        self,
        policy: KuavoSmolVLAPolicy,
        manager: ReplayDatasetManager,
        preprocess: Callable[[dict[str, Any]], dict[str, Any]],
        run: RunSettings,
        folder: Path,
        progress: Progress,
        tools: Tools,
        samples: Dataset[Any] | None = None,
    ) -> None:
        self.stage, self.manager, self.run, self.folder = manager.stage, manager, run, folder
        self.policy, self.preprocess, self.progress, self.tools = policy, preprocess, progress, tools
        self.accelerator = tools.accelerator
        self.layout = self.stage.training.layout(run.batch_size, self.accelerator.num_processes)
        self.total_steps, self.steps_per_epoch = manager.total_steps, manager.steps_per_epoch
        self.schedule = self.stage.schedule.for_steps(self.total_steps)
        if samples is None:
            mixed = MixedDataset.of_manager(manager)
            samples = open_cache(policy, manager, mixed, preprocess, run, self.accelerator, tools.say)
        self.samples = samples
        self.validator = Validator(manager, self.samples, preprocess, self.accelerator, run)
        self._numbers = torch.tensor([task.number for task in self.stage.tasks])

        settings = self.stage.optimizer
        self.model: Any = shard(policy, self.accelerator.device) if run.shard else policy
        groups = with_adapter_rates(self.model.get_optim_params(), self.stage)
        groups = [{**group, "peak_lr": group["lr"]} for group in groups]
        optimizer = torch.optim.AdamW(
            groups,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,  # one pass over parameters and moments instead of ten
        )
        self._names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.trained = {n: p for p, n in self._names.items() if p.requires_grad}
        self.result = ResultWeights(
            self.trained, self.stage.training.ema_decay, self.stage.training.interpolate_previous
        )
        if progress.step:
            moments, average = read_state(folder / LAST)
            restore_optimizer(optimizer, self._names, moments)
            if self.result.average is not None:
                self.result.restore(average or {})
        if run.compile:
            self.model.compile()
        if run.shard:
            self.optimizer = self.accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = self.accelerator.prepare(policy, optimizer)

    def fit(self) -> Progress:
        """Train to the end, or until a signal asks to stop; everything is saved when this returns."""
        if not self.progress.step:
            self._validate()  # row 0: what the stage starts from
        self._show_rates()
        layout, rank = self.layout, self.accelerator.process_index
        sampler = self.manager.sampler(layout, rank, self.progress.step)
        batches = iter(make_loader(self.samples, sampler, self.run, self.accelerator.device))
        meters = Meters(
            len(self.stage.tasks), layout.accumulation, layout.per_device, self.accelerator.device
        )
        self._bar = tqdm(
            total=self.total_steps,
            initial=self.progress.step,
            desc=self.stage.name,
            unit="step",
            disable=None if self.accelerator.is_main_process else True,
            dynamic_ncols=True,
        )
        self._meters, self._looked = meters, (self.progress.step, time.perf_counter())
        self._data_s = self._preprocess_s = 0.0
        self.model.train()
        with self._bar:
            while self.progress.step < self.total_steps:
                self._step(batches)
                if self._after_step():
                    break
        return self.progress

    def _step(self, batches: Any) -> None:
        step, layout, rank = self.progress.step, self.layout, self.accelerator.process_index
        factor = self.schedule.factor(step, self.stage.optimizer.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        seed_everything(self.stage.training.seed, step, rank)
        config = self.policy.config
        noise, times = step_noise(
            self.stage.training.seed, step, layout, (config.chunk_size, config.max_action_dim)
        )
        try:
            for micro in range(layout.accumulation):
                batch, tasks = self._next(batches)
                mine = places(step, layout, rank, micro)
                last = micro == layout.accumulation - 1
                sync = nullcontext() if last else self.accelerator.no_sync(self.model)
                with sync, self.accelerator.autocast():
                    losses, numbers = self.model(
                        batch, self._send(noise[mine]), self._send(times[mine]), "none"
                    )
                    # The mean over samples, not over their valid entries: then shares hold in the loss too,
                    # and it does not matter how the batch is divided.
                    self.accelerator.backward(losses.mean() / layout.accumulation)
                self._meters.add_losses(losses, tasks)
                self._meters.add_numbers(numbers)
        except torch.OutOfMemoryError as fault:
            raise TrainingError(self._memory_sentence()) from fault
        norm = self.accelerator.clip_grad_norm_(self.trained.values(), self.stage.optimizer.grad_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.result.update()
        self._meters.end_step(step, full(norm))
        self.progress.step += 1
        self._bar.update()

    def _next(self, batches: Any) -> tuple[dict[str, Any], torch.Tensor]:
        begin = time.perf_counter()
        raw = next(batches)
        loaded = time.perf_counter()
        tasks = (raw.pop(TASK_NUMBER)[:, None] == self._numbers).long().argmax(1)
        batch = self.preprocess(raw)
        self._data_s += loaded - begin
        self._preprocess_s += time.perf_counter() - loaded
        return batch, self._send(tasks)

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.accelerator.device, non_blocking=True)

    def _after_step(self) -> bool:
        """Look, validate and save where it is time to; returns whether to stop."""
        step, validation = self.progress.step, self.stage.validation
        done = step == self.total_steps
        epochs, within = divmod(step, self.steps_per_epoch)
        whole = within == 0
        validate = done or (whole and epochs % validation.freq_epochs == 0)
        keep = whole and epochs % self.run.save_freq_epochs == 0
        look = step % self.run.log_freq_steps == 0
        asked = self._asked_to_stop(look)
        save = validate or keep or asked or step % self.run.save_freq_steps == 0
        if not (look or save):
            return False
        self._look()
        if validate:
            self._validate()
        if keep:
            with self.result.in_place():
                self._save_result(f"epoch{epochs}")
        if save:
            self._save_last(done)
        self._looked = (step, time.perf_counter())  # validating and saving are no part of the throughput
        if asked and not done:
            name = self.tools.interruption.signal.name if self.tools.interruption.signal else "a signal"
            self.tools.say(f"stopped by {name} after step {step}, saved; the same command goes on from here")
        return asked

    def _asked_to_stop(self, look: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return bool(self.tools.interruption)
        if not look:  # agreeing waits for all devices
            return False
        asked = torch.tensor([float(bool(self.tools.interruption))], device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum").item())

    def _look(self) -> None:
        """Fetch what the device has summed up; stop where it is not finite."""
        since, began = self._looked
        step = self.progress.step
        if step == since:
            return
        reading = self._meters.read(self.accelerator)
        now = time.perf_counter()
        if reading.bad_step is not None:
            raise TrainingError(self._not_finite(reading.bad_step, reading.bad_places))
        steps, wall = step - since, now - began
        before, drawn = (self.manager.plan.quotas.before(s) for s in (since, step))
        counts = (drawn - before).tolist()
        numbers = self._numbers.tolist()
        factor = self.schedule.factor(step - 1, self.stage.optimizer.lr)
        self.progress.elapsed_s += wall
        row = self.tools.log.write(
            "train",
            step,
            loss=reading.loss,
            grad_norm=reading.grad_norm,
            lr=self.stage.optimizer.lr * factor,
            lr_by_group={g["name"]: g["lr"] for g in self.optimizer.param_groups},
            loss_by_task={
                str(n): total / c
                for n, total, c in zip(numbers, reading.loss_sum_by_task, counts, strict=True)
                if c
            },
            realised_shares={str(n): c / sum(counts) for n, c in zip(numbers, counts, strict=True)},
            numbers=reading.numbers,
            samples_per_s=steps * self.layout.total / wall,
            data_s=self._data_s / steps,
            preprocess_s=self._preprocess_s / steps,
            update_s=max(wall - self._data_s - self._preprocess_s, 0.0) / steps,
        )
        self._bar.set_postfix(
            loss=f"{row['loss']:.4f}", lr=f"{row['lr']:.1e}", samples_s=f"{row['samples_per_s']:.1f}"
        )
        if self._bar.disable:
            left = (self.total_steps - step) * wall / steps
            self.tools.say(
                f"step {step}/{self.total_steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
                f"{row['samples_per_s']:.1f} samples/s  {left / 60:.0f} min left"
            )
        self._data_s = self._preprocess_s = 0.0

    def _validate(self) -> None:
        """All tasks seen so far; the best result so far becomes the `best` folder."""
        with self.result.in_place():
            with self._whole(), merged(self.policy.model):
                results = self.validator(self.policy)
            mean = sum(result.loss for result in results.values()) / len(results)
            tasks = {str(number): asdict(result) for number, result in results.items()}
            epoch = self.progress.step / self.steps_per_epoch
            row = self.tools.log.write(
                "validation",
                self.progress.step,
                epoch=epoch,
                mean_loss=mean,
                tasks=tasks,
                **self.tools.judge(results),
            )
            best = self.progress.best
            # The mean over all tasks, not the new one's: a stage is to end with the most it can do.
            if self.progress.step and (best is None or mean < best["mean_loss"]):
                self.progress.best = row
                self._save_result(BEST)

    def _save_result(self, name: str) -> None:
        """The policy as it is now; to be called with the result's weights in place."""
        with self._whole():
            if self.accelerator.is_main_process:
                require_space(self.folder, self._weights_bytes())
                with atomic_folder(self.folder / name) as fresh:
                    with merged(self.policy.model):
                        self.policy.save_pretrained(fresh)
                    self.tools.write_card(fresh, self.progress)
                self.tools.log.write("checkpoint", self.progress.step, folder=name)
        self.accelerator.wait_for_everyone()

    def _save_last(self, done: bool) -> None:
        self.progress.drawn = {
            name: seen.samples for name, seen in self.manager.plan.exposure(self.progress.step).items()
        }
        self.progress.finished = done
        main = self.accelerator.is_main_process
        moments: dict[str, torch.Tensor] = {}
        average = self.result.average
        if main or self.run.shard:  # where they are divided, all devices take part in bringing them together
            moments = optimizer_tensors(self.optimizer.optimizer, self._names)
            average = None if average is None else {name: full(value) for name, value in average.items()}
        with self._whole():
            if main:
                self._write_last(moments, average, done)
        self.accelerator.wait_for_everyone()

    def _write_last(
        self, moments: Mapping[str, torch.Tensor], average: Mapping[str, torch.Tensor] | None, done: bool
    ) -> None:
        require_space(self.folder, self._weights_bytes() + sum(t.nbytes for t in moments.values()))
        fresh = self.folder / f".{LAST}.new.{self.progress.step}"
        with merged(self.policy.model):
            self.policy.save_pretrained(fresh)
        self.tools.write_card(fresh, self.progress)
        write_state(fresh, self.progress, moments, average)
        if self.stage.adapter is not None:
            write_adapter(fresh / STATE_FOLDER, self.policy.model)
        replace_last(self.folder, fresh, self.run.keep_last)
        if not done and is_low(self.folder, self.run.min_free_gib):
            raise TrainingError(
                f"less than {self.run.min_free_gib:g} GiB are free at {self.folder}; step "
                f"{self.progress.step} is saved. Free some space and run the same command again, or lower "
                "run.min_free_gib"
            )

    def _whole(self) -> AbstractContextManager[None]:
        """What is divided among devices comes together in the policy, while the block runs."""
        return whole(self.policy, self.model) if self.run.shard else nullcontext()

    def _weights_bytes(self) -> int:
        return 4 * sum(parameter.numel() for parameter in self.model.parameters())

    def _show_rates(self) -> None:
        counts = {g["name"]: sum(p.numel() for p in g["params"]) for g in self.optimizer.param_groups}
        rates = ", ".join(
            f"{g['name']} {counts[g['name']]:,} parameters at {g['peak_lr']:g}"
            for g in self.optimizer.param_groups
        )
        self.tools.say(f"{self.stage.name}: {self.total_steps} steps of {self.layout.total} samples; {rates}")

    def _not_finite(self, step: int, bad: torch.Tensor) -> str:
        named = []
        for rank, micro in torch.nonzero(bad.any(-1)).tolist():
            draws = self.manager.plan.part(step, self.layout, rank, micro)
            for place in torch.nonzero(bad[rank, micro]).flatten().tolist():
                named.append(f"{self.stage.task_names[draws[place].task]} frame {draws[place].frame}")
        if named:
            where = f"sample{'s'[: len(named) != 1]} {', '.join(named[:8])}{' ...' if len(named) > 8 else ''}"
        else:
            draws = self.manager.plan.batch(step)
            first = ", ".join(f"{self.stage.task_names[d.task]} frame {d.frame}" for d in draws[:8])
            where = f"the gradient of the batch {first} ..."
        kept = self.folder / LAST
        state = (
            f"the checkpoint before it is kept at {kept}" if kept.exists() else "no checkpoint existed yet"
        )
        return (
            f"the loss of step {step} is not finite, from {where}; {state}. Look at these frames, or lower "
            "optimizer.lr"
        )

    def _memory_sentence(self) -> str:
        size = self.run.batch_size
        fits = self.tools.fitting_batch(size)
        advice = (
            f"run.batch_size={fits} would fit (the same {self.layout.total} samples per step, in more parts)"
            if fits
            else "not even one sample fits: freeze more vision layers, or use a larger device"
        )
        return f"{size} samples at a time do not fit into the device's memory; {advice}"
