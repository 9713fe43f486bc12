"""The training loop: data order, optimizers, schedule, load balance, and a checkpoint to resume.

Optimizers: Muon for the matrices of the layers (momentum, then the nearest orthogonal matrix by
five Newton-Schulz steps; Jordan et al. 2024), each expert's matrix for itself, scaled so that its
update has AdamW's size (Liu et al. 2025, arXiv 2502.16982); AdamW for embeddings, head, norms and
routers. It reaches a loss in fewer tokens than AdamW alone, and tokens are what two cores lack.

Balance is DeepSeek-V3's without an auxiliary loss (arXiv 2412.19437, section 2.1.2): after each
step a router's bias moves by u towards the experts that got less than the mean load. The bias only
decides which experts are chosen, not how they are weighed.
"""

import math
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM

from tiny_corpus import shuffled
from tiny_kernels import linear_cross_entropy, use_training_kernels
from tiny_model import LoadCounter, routers, tiny_config

SEGMENT = 1024  # tokens read in one piece; a batch holds it whole, or as two windows of half
SEGMENTS_PER_BATCH = 4  # 4096 tokens a step: small enough that steps, not tokens, are plentiful
WARMUP_STEPS = 40
COOLDOWN = 0.4  # of all steps: the learning rate falls linearly to zero
LONG_WINDOWS = 0.12  # of all steps, the last ones: windows of 1024 instead of 512
BIAS_SPEED = 0.001  # u of the paper
BIAS_FROZEN = 0.04  # of all steps, the last ones: u = 0, as in the paper's last 500 B of 14.8 T
MUON_MOMENTUM = 0.95
# Quintic Newton-Schulz coefficients of Jordan et al.: fastest rise, singular values end near 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
CLIP_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What a person may choose about a run."""

    steps: int
    minutes: float  # wall clock of this invocation; the schedule hurries to end in time
    muon_lr: float = 5e-3
    adamw_lr: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0
    save_every_s: float = 300.0
    evaluate_every: int = 200


@dataclass(slots=True)
class Progress:
    """Where a run stands; saved with the weights."""

    step: int = 0
    share: float = 0.0  # of the run that is done: what the schedule goes by
    tokens: int = 0
    seconds: float = 0.0  # of training, stops and evaluation left out
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (step, nats per token)


class Batches:
    """Batches by step number alone, so that a resumed run sees what it would have seen."""

    def __init__(self, documents: list[list[int]], *, seed: int) -> None:
        """Take the encoded documents."""
        self._documents, self._seed = documents, seed
        total = sum(len(d) for d in documents)
        # One segment is lost to the random offset and the target of the last token.
        self.steps_per_epoch = (total - SEGMENT - 1) // SEGMENT // SEGMENTS_PER_BATCH
        self._epoch = -1
        self._stream = torch.empty(0, dtype=torch.long)
        self._order: list[int] = []
        self._offset = 0

    def _start_epoch(self, epoch: int) -> None:
        seed = self._seed * 1000 + epoch
        order = shuffled(len(self._documents), seed=seed)
        self._stream = torch.tensor([t for i in order for t in self._documents[i]])
        self._order = shuffled(self.steps_per_epoch * SEGMENTS_PER_BATCH, seed=seed + 500)
        self._offset = shuffled(SEGMENT, seed=seed + 250)[0]
        self._epoch = epoch

    def batch(self, step: int, *, length: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets `[4096 / length, length]` of a step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._start_epoch(epoch)
        chosen = self._order[index * SEGMENTS_PER_BATCH : (index + 1) * SEGMENTS_PER_BATCH]
        starts = [self._offset + i * SEGMENT for i in chosen]
        rows = torch.stack([self._stream[s : s + SEGMENT + 1] for s in starts])
        return rows[:, :-1].reshape(-1, length), rows[:, 1:].reshape(-1, length)


def _orthogonalized(stack: Tensor) -> Tensor:
    """Return the nearest semi-orthogonal matrices, roughly: `[matrices, m, n]` for the same.

    All steps are polynomials of the Gram matrix X X^T and commute, so they are multiplied up there,
    where it is m by m, and meet X once: half the work for m = n / 4.
    """
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.mT
    product: Tensor | None = None
    for i in range(NEWTON_SCHULZ_STEPS):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        product = step if product is None else step @ product
        if i + 1 < NEWTON_SCHULZ_STEPS:
            gram = step @ gram @ step
    assert product is not None, "at least one step"
    x = torch.bmm(product, x)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices `[m, n]` and stacks of them; fused gate and up are two matrices."""

    def __init__(self, named: dict[str, nn.Parameter], *, lr: float, weight_decay: float) -> None:
        """Take parameters by dotted name: the name tells a fused one."""
        self._parts = {
            id(p): 2 if name.endswith("gate_up_proj") else 1 for name, p in named.items()
        }
        super().__init__(list(named.values()), {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter in place."""
        assert closure is None, "no line search"
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - MUON_MOMENTUM)
                nesterov = p.grad.lerp(momentum, MUON_MOMENTUM)
                parts = self._parts[id(p)]
                shape = (-1, p.shape[-2] // parts, p.shape[-1])
                update = _orthogonalized(nesterov.view(shape)).reshape(p.shape)
                # 0.2: the root mean square of a typical AdamW update (Liu et al., section 2.2).
                scale = 0.2 * math.sqrt(max(shape[1:]))
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                    update, alpha=-group["lr"] * scale
                )


def _make_optimizers(
    model: nn.Module, settings: Settings
) -> tuple[list[torch.optim.Optimizer], list[float]]:
    """Return the optimizers and their peak learning rates."""
    muon: dict[str, nn.Parameter] = {}
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.ndim == 1 or name.endswith("mlp.gate.weight"):
            undecayed.append(p)
        elif "embed_tokens" in name or "lm_head" in name:
            decayed.append(p)
        else:
            muon[name] = p
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=settings.adamw_lr, betas=(0.9, 0.95), fused=True)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(muon, lr=settings.muon_lr, weight_decay=settings.weight_decay),
        adamw,
    ]
    return optimizers, [settings.muon_lr, settings.adamw_lr]


def learning_rate_factor(step: int, share: float) -> float:
    """Return the share of the peak learning rate: warm up, hold, fall linearly to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (1 - share) / COOLDOWN)


class Trainer:
    """A model in training, with all that a checkpoint must hold."""

    def __init__(
        self, documents: list[list[int]], held_out_ids: Tensor, settings: Settings, work: Path
    ) -> None:
        """Start from seeded weights, or from the checkpoint in the folder `work`.

        Args:
            documents: encoded training documents.
            held_out_ids: one stream of held-out tokens, for the curve printed along the way.
            settings: the run's choices.
            work: folder of the checkpoint.
        """
        torch.manual_seed(settings.seed)
        torch.set_flush_denormal(True)
        self._settings = settings
        self._path = work / "checkpoint.pt"
        self._held_out_ids = held_out_ids
        self._batches = Batches(documents, seed=settings.seed)
        self.model = DeepseekV3ForCausalLM(tiny_config())
        self.model.config.use_cache = False
        use_training_kernels(self.model)
        self._optimizers, self._peaks = _make_optimizers(self.model, settings)
        self.progress = Progress()
        self._asked_to_stop = False
        if self._path.exists():
            self._resume()

    def _resume(self) -> None:
        saved = torch.load(self._path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self._optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.progress = Progress(**saved["progress"])
        torch.set_rng_state(saved["rng"])

    def save(self) -> None:
        """Write the checkpoint; the old one stays until the new one is whole."""
        saved: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self._optimizers],
            "progress": asdict(self.progress),
            "rng": torch.get_rng_state(),
        }
        part = self._path.with_suffix(".part")
        torch.save(saved, part)
        part.replace(self._path)

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden: Tensor = self.model.model(input_ids=inputs).last_hidden_state
        return linear_cross_entropy(
            hidden.flatten(0, 1), self.model.lm_head.weight, targets.reshape(-1)
        )

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return nats per held-out token in windows of 512."""
        windows = self._held_out_ids[: (len(self._held_out_ids) - 1) // 512 * 512 + 1]
        inputs, targets = windows[:-1].view(-1, 512), windows[1:].view(-1, 512)
        losses = [
            self._loss(i, t).item() * len(i)
            for i, t in zip(torch.split(inputs, 16), torch.split(targets, 16), strict=True)
        ]
        return sum(losses) / len(inputs)

    def _evaluate(self, say: Callable[[str], None]) -> None:
        loss = self.held_out_loss()
        self.progress.held_out.append((self.progress.step, loss))
        say(f"step {self.progress.step}  held-out loss {loss:.4f}, perplexity {math.exp(loss):.2f}")

    def _step(self, counter: LoadCounter) -> tuple[float, float]:
        """Do one step; return its loss and the worst expert's load over the mean load."""
        progress = self.progress
        left = 1 - progress.share
        length = SEGMENT if left <= LONG_WINDOWS else SEGMENT // 2
        inputs, targets = self._batches.batch(progress.step, length=length)
        loss = self._loss(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        factor = learning_rate_factor(progress.step, progress.share)
        for optimizer, peak in zip(self._optimizers, self._peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        loads_LE = counter.take()
        mean_L1 = loads_LE.mean(1, keepdim=True)
        if left > BIAS_FROZEN:
            for router, move_E in zip(
                routers(self.model), torch.sign(mean_L1 - loads_LE), strict=True
            ):
                router.e_score_correction_bias.add_(move_E, alpha=BIAS_SPEED)
        progress.step += 1
        progress.tokens += inputs.numel()
        return loss.item(), (loads_LE / mean_L1).max().item()

    def _ask_to_stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._asked_to_stop = True

    def run(self, say: Callable[[str], None]) -> None:
        """Train to the end, a checkpoint every few minutes; `say` gets one line every ten steps.

        SIGTERM and Ctrl-C save the checkpoint and return.
        """
        settings, progress = self._settings, self.progress
        started = saved_at = time.monotonic()
        first_step, first_share = progress.step, progress.share
        durations: list[float] = []
        losses: list[float] = []
        counter = LoadCounter(self.model)
        signal.signal(signal.SIGTERM, self._ask_to_stop)
        signal.signal(signal.SIGINT, self._ask_to_stop)
        while progress.share < 1:
            if self._asked_to_stop:
                self.save()
                say(f"stopped at step {progress.step}; the same command goes on from here")
                return
            before = time.monotonic()
            loss, worst = self._step(counter)
            now = time.monotonic()
            durations = [*durations[-49:], now - before]
            losses = [*losses[-49:], loss]
            pace = statistics.median(durations)  # the median forgets a stopped process
            progress.seconds += min(now - before, 3 * pace)
            by_steps = (progress.step - first_step) / max(1, settings.steps - first_step)
            by_clock = (now - started) / (settings.minutes * 60)
            progress.share = first_share + (1 - first_share) * max(by_steps, by_clock)
            if progress.step % 10 == 0:
                say(
                    f"step {progress.step}  done {progress.share:.1%}"
                    f"  loss {statistics.fmean(losses):.4f}"
                    f"  {SEGMENT * SEGMENTS_PER_BATCH / pace:.0f} tok/s"
                    f"  worst load {worst:.2f} x mean"
                    f"  epoch {progress.step / self._batches.steps_per_epoch:.2f}"
                )
            if progress.step % settings.evaluate_every == 0:
                self._evaluate(say)
                counter.take()
            if now - saved_at > settings.save_every_s:
                self.save()
                saved_at = now
        counter.close()
        self._evaluate(say)
        self.save()
