"""Observations in, decisions out: the one place that decides about the batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

from adaptive_batch.ages import Ages
from adaptive_batch.arguments import check_flags
from adaptive_batch.lr_scaling import GroupValues, LRScaling, NoScaling, resolve_lr_scaling, why_not_scaled
from adaptive_batch.measurement import Measurement, read_numbers
from adaptive_batch.noise import GradientNoiseScale, InnerProducts, two_batch_estimate
from adaptive_batch.noise.level import GradientLevel
from adaptive_batch.noise.schedule import PARTS, Schedule, measures_noise
from adaptive_batch.policies import (
    Combined,
    Constant,
    Policy,
    _words,
    active_policy,
    bounded,
    constant_size,
    is_measured,
    resolve_policy,
)
from adaptive_batch.throughput import StepTimeModel

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["BatchSizeController", "Decision"]

MIN_PROMISE = 0.05
"""Goodput that a change must promise (AdaptDL's value; Qiao et al., OSDI 2021)."""

MAX_GROWTH = 2.0
"""Largest factor of one change, so that no single noisy estimate can carry the size away."""

MIN_DWELL = 20
"""Updates at a size, the first one included, before it is left (Sievert & Charles 2019, arXiv:1910.08222)."""

NO_SHOW = 10 * MIN_DWELL
"""Updates after which a size that was decided counts as in use, whatever sizes the data gives."""

SETTLE = 2
"""Updates at a new size that are not timed: autotuning, recompilation and caches belong to the change."""

RETRY = 512
"""Updates after which what is known of larger sizes than the one that was gone back to is forgotten, twice as many each
time: the machine may have been slow just then, and a size that is not in use is not timed again."""

TIMED_EVERY = 3
"""Updates between two that run in parts while nothing else tells what a sample costs."""

MIN_PROSPECT = 0.1
"""Goodput that another size must be able to promise at some noise scale for the noise to be worth its measurements."""

IDLE_NOISE = 1 / 4
"""Share of the measurements that are made all the same: the times of other sizes may turn out otherwise, and a user may
look at the noise."""

NOISE_MEMORY_UPDATES = 32
NOISE_MEMORY_FRACTIONS = (1 / 16, 1 / 4)
"""The noise is averaged over two stretches of the samples seen so far, and no fewer than 32 updates' worth. The
noise scale moves on the scale of the run's own age, often by orders of magnitude at its start: the shorter
average leaves that behind the sooner, the longer one identifies what the shorter one cannot."""

IDENTIFIED_AT = 0.95
"""Confidence at which ``|G|^2`` differs from zero before the policy is given a noise scale. A scale that is found too
early is too small, so the mistake costs speed and no samples; and each change still has to be right at the
pessimistic end of the interval."""

EVIDENCE = 0.95
"""Confidence of the noise scale's interval, at whose pessimistic end a change still has to be right."""

RATE_EVIDENCE = 0.5
"""Confidence of the interval whose lower end the learning rate follows: the noise scale is larger with 75 %. With more
the rate stays behind what the data allow and the run takes more samples, with none it may go too far."""

_FROM_PARTS = frozenset({"noise", "variance", "inner_products"})
"""Statistics that one measurement of an update's parts gives together."""


@dataclass(frozen=True)
class Decision:
    """A new batch size, and why.

    Attributes:
        batch_size: the new global batch size, in samples.
        previous: the size before.
        reason: one sentence.
    """

    batch_size: int
    previous: int
    reason: str


@dataclass(frozen=True)
class _Stay:
    """No change; ``kind`` tells one reason from another, whatever the numbers in ``reason``.

    Without a kind there is nothing to say: the policy is content, or it is too early to ask. The reason is put into
    words only where it is said.
    """

    kind: str = ""
    reason: Callable[[], str] = str


class BatchSizeController:
    """Turns measurements of updates into decisions about the batch size.

    It keeps the noise and step-time estimates, asks the policy once every ``adjust_every`` updates, and is
    careful with the answer of a policy that measures: sizes are ``B0`` times a power of two, a step is
    at most a factor of two, 20 updates pass before a size is left, a change must promise 5 % of goodput
    where that can be computed, and it must still be right at the pessimistic end of the noise scale's
    confidence interval. Where nothing tells what a larger update costs (all passes had the same size), one
    step up from a size that is surely below the noise scale finds it out, and is taken back if it does not
    pay. While the noise scale is so large that it cannot be told from an infinite one, a change has to be
    right for all noise scales from the lower end of its interval to infinity. Answers of schedules and
    functions are rounded and clamped, no more.

    Args:
        policy: a name, an object with ``propose(measurement) -> float``, or a function of a measurement.
        lr_scaling: a name or rule of :mod:`adaptive_batch.lr_scaling`.
        min_batch_size: smallest size; ``None`` is the reference size.
        max_batch_size: largest size; ``None`` sets no bound.
        reference_batch_size: ``B0``; ``None`` takes that of the first measurement.
        adjust_every: updates between two questions to the policy.
        quantize: ``True`` and ``False`` force or forbid the care above; ``None`` goes by the policy.
        multiple_of: sizes are multiples of it (batches that the user accumulates into one update).

    Attributes:
        batch_size: the size in force, ``None`` before anything was measured.
        note: the newest reason to keep the size, ``None`` after a change; each is given once between changes.
        noise: the :class:`GradientNoiseScale` in force: that of the shortest memory that identifies the noise scale.
        step_time: the :class:`StepTimeModel` fed with the updates' times.
        exchange: on several ranks, makes one list of measurements of those that each rank made, of plain numbers.
        agree: on several ranks, gives all of them the same proposal.
        others_need: statistics that something else than policy and rule uses, such as a clock in units of the gain.
        record: is given each measurement that the policy is asked with, in plain numbers.

    Raises:
        ValueError: for sizes below one, or a minimum above the maximum.
    """

    def __init__(
        self,
        policy: str | Policy | Callable[[Measurement], float],
        *,
        lr_scaling: str | LRScaling,
        min_batch_size: int | None = None,
        max_batch_size: int | None = None,
        reference_batch_size: int | None = None,
        adjust_every: int = 10,
        quantize: bool | None = None,
        multiple_of: int = 1,
    ) -> None:
        check_bounds(min_batch_size, max_batch_size)
        for name, value in (("adjust_every", adjust_every), ("multiple_of", multiple_of)):
            if not _is_count(value, least=1):
                raise ValueError(f"{name}={value!r} must be a positive whole number.")
        if reference_batch_size is not None and not _is_count(reference_batch_size, least=1):
            raise ValueError(f"reference_batch_size={reference_batch_size!r} must be a positive whole number, or None.")
        if quantize is not None:
            check_flags(quantize=quantize)
        self.policy = resolve_policy(policy)
        self.others_need: frozenset[str] = frozenset()
        self.lr_scaling = resolve_lr_scaling(lr_scaling, policy=self.policy)
        self.min_batch_size = min_batch_size
        self.max_batch_size = max_batch_size
        self.adjust_every = adjust_every
        self._quantize = quantize
        self.multiple_of = multiple_of
        self._noises = [GradientNoiseScale(confidence=IDENTIFIED_AT) for _ in NOISE_MEMORY_FRACTIONS]
        self._level = GradientLevel()
        self.inner_products = InnerProducts()
        self.step_time = StepTimeModel()
        self.reference_batch_size = reference_batch_size
        self.batch_size = reference_batch_size
        self.note: str | None = None
        self._noted: list[str] = []
        self.exchange: Callable[[list[Measurement]], list[Measurement]] | None = None
        self.agree: Callable[[float], float] | None = None
        self.record: Callable[[Measurement], None] | None = None
        self._pending: list[Measurement] = []
        self._updates = 0
        self._changed_at = 0
        self._previous = reference_batch_size
        self._at_size = 0  # updates made at the size in force, which come some time after it was decided
        self._factor_before = 1.0
        self._measured_samples = 0
        self._settled = 0
        self._retreats = 0
        self._measured_run = 0
        self._noise_matters = True
        self._last_noise_scale = self._rate_noise_scale = math.nan
        self._estimates = (math.nan, math.nan, math.nan)
        self._peak_lr = math.nan
        self._ages = Ages()
        self._newest = (0, math.nan, math.nan)  # update, |G|^2 and tr(Sigma) of the last measured one

    @property
    def careful(self) -> bool:
        """Whether changes are quantised and need evidence."""
        return is_measured(self.policy) if self._quantize is None else self._quantize

    @property
    def _active(self) -> Policy:
        """The policy that answers for the last proposal, where several make one."""
        return active_policy(self.policy)

    @property
    def noise(self) -> GradientNoiseScale:
        """The estimate in force."""
        return next((noise for noise in self._noises if noise.identified), self._noises[-1])

    @property
    def policy_needs(self) -> frozenset[str]:
        """The statistics that the policy alone uses."""
        return frozenset(getattr(self._active, "needs", ()))

    @property
    def needs(self) -> frozenset[str]:
        """What has to be measured for policy, learning-rate rule and others: any of ``"noise"`` and ``"step_time"``."""
        if self._keeps_all:
            return frozenset()
        needs = self._needs
        return needs - _FROM_PARTS | {"noise"} if needs & _FROM_PARTS else needs

    @property
    def _keeps_all(self) -> bool:
        """Whether the size stays what it is without this package."""
        reference = self.reference_batch_size
        if reference is None:
            return isinstance(self.policy, Constant) and self.policy.batch_size is None
        return constant_size(self.policy, reference) == reference == self._clamp(reference)

    @property
    def _needs(self) -> frozenset[str]:
        """As policy, rule and others name them."""
        return frozenset(getattr(self.policy, "needs", ())) | self._needs_besides

    @property
    def _needs_besides(self) -> frozenset[str]:
        return frozenset(getattr(self.lr_scaling, "needs", ())) | self.others_need

    @property
    def noise_scale(self) -> float:
        """The last identified noise scale in samples, ``NaN`` before there is one."""
        return self._last_noise_scale

    @property
    def estimates(self) -> tuple[float, float, float]:
        """Noise scale (NaN while not identified), ``|G|^2`` and ``tr(Sigma)``, as the policy was last told."""
        return self._estimates

    @property
    def rate_noise_scale(self) -> float:
        """The noise scale that the learning rate follows: its lower quartile, as the evidence last had it.

        A rate that is too high diverges, and one that is too low only takes longer. ``NaN`` before there is one.
        """
        return self._rate_noise_scale

    def measures_noise(self, update: int, schedule: Schedule = PARTS) -> bool:
        """Whether the noise of update ``update`` (from 0) should be measured; rarely while nothing could come of it."""
        due = measures_noise(update, schedule if self._noise_matters else schedule.thinned(IDLE_NOISE))
        return due and "noise" in self.needs

    def times_parts(self, update: int) -> bool:
        """Whether update ``update`` (from 0) should run in two unequal parts, whose times say what a sample costs."""
        due = update % TIMED_EVERY == TIMED_EVERY - 1
        return due and "step_time" in self.policy_needs and self.step_time.wants_passes

    def lr_factor(self, batch_size: float, lr: float = math.nan) -> float:
        """Factor on the scheduled learning rate for an update.

        Args:
            batch_size: samples of the update.
            lr: the scheduled rate, for policies that set the rate together with the size.
        """
        if self.reference_batch_size is None:
            return 1.0
        if hasattr(self.policy, "lr_factor"):
            own: object = self.policy.lr_factor(batch_size, self.reference_batch_size, lr)
            return _checked_factor(own, _words.name(self.policy), batch_size)
        factor = self._rule_factor(batch_size)
        rewarm = getattr(self.lr_scaling, "rewarm", 0)
        if self._at_size < rewarm:
            share = (self._at_size + 1) / (rewarm + 1)
            factor = min(factor, self._factor_before + share * max(0.0, factor - self._factor_before))
        return factor

    def _rule_factor(self, batch_size: float) -> float:
        assert self.reference_batch_size is not None
        factor: object = self.lr_scaling.factor(batch_size, self.reference_batch_size, self._rate_noise_scale)
        return _checked_factor(factor, _words.name(self.lr_scaling), batch_size)

    def sum_factor(self, batch_size: float) -> float:
        """Factor on a loss that is a sum over ``batch_size`` samples.

        Rules speak of mean gradients. A sum grows with its samples by itself, which would scale twice: it is kept at
        that of the reference size, unless the rate is not scaled, and not because of what the policy is.
        """
        owns = hasattr(self.policy, "lr_factor") or hasattr(self.policy, "auto_lr_scaling")
        scales = owns or not isinstance(self.lr_scaling, NoScaling)
        if not scales or self._keeps_all or self.reference_batch_size is None:
            return 1.0
        return self.reference_batch_size / batch_size

    def group_values(self, batch_size: float, factor: float) -> GroupValues | None:
        """What else the rule sets in each parameter group for an update; ``None`` where it sets nothing.

        Args:
            batch_size: samples of the update.
            factor: that of the learning rate.
        """
        values = getattr(self.lr_scaling, "group_values", None)
        if values is None or self.reference_batch_size is None:
            return None
        if batch_size == self.reference_batch_size and self._ages.are_plain:
            return None
        scale = batch_size / self.reference_batch_size

        def values_of(group: Mapping[str, Any]) -> Mapping[str, Any]:
            if hasattr(self.lr_scaling, "age"):
                self.lr_scaling.age = self._ages.of(group)
            changed: Mapping[str, Any] = values(group, scale, factor)
            return changed

        return values_of

    def count_step(self, optimizer: Optimizer, batch_size: float) -> None:
        """An optimizer has made a step with the rate for ``batch_size`` samples."""
        assert self.reference_batch_size is not None
        self._ages.count_step(optimizer, batch_size / self.reference_batch_size)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Take up an optimizer; refuse a rule that has no meaning for it up to the largest size.

        Raises:
            ValueError: with the reason.
        """
        self._ages.follow(optimizer)
        reason = why_not_scaled(optimizer)
        if reason is not None and (hasattr(self.policy, "lr_factor") or not isinstance(self.lr_scaling, NoScaling)):
            raise ValueError(
                f"the learning rate cannot be scaled with the batch size, since {reason}; use another optimizer, or "
                'lr_scaling="none" with a policy that leaves the rate alone.'
            )
        check = getattr(self.lr_scaling, "check", None)
        if check is not None and self.max_batch_size is not None and self.reference_batch_size is not None:
            check(optimizer, self.max_batch_size / self.reference_batch_size)

    def observe(self, measurement: Measurement) -> Decision | None:
        """Take in one update; every ``adjust_every``-th call asks the policy.

        Returns:
            The change of the batch size that was decided, or ``None``.
        """
        if self.reference_batch_size is None:
            self.reference_batch_size = measurement.reference_batch_size
        if self.batch_size is None:
            self.batch_size = self.reference_batch_size
        self._pending.append(measurement)
        self._at_size += self._is_at_size(measurement.batch_size)
        if math.isfinite(measurement.lr) and not measurement.lr <= self._peak_lr:
            self._peak_lr = measurement.lr
        self._updates += 1
        if self._updates % self.adjust_every:
            return None
        loss = self._absorb()
        self._look_again()
        described = self._describe(measurement, loss=loss)
        if self.record is not None:
            self.record(replace(described, seconds=math.nan, peak_memory=math.nan, step_time=None))
        decision = self._decide(described)
        self._noise_matters = decision is not None or self._could_change(described)
        return decision

    def decide(self, measurement: Measurement) -> Decision | None:
        """Ask the policy about a measurement of an earlier run, as it was recorded there.

        Size, bounds and step times are this controller's own; the rest is the measurement's.
        """
        assert self.batch_size is not None
        same = measurement.batch_size == self.batch_size
        self._updates = measurement.update
        self._at_size = measurement.updates_at_size if same else measurement.update - self._changed_at
        return self._decide(replace(measurement, batch_size=self.batch_size, step_time=self.step_time))

    def _is_at_size(self, samples: int) -> bool:
        """Whether an update's samples are nearer to the size in force than to the one before."""
        assert self.batch_size is not None
        before = self._previous or self.batch_size
        if before == self.batch_size:
            return True
        halfway = math.sqrt(before * self.batch_size)
        return samples >= halfway if self.batch_size >= before else samples <= halfway

    def _absorb(self) -> float:
        """Read the pending measurements' numbers in one transfer and update the estimates; the mean loss."""
        pending = self._pending
        if self.exchange is not None:
            pending = self.exchange(pending)
        numbers = iter(read_numbers([n for m in pending for n in (*m.part_sq_norms, m.sq_norm, m.loss)]))
        samples, losses = 0, 0.0
        for m in pending:
            if len(m.part_sq_norms):
                self._absorb_parts(m, [next(numbers) for _ in m.part_sq_norms], next(numbers))
            else:
                self._absorb_norm(m.batch_size, next(numbers))
            self._absorb_time(m)
            loss = next(numbers)
            if math.isfinite(loss):
                samples += m.batch_size
                losses += m.batch_size * loss
        self._pending.clear()
        noise = self._estimate()
        if not math.isnan(self._estimates[0]):
            self._last_noise_scale = self._estimates[0]
        self._follow(noise)
        return losses / samples if samples else math.nan

    def _follow(self, noise: GradientNoiseScale) -> None:
        """What the rate goes by: the least noise scale that the evidence allows.

        Also where it is not identified any more: gradients that grow, as before a divergence, take the rate back. Where
        no noise scale is the least, the estimate may take it back, and never raise it.
        """
        interval = noise.interval(RATE_EVIDENCE)
        least = _least_noise_scale(noise.grad_sq_norm, interval)
        if least is not None:
            self._rate_noise_scale = least
        elif interval == (0, math.inf) and noise.grad_sq_norm > 0:
            self._rate_noise_scale = min(self._rate_noise_scale, max(noise.grad_variance, 0.0) / noise.grad_sq_norm)

    def _estimate(self) -> GradientNoiseScale:
        """Look up the estimate in force."""
        noise = self.noise
        self._estimates = noise.noise_scale, noise.grad_sq_norm, noise.grad_variance
        return noise

    def _absorb_norm(self, size: int, sq_norm: float) -> None:
        """Of an update whose parts were not measured; NaN where nothing was."""
        if math.isfinite(sq_norm):
            self._look_back(size)
            unit, likely = self._level.take_in(sq_norm, size)
            for noise in self._noises:
                noise.update_norm(likely, size, unit=unit)

    def _absorb_parts(self, m: Measurement, part_sq_norms: list[float], sq_norm: float) -> None:
        if len(part_sq_norms) < 2:
            self._absorb_norm(m.batch_size, sq_norm)
            return
        size = sum(m.part_sizes)
        self._look_back(size)
        unit, _ = self._level.take_in(sq_norm, size) if math.isfinite(sq_norm) else (1.0, sq_norm)
        for noise in self._noises:
            noise.update(part_sq_norms, m.part_sizes, sq_norm, unit=unit)
        if "inner_products" in self._needs:  # other sources than pairs of parts may stand for the norms of pairs
            self.inner_products.update(part_sq_norms, m.part_sizes, sq_norm)
        newest = two_batch_estimate(part_sq_norms, m.part_sizes, sq_norm)
        if math.isfinite(sum(newest)):
            self._newest = (m.update, *newest)

    def _look_back(self, size: int) -> None:
        """How far the averages do, once ``size`` more samples are measured."""
        self._measured_samples += size
        for noise, fraction in zip(self._noises, NOISE_MEMORY_FRACTIONS, strict=True):
            noise.memory = max(NOISE_MEMORY_UPDATES * size, fraction * self._measured_samples)

    def _absorb_time(self, m: Measurement) -> None:
        measured = len(m.part_sq_norms) > 1
        self._measured_run = self._measured_run + 1 if measured else 0
        assert self.batch_size is not None
        if not 0.5 < m.batch_size / self.batch_size < 2:  # an epoch's tail, or fetched before the last change
            return
        self._settled += 1
        if self._settled <= SETTLE:
            return
        # Split on purpose, an update takes longer than others do; it counts only if there are no others.
        if not measured or len(m.pass_sizes) < 2 or self._measured_run > MIN_DWELL:
            self.step_time.update(m.batch_size, float(m.seconds))  # which skips what was not timed
        for size, seconds in zip(m.pass_sizes, m.pass_seconds, strict=True):
            self.step_time.update_pass(size, float(seconds))

    def _look_again(self) -> None:
        """Long after a size was left for a smaller one, what the larger ones take is worth finding out again."""
        assert self.batch_size is not None
        if self._retreats and self._updates - self._changed_at >= RETRY * 2 ** (self._retreats - 1):
            self.step_time.forget_above(self.batch_size)

    def _describe(self, m: Measurement, *, loss: float) -> Measurement:
        """The measurement as the policy sees it: plain numbers, with the estimates."""
        assert self.batch_size is not None and self.reference_batch_size is not None
        noise_scale, grad_sq_norm, grad_variance = self._estimates
        return replace(
            m,
            batch_size=self.batch_size,
            reference_batch_size=self.reference_batch_size,
            updates_at_size=self._at_size,
            peak_lr=self._peak_lr,
            loss=loss,
            part_sq_norms=(),
            part_sizes=(),
            pass_sizes=(),
            pass_seconds=(),
            sq_norm=math.nan,
            noise_scale=noise_scale,
            grad_sq_norm=grad_sq_norm,
            grad_variance=grad_variance,
            interval=self.noise.interval(EVIDENCE),
            inner_product_variance=self.inner_products.variance,
            inner_product_lower=self.inner_products.lower,
            inner_product_sq_norm=self.inner_products.sq_norm,
            measured_update=self._newest[0],
            measured_grad_sq_norm=self._newest[1],
            measured_grad_variance=self._newest[2],
            step_time=self.step_time,
        )

    def _decide(self, m: Measurement) -> Decision | None:
        answer = self._answer(m)
        if isinstance(answer, _Stay):
            if answer.kind and answer.kind not in self._noted:
                self.note = f"{m.batch_size} stays: {answer.reason()}"
                self._noted.append(answer.kind)
            return None
        self.note = None
        self._noted.clear()
        self._changed_at = self._updates
        assert self.batch_size is not None
        self._factor_before, self._at_size = self.lr_factor(self.batch_size, m.lr), 0
        self._previous = self.batch_size
        self._settled = 0
        self._retreats += answer.batch_size < answer.previous
        self.batch_size = answer.batch_size
        return answer

    def _answer(self, m: Measurement) -> Decision | _Stay:
        proposal = self._proposal(self.policy, m)
        if not math.isfinite(proposal):
            return _Stay("no proposal", lambda: f"the policy proposed {proposal}")
        if self.careful:
            return self._careful_answer(m, proposal)
        size = self._clamp(proposal)
        if size == m.batch_size < proposal and getattr(self._active, "is_test", False):
            size = self._bounded(size + self.multiple_of, m)  # too large a step for its proposal to round to
        bound = self._bound_of(proposal)
        if size != m.batch_size:
            words = self._words_of_bounded(m, size, proposal, bound)
            return Decision(size, m.batch_size, f"{m.batch_size} -> {size}: {words}")
        return _Stay(bound, partial(self._words_of_bounded, m, size, proposal, bound)) if bound else _Stay()

    def _proposal(self, policy: Policy, m: Measurement) -> float:
        """A policy's answer; on several ranks all members of a combination answer as on rank 0."""
        if isinstance(policy, Combined):
            return policy.propose_with(m, self._proposal)
        proposal: object = policy.propose(m)
        try:
            own = float(proposal)  # type: ignore[arg-type]  # refused below
            return own if self.agree is None else self.agree(own)
        except (TypeError, ValueError):
            raise TypeError(
                f"{_words.name(policy)} proposed {proposal!r}, which is no batch size; return a number of samples."
            ) from None

    def _careful_answer(self, m: Measurement, proposal: float) -> Decision | _Stay:
        size = self._bounded(m.batch_size, m)
        if size != m.batch_size:
            return Decision(size, m.batch_size, f"{m.batch_size} -> {size}: {self._bound_in_words(m.batch_size, size)}")
        if "noise" in self.policy_needs and not math.isfinite(m.noise_scale):
            return self._unidentified_answer(m)
        return self._evident_answer(m, proposal)

    def _unidentified_answer(self, m: Measurement) -> Decision | _Stay:
        """A noise scale that is not identified may still be large beyond doubt, or not matter.

        A change that is right for all noise scales from the least that is possible to infinity has all the evidence
        that it needs; where none is the least possible, a smaller size that takes less time per sample is right for
        all. Only built-in policies are asked about it: others may count how often they are asked.
        """
        if is_measured(self._active):
            least = _least_noise_scale(m.grad_sq_norm, m.interval)
            supposed = math.inf if least is None else least
            supposing = replace(m, noise_scale=supposed, interval=(supposed, math.inf))
            answer = self._evident_answer(supposing, self._proposal(self._active, supposing))
            if isinstance(answer, Decision) and least is not None:
                return answer
            if isinstance(answer, Decision) and answer.batch_size < m.batch_size:
                words = f"{answer.batch_size} takes less time per sample, whatever the noise scale"
                return replace(answer, reason=f"{m.batch_size} -> {answer.batch_size}: {words}")
        return self._without_noise_scale(m)

    def _evident_answer(self, m: Measurement, proposal: float) -> Decision | _Stay:
        """A change that time, dwell and evidence allow."""
        if "step_time" in self.policy_needs and not math.isfinite(self.step_time.predict(2 * m.batch_size)):
            return self._trial(m)
        size = self._neighbour(m, proposal)
        if size == m.batch_size:
            return self._stay_at(m, proposal)
        if self._is_new:
            return _Stay()
        objection = self._objection(m, size, proposal)
        if objection is not None and hasattr(self._active, "goodput"):
            # The proposal may go by the time of a size that is long out of use, and lead the wrong way.
            beyond = self._grid_below if size > m.batch_size else self._grid_above
            other = self._bounded(beyond(m.batch_size), m)
            if other != m.batch_size and self._objection(m, other, proposal) is None:
                size, objection = other, None
        if objection is not None:
            return objection
        return Decision(size, m.batch_size, f"{m.batch_size} -> {size}: {self._words(m, size, proposal)}")

    def _without_noise_scale(self, m: Measurement) -> _Stay:
        """Nothing changes; but where a larger update costs too much, no noise scale could make it pay."""
        goodput = getattr(self._active, "goodput", None)
        size = self._bounded(self._grid_above(m.batch_size), m)
        if goodput is not None and size > m.batch_size and not _may_promise(MIN_PROMISE, goodput, size, m, math.inf):
            return _Stay("cost", lambda: f"it would not pay at any noise scale{self._cost_in_words(m, size)}")
        return _Stay("noise", lambda: "the gradient noise scale is not identified yet")

    def _could_change(self, m: Measurement) -> bool:
        """Whether some noise scale makes another size pay, within the bounds or above, or counts at this one.

        A larger size gains most where noise is everything, a smaller one where there is none.
        """
        goodput = getattr(self.policy, "goodput", None)
        follows = m.batch_size != self.reference_batch_size and "noise" in self._needs_besides
        if goodput is None or not self.careful or follows or self.step_time.wants_passes:  # a few times tell little
            return True
        above, below = self._grid_above(m.batch_size), self._bounded(self._grid_below(m.batch_size), m)
        return _may_promise(MIN_PROSPECT, goodput, above, m, math.inf) or (
            below < m.batch_size and _may_promise(MIN_PROSPECT, goodput, below, m, 0.0)
        )

    @property
    def _is_new(self) -> bool:
        waited = self._updates - self._changed_at
        return waited < MIN_DWELL or (self._at_size < MIN_DWELL and waited < NO_SHOW)

    def _trial(self, m: Measurement) -> Decision | _Stay:
        """A step only to learn its time, up from surely below the noise scale or down from surely above.

        Whatever that time is, at most a third of its samples, or of its time, is wasted.
        """
        low, high = m.interval
        beyond = self._grid_above if m.batch_size <= low else self._grid_below
        size = self._bounded(beyond(m.batch_size), m)
        timed = math.isfinite(self.step_time.predict(m.batch_size))
        if not timed or self._is_new or size == m.batch_size or low < m.batch_size < high or math.isnan(low):
            return _Stay("step time", lambda: "the time of a larger update is not known yet")
        words = (
            f"{_words.noise_scale(m)}, to learn the time of a {'larger' if size > m.batch_size else 'smaller'} update"
        )
        return Decision(size, m.batch_size, f"{m.batch_size} -> {size}: {words}")

    def _stay_at(self, m: Measurement, proposal: float) -> _Stay:
        words = partial(self._words, m, m.batch_size, proposal)
        smallest, largest = self._bounds
        if proposal > m.batch_size == largest:
            return _Stay("maximum", lambda: f"{words()}, {self._in_words('max_batch_size', m.batch_size)}")
        if proposal < m.batch_size == smallest:
            return _Stay(
                "minimum",
                lambda: (
                    f"{words()}{self._cost_in_words(m, 2 * m.batch_size)}, "
                    f"{self._in_words('min_batch_size', m.batch_size)}"
                ),
            )
        if proposal == m.batch_size:
            return _Stay("best", words)
        return _Stay("near", lambda: f"{words()}, {_words.count(proposal)} is less than a factor of two away")

    def _objection(self, m: Measurement, size: int, proposal: float) -> _Stay | None:
        """What speaks against a change: too small a promise, or too little evidence."""
        grows = size > m.batch_size
        doubtful = replace(
            m,
            noise_scale=m.interval[0] if grows else m.interval[1],
            inner_product_variance=m.inner_product_lower if grows else m.inner_product_variance,
        )
        goodput = getattr(self._active, "goodput", None)
        if goodput is None:
            # Only a built-in policy can be asked what if: another one may count how often it is asked.
            asks = is_measured(self._active) and self.policy_needs & _FROM_PARTS
            if asks and (self._active.propose(doubtful) - m.batch_size) * (proposal - m.batch_size) <= 0:
                words = partial(self._words, m, m.batch_size, proposal)
                return _Stay("interval", lambda: f"{words()}, which does not rule out that it is right")
            return None
        promise = goodput(size, m) / goodput(m.batch_size, m)
        if not promise >= 1 + MIN_PROMISE:
            return _Stay(
                f"promise {size}",
                lambda: (
                    f"{_words.noise_scale(m)}, {size} promises {_words.percent(promise)} goodput, less than "
                    f"{_words.percent(1 + MIN_PROMISE)}{self._cost_in_words(m, size)}"
                ),
            )
        if not goodput(size, doubtful) >= goodput(m.batch_size, doubtful):
            return _Stay("interval", lambda: f"{_words.noise_scale(m)} does not rule out a loss of goodput at {size}")
        return None

    def _cost_in_words(self, m: Measurement, size: int) -> str:
        """What an update of another size costs, for policies that count time."""
        ratio = self.step_time.predict(size) / self.step_time.predict(m.batch_size)
        if "step_time" not in self.policy_needs or math.isnan(ratio):
            return ""
        return f", an update of {size} takes {ratio:.2f} times as long"

    def _bound_of(self, proposal: float) -> str:
        """Which bound keeps the size from what is proposed, if one does."""
        smallest, largest = self._bounds
        whole = round(proposal)
        return "max_batch_size" if whole > largest else "min_batch_size" if whole < smallest else ""

    def _words_of_bounded(self, m: Measurement, size: int, proposal: float, bound: str) -> str:
        """Why ``size``, for a policy whose proposal is followed as far as the ``bound`` allows."""
        words = self._words(m, size, proposal)
        if not bound:
            return words
        wanted = f"{_words.count(proposal)} is wanted, but " if hasattr(self.policy, "reason") else ""
        return f"{words}, {wanted}{self._in_words(bound, size)}"

    def _bound_in_words(self, present: int, size: int) -> str:
        """What moves the ``present`` size to ``size``."""
        if self._clamp(present) == present:
            return f"{type(self.policy).__name__} leaves no {'smaller' if size > present else 'larger'} size"
        return self._in_words("min_batch_size" if size > present else "max_batch_size", size)

    def _in_words(self, bound: str, size: int) -> str:
        """A bound that allows ``size`` at most or at least."""
        value = getattr(self, bound)
        if value is None or value == size:
            return f"{bound} is {size}"
        return f"{bound} is {value} and every size a multiple of {self.multiple_of}"

    def _neighbour(self, m: Measurement, proposal: float) -> int:
        """The next quantised size in the direction of the proposal, if the proposal is that far.

        Where the policy can compute a promise, the promise decides instead of the distance; where it tests the
        size, the test does.
        """
        decided = hasattr(self._active, "goodput") or getattr(self._active, "is_test", False)
        reach, current = 1.0 if decided else MAX_GROWTH, m.batch_size
        if proposal > current:
            size = self._bounded(self._grid_above(current), m)
            return size if proposal >= min(reach * current, size) else current
        if proposal < current:
            size = self._bounded(self._grid_below(current), m)
            return size if proposal <= max(current / reach, size) else current
        return current

    def _grid_above(self, current: int) -> float:
        """The least ``B0 2^k`` that is more than ``current`` when it is rounded, as ``current`` may have been."""
        base = float(self.reference_batch_size or current)
        power = math.floor(math.log2(current / base))
        while self._rounded(base * 2.0**power) <= current:
            power += 1
        return float(base * 2.0**power)

    def _grid_below(self, current: int) -> float:
        """The largest ``B0 2^k`` that is less than ``current`` when it is rounded."""
        base = float(self.reference_batch_size or current)
        power = math.ceil(math.log2(current / base))
        while self._rounded(base * 2.0**power) >= current:
            power -= 1
        return float(base * 2.0**power)

    def _rounded(self, size: float) -> int:
        return round(size / self.multiple_of) * self.multiple_of

    @property
    def _bounds(self) -> tuple[int, float]:
        """Smallest and largest size, both multiples of ``multiple_of``."""
        step = self.multiple_of
        largest = math.inf if self.max_batch_size is None else max(step, self.max_batch_size // step * step)
        smallest = math.ceil((self.min_batch_size or self.reference_batch_size or 1) / step) * step
        return int(min(smallest, largest)), largest

    def _bounded(self, size: float, m: Measurement) -> int:
        """A size within the bounds of the policy, where it has some, and of the controller."""
        return self._clamp(bounded(self.policy, size, m.batch_size))

    def _clamp(self, size: float) -> int:
        smallest, largest = self._bounds
        return int(min(max(self._rounded(size), smallest), largest))

    def _words(self, m: Measurement, size: int, proposal: float) -> str:
        """Why ``size``, in the policy's words if it has any."""
        return _words.reason(self.policy, m, size, proposal)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to decide as this one would have; plain numbers only."""
        state: dict[str, Any] = {
            "reference_batch_size": self.reference_batch_size,
            "batch_size": self.batch_size,
            "note": self.note,
            "noted": list(self._noted),
            "updates": self._updates,
            "changed_at": self._changed_at,
            "previous": self._previous,
            "at_size": self._at_size,
            "factor_before": self._factor_before,
            "measured_samples": self._measured_samples,
            "settled": self._settled,
            "retreats": self._retreats,
            "measured_run": self._measured_run,
            "noise_matters": self._noise_matters,
            "noise_scale": self._last_noise_scale,
            "rate_noise_scale": self._rate_noise_scale,
            "peak_lr": self._peak_lr,
            "ages": self._ages.state_dict(),
            "newest": list(self._newest),
            "level": self._level.state_dict(),
            "noise": [noise.state_dict() for noise in self._noises],
            "inner_products": self.inner_products.state_dict(),
            "step_time": self.step_time.state_dict(),
            "pending": self.pending_state(),
        }
        if hasattr(self.policy, "state_dict"):
            state |= {"policy": self.policy.state_dict(), "policy_of": type(self.policy).__name__}
        return state

    def pending_state(self) -> list[dict[str, Any]]:
        """The measurements since the last decision, which are each rank's own."""
        return [_plain(m) for m in self._pending]

    def load_pending(self, state: Sequence[Mapping[str, Any]], *, whole: bool = True) -> None:
        """Put back what :meth:`pending_state` gave, without the parts' norms where they are not of all ranks."""
        pending = [_pending_measurement(record) for record in state]
        self._pending = pending if whole else [replace(m, part_sq_norms=(), part_sizes=()) for m in pending]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave; a policy with a memory that finds none, or another's, begins anew.

        Raises:
            ValueError: if something is missing or not what it should be; nothing is changed then.
        """
        _check_state(state, self.state_dict())
        noises, step_time = [GradientNoiseScale(confidence=IDENTIFIED_AT) for _ in self._noises], StepTimeModel()
        inner_products = InnerProducts()
        inner_products.load_state_dict(state["inner_products"])
        for noise, noise_state in zip(noises, state["noise"], strict=True):
            noise.load_state_dict(noise_state)
        step_time.load_state_dict(state["step_time"])
        pending = [_pending_measurement(record) for record in state["pending"]]
        same = state.get("policy_of") == type(self.policy).__name__
        if hasattr(self.policy, "load_state_dict") and "policy" in state and same:
            self.policy.load_state_dict(state["policy"])
        self._noises, self.inner_products, self.step_time = noises, inner_products, step_time
        self._pending = pending
        self._level.load_state_dict(state["level"])
        self.reference_batch_size = state["reference_batch_size"]
        self.batch_size = state["batch_size"]
        self.note = state["note"]
        self._noted = list(state["noted"])
        self._updates = state["updates"]
        self._changed_at = state["changed_at"]
        self._previous = state["previous"]
        self._at_size, self._factor_before = state["at_size"], state["factor_before"]
        self._measured_samples = state["measured_samples"]
        self._settled = state["settled"]
        self._retreats = state["retreats"]
        self._measured_run = state["measured_run"]
        self._noise_matters = state["noise_matters"]
        self._last_noise_scale, self._rate_noise_scale = state["noise_scale"], state["rate_noise_scale"]
        self._peak_lr = state["peak_lr"]
        self._ages.load_state_dict(state["ages"])
        update, sq_norm, variance = state["newest"]
        self._newest = (update, sq_norm, variance)
        self._estimate()


def _may_promise(
    promise: float, goodput: Callable[[float, Measurement], float], size: float, m: Measurement, noise_scale: float
) -> bool:
    """Whether ``size`` gives so much more goodput at a noise scale, as far as its time is known."""
    m = replace(m, noise_scale=noise_scale)
    return not goodput(size, m) < (1 + promise) * goodput(m.batch_size, m)


def _least_noise_scale(grad_sq_norm: float, interval: tuple[float, float]) -> float | None:
    """The least that the noise scale can be, identified or not; ``None`` where nothing tells.

    Nothing does where the estimate of ``|G|^2`` is not even positive, and no end of an interval says more than 0.
    """
    low, high = interval
    return low if grad_sq_norm > 0 and low < math.inf and (low > 0 or high < math.inf) else None


def _checked_factor(factor: object, name: str, batch_size: float) -> float:
    try:
        number = float(factor)  # type: ignore[arg-type]  # refused below
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} gave the factor {factor!r} for {batch_size:g} samples; return a number from 0 on.")
    return number


def check_bounds(min_batch_size: int | None, max_batch_size: int | None) -> None:
    """Refuse bounds that no batch size can meet.

    Raises:
        ValueError: if a bound is not a positive whole number, or the lower exceeds the upper.
    """
    for name, value in (("min_batch_size", min_batch_size), ("max_batch_size", max_batch_size)):
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}={value!r} must be a positive whole number of samples, or None.")
    if min_batch_size is not None and max_batch_size is not None and min_batch_size > max_batch_size:
        raise ValueError(
            f"min_batch_size={min_batch_size} is above max_batch_size={max_batch_size}; swap or widen them."
        )


def _plain(m: Measurement) -> dict[str, Any]:
    """A pending measurement without its tensors and models."""
    *norms, sq_norm, loss = read_numbers([*m.part_sq_norms, m.sq_norm, m.loss])
    return {
        **{name: getattr(m, name) for name in (*_COUNTS, *_FLOATS)},
        **{name: list(getattr(m, name)) for name in _SIZES},
        "part_sq_norms": norms,
        "sq_norm": sq_norm,
        "loss": loss,
        "seconds": float(m.seconds),
        "pass_seconds": [float(seconds) for seconds in m.pass_seconds],
    }


_COUNTS = ("update", "epoch", "samples", "batch_size", "reference_batch_size")
_FLOATS = ("lr", "peak_memory")
_SIZES = ("part_sizes", "pass_sizes")


def _pending_measurement(record: Any) -> Measurement:
    """The inverse of :func:`_plain`."""
    expected = _plain(Measurement())
    valid = isinstance(record, Mapping) and set(record) == set(expected)
    for name, example in expected.items() if valid else ():
        value = record[name]
        if name in _COUNTS:
            valid = valid and _is_count(value)
        elif isinstance(example, list):
            fits = _is_size if name in _SIZES else _is_number
            valid = valid and isinstance(value, list) and all(map(fits, value))
        else:
            valid = valid and _is_number(value)
    pairs = (("part_sq_norms", "part_sizes"), ("pass_seconds", "pass_sizes"))
    if not valid or any(len(record[one]) != len(record[other]) for one, other in pairs):
        raise ValueError(f"a pending measurement of a BatchSizeController cannot be {record!r}.")
    return Measurement(**record)


def _check_state(state: object, own: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"this is not the state of a BatchSizeController but a {type(state).__name__}.")
    others = () if state.get("policy_of") == own.get("policy_of") else ("policy", "policy_of")
    missing = [key for key in own if key not in state and key not in others]
    if missing:
        raise ValueError(f"this is not the state of a BatchSizeController: {', '.join(missing)} missing.")
    for key, fits in _STATE.items():
        if not fits(state[key]):
            raise ValueError(f"the state of a BatchSizeController cannot have {key}={state[key]!r}.")


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_numbers(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(_is_number, value))


def _are_finite(values: list[float]) -> bool:
    return all(0 <= value < math.inf for value in values)


def _is_age(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_count(value[0]) and _is_number(value[1])


def _is_size(value: object) -> bool:
    return _is_count(value, least=1)


_STATE: dict[str, Callable[[Any], bool]] = {
    "reference_batch_size": lambda value: value is None or _is_size(value),
    "batch_size": lambda value: value is None or _is_size(value),
    "note": lambda value: value is None or isinstance(value, str),
    "noted": lambda value: isinstance(value, list) and all(isinstance(kind, str) for kind in value),
    "updates": _is_count,
    "changed_at": _is_count,
    "previous": lambda value: value is None or _is_size(value),
    "at_size": _is_count,
    "factor_before": lambda value: _is_number(value) and 0 <= value < math.inf,
    "measured_samples": _is_count,
    "settled": _is_count,
    "retreats": _is_count,
    "measured_run": _is_count,
    "noise_matters": lambda value: isinstance(value, bool),
    "noise_scale": lambda value: _is_number(value) and not value < 0,
    "rate_noise_scale": lambda value: _is_number(value) and not value < 0,
    "peak_lr": _is_number,
    "ages": lambda value: isinstance(value, list) and all(map(_is_age, value)),
    "level": lambda value: _are_numbers(value, 3) and (_are_finite(value) or all(v != v for v in value)),
    "noise": lambda value: isinstance(value, list) and len(value) == len(NOISE_MEMORY_FRACTIONS),
    "newest": lambda value: _are_numbers(value, 3),
    "pending": lambda value: isinstance(value, list),
}
"""What each entry of a state has to be; ``noise``, ``inner_products``, ``step_time`` and ``policy`` check their own."""
