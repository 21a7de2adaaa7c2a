"""Quantization-aware training: weights learn to live on their grids, with the straight-through estimator.

Each forward pass rounds the weights as `quantize_nearest` would, on scales made anew from the weights of that moment;
the gradient passes through the rounding unchanged (Bengio et al. 2013, arXiv:1308.3432; Jacob et al. 2018,
arXiv:1712.05877). So rounding the returned weights with the same ``clip`` gives what a next step would compute with.
Without labels the float model is the teacher (Hinton et al. 2015, arXiv:1503.02531).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeship.compression.affine import choose_scales, spread
from edgeship.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

    from edgeship.core.weights import Affine
    from edgeship.program.program import TorchProgram

    Batch = Mapping[str, Any]
    Loss = Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]

# Outputs with one of these in their name are scores of classes; others are numbers in their own right.
SCORES = ("logit", "score")


def finetune(
    program: TorchProgram,
    encodings: Mapping[str, Affine],
    batches: Sequence[Batch],
    *,
    steps: int = 200,
    lr: float = 1e-4,
    samples: int = 8,
    seed: int = 0,
    loss: Loss | None = None,
    clip: bool = False,
    masks: Mapping[str, torch.Tensor] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, torch.Tensor]:
    """Train a program's float weights for the grids that they will be stored on.

    Args:
        encodings: weight name -> the grid it will have; other weights train in float.
        batches: inputs by name, NumPy, in the signature's shapes; further names (labels) are for ``loss``.
        steps: updates of Adam. lr: at first; it falls to zero along a cosine. samples: batches an update.
        loss: the user's training step, ``loss(module, batch) -> scalar``; ``module`` takes the program's inputs in
            order and answers with a tuple, ``batch`` holds tensors. None is distillation: the relative squared error
            of each float output, and for those called logits or scores the Kullback-Leibler divergence too.
        clip: scales as ``quantize_nearest(clip=True)`` chooses them, instead of from the largest weight.
        masks: weight name -> bool, True where a weight is kept; pruned weights stay zero.
        progress: called with (steps done, steps in all, the loss).

    A program with static activations is trained with those grids in place. The same seed gives the same bits.

    Returns:
        New float weights by name: every float parameter that the outputs depend on.

    Raises:
        DataError: no batches, or a loss that is not finite. UsageError: an unknown weight, or no steps.
    """
    import torch

    from edgeship.compat.torch import seeded

    if not batches:
        raise DataError("training needs at least one sample", fix="give --calibration DATA")
    if steps < 1 or samples < 1 or lr <= 0:
        raise UsageError("training needs steps, samples and a learning rate above zero", fix="leave them out")
    student = _student(program, encodings, clip, masks or {})
    inputs = [spec.name for spec in program.signature.inputs]
    measure = loss or _distillation(program, inputs)
    optimizer = torch.optim.Adam(list(student.trained.values()), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = _endless(len(batches), seed)
    # A user's step may draw numbers too; theirs repeat, and the caller's state stays.
    with seeded(seed), torch.enable_grad():
        for step in range(steps):
            optimizer.zero_grad()
            total = 0.0
            for _ in range(samples):
                batch = {name: torch.as_tensor(value).clone() for name, value in batches[next(order)].items()}
                value = measure(student, batch) / samples
                if not bool(torch.isfinite(value)):
                    raise DataError(f"training loss is {float(value)} at step {step}", fix="check the data, lower lr")
                torch.autograd.backward(value)
                total += float(value.detach())
            optimizer.step()
            schedule.step()
            progress(step + 1, steps, f"loss {total:.4g}")
    return {name: student.kept(name, value.detach()).clone() for name, value in student.trained.items()}


def _student(
    program: TorchProgram, encodings: Mapping[str, Affine], clip: bool, masks: Mapping[str, torch.Tensor]
) -> Any:
    """A module that computes with rounded weights and lets gradients through to float ones."""
    import torch

    body = _with_fake_activations(program) if program.activations else program.filled().module()
    aliases = program.record.aliases
    axes = {use.name: use.channel_axis for use in program.record.inventory.weights}
    names = {aliases.get(name, name) for name, _ in body.named_parameters()}
    trained = {
        name: program.weights[name].detach().float().clone().requires_grad_()
        for name in sorted(names)
        if program.weights[name].is_floating_point()
    }
    for name in (*encodings, *masks):
        if name not in trained:
            raise UsageError(f"{name} is not a weight that can be trained", fix="name parameters of the model")

    class Student(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trained = trained

        def kept(self, name: str, value: torch.Tensor) -> torch.Tensor:
            """Zero where pruning took a weight. The mask has the shape of ``value``."""
            return value * masks[name] if name in masks else value

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            """The program's outputs with the weights as they would be stored now.

            Tensors in the shapes of the signature.
            """
            rounded = {}
            for name, value in self.trained.items():
                value = self.kept(name, value)
                encoding = encodings.get(name)
                rounded[name] = (
                    value if encoding is None else _straight_through(value, encoding, axes[name], clip, name)
                )
            placed = {
                name: rounded[aliases.get(name, name)] for name, _ in body.named_parameters(remove_duplicate=False)
            }
            return tuple(torch.func.functional_call(body, placed, tensors))

    return Student()


def _straight_through(value: torch.Tensor, encoding: Affine, axis: int, clip: bool, name: str) -> torch.Tensor:
    """The stored value going forward, the identity going back. Any shape."""
    import torch

    with torch.no_grad():
        scale, zero = choose_scales(value, encoding, axis=axis, clip=clip, name=name)
        wide, shift = spread(scale, value.shape), spread(zero, value.shape)
        stored = (((value / wide).round() + shift).clamp(encoding.low, encoding.high) - shift) * wide
    return value + (stored - value).detach()


def _with_fake_activations(program: TorchProgram) -> torch.nn.Module:
    """The program with its activation grids, each pair of operators as one that has a gradient."""
    import torch

    from edgeship.compat.torch import pair_operators

    module = program.quantized().module()
    ops = pair_operators()
    for node in list(module.graph.nodes):
        if node.target != ops.dequantize_per_tensor.default:
            continue
        source, scale, zero, low, high = node.args[0].args[:5]
        with module.graph.inserting_before(node):
            fake = module.graph.call_function(torch.fake_quantize_per_tensor_affine, (source, scale, zero, low, high))
        node.replace_all_uses_with(fake)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _distillation(program: TorchProgram, inputs: Sequence[str]) -> Loss:
    """How far the student's float outputs are from those of the float program."""
    import torch
    from torch.nn import functional

    teacher = program.module(quantized=False)
    names = [spec.name for spec in program.signature.outputs]

    def measure(student: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of one batch, a scalar: how far the student's outputs are from the teacher's."""
        tensors = [batch[name] for name in inputs]
        with torch.no_grad():
            wanted = teacher(*tensors)
        total = torch.zeros(())
        for name, want, have in zip(names, wanted, student(*tensors), strict=True):
            if not want.is_floating_point():
                continue
            total = total + (have - want).square().mean() / want.square().mean().clamp(min=1e-12)
            if any(word in name.lower() for word in SCORES):
                found, right = (value.reshape(-1, value.shape[-1]).log_softmax(-1) for value in (have, want))
                total = total + functional.kl_div(found, right, log_target=True, reduction="batchmean")
        return total

    return measure


def _endless(count: int, seed: int) -> Iterator[int]:
    """Every sample once in an order drawn anew, again and again."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
