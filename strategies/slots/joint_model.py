"""Rows of several slots in one forward: the base's products for all of them at once, each adapter's for its own row.

A forward of few tokens underfills the device. As in serving of many adapters (S-LoRA, arXiv 2311.03285; Punica, arXiv
2310.18547), what the base computes is the same whichever adapter follows, so that rows of several slots stand in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.functional import pad

from strategies.packing.head import TokenOutputs
from strategies.packing.layout import RowTokens, join_rows
from strategies.packing.support import prepare_packing, score_row
from strategies.slots.base import SharedBase
from strategies.slots.process_state import TorchRandom

__all__ = ["JointModel", "LayersMissed", "SlotRow", "adapters_of", "hooks_of", "why_not_joint"]

BLOCK = {"cuda": 128}
"""Tokens to which each row is padded. FlexAttention multiplies masked values of a block by 0, which NaN survives."""


class LayersMissed(RuntimeError):
    """A forward didn't come to all layers of an adapter, or not with the tokens of the row."""


@dataclass(eq=False)
class SlotRow:
    """A row that a slot hands over, until the gradients of its adapter are there."""

    adapters: dict[str, BaseTunerLayer]
    """PEFT's layers by the names that the base's layers have."""
    row: RowTokens
    weights: list[Tensor]
    """Those that the slot trains."""
    wanted: tuple[str, ...]
    autocast: torch.dtype | None = None
    """Type in which products are computed, None for that of the weights."""
    random: TorchRandom = field(default_factory=TorchRandom)
    """Random state at the beginning of the forward, that of the process if not given, then at its end."""
    outputs: TokenOutputs | None = None
    """Tensors of shape (N,); the log-probabilities are a leaf, into which the loss's gradient goes."""
    error: Exception | None = None
    """What the forward or backward of this row alone has raised."""
    graph: Tensor | None = field(default=None, repr=False)
    """The log-probabilities, as the forward has made them."""

    def __post_init__(self) -> None:
        self._beginning = self.random.copy()

    def restart(self) -> None:
        """Be as before the forward."""
        self.random, self.graph, self.outputs = self._beginning.copy(), None, None

    def take(self, outputs: TokenOutputs) -> None:
        """Take the outputs of a forward, of a joint one the row's part."""
        self.graph = outputs.log_probs
        statistics = {name: getattr(outputs, name) for name in self.wanted}
        self.outputs = TokenOutputs(outputs.log_probs.detach().requires_grad_(), **statistics)

    def gradient(self) -> Tensor | None:
        """Return the loss's gradient, None if there was no backward."""
        return None if self.outputs is None else self.outputs.log_probs.grad

    def gradients_of_weights(self) -> list[Tensor | None]:
        """Return a copy of what forwards before this one have added up."""
        return [None if weight.grad is None else weight.grad.clone() for weight in self.weights]

    def put_gradients_of_weights(self, gradients: Sequence[Tensor | None]) -> None:
        """Make these the gradients of the weights."""
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient


class JointModel:
    """A model on the shared base, without an adapter of its own.

    Args:
        base: of the slots.
    """

    def __init__(self, base: SharedBase) -> None:
        self._model = base.new_model()
        prepare_packing(self._model)
        # A trainer for which the base drops values out doesn't take part.
        self._model.eval()
        self._watched: set[str] = set()
        self._forward: _Adapters | None = None

    def forward(self, rows: Sequence[SlotRow]) -> None:
        """Run one forward; each row takes its outputs.

        Raises:
            LayersMissed: for a model whose layers don't all see the row.
        """
        for name in sorted({name for row in rows for name in row.adapters} - self._watched):
            self._model.get_submodule(name).register_forward_hook(partial(self._adapt, name))
            self._watched.add(name)
        device = rows[0].row.input_ids.device
        # Parameters have moved with those of the first trainer; buffers are each model's own then.
        self._model.to(device)
        joined, sizes = join_rows([row.row for row in rows], BLOCK.get(device.type, 1))
        wanted = tuple(dict.fromkeys(name for row in rows for name in row.wanted))
        self._forward = adapters = _Adapters(rows, sizes, device)
        try:
            with torch.autocast(device.type, rows[0].autocast, enabled=rows[0].autocast is not None):
                outputs = score_row(self._model, joined, wanted)
        finally:
            self._forward = None
        if adapters.met != [len(row.adapters) for row in rows]:
            raise LayersMissed("some layers of an adapter aren't given the tokens of a row in their order, as experts are not")
        scored = [len(row.row.labels) for row in rows]
        parts = {name: getattr(outputs, name).split(scored) for name in ("log_probs", *wanted)}
        for number, row in enumerate(rows):
            row.take(TokenOutputs(**{name: values[number] for name, values in parts.items()}))

    def backward(self, rows: Sequence[SlotRow]) -> None:
        """Add the gradients of a forward's rows to the weights of their adapters, by one backward."""
        ready = [row for row in rows if row.gradient() is not None]
        if ready:
            torch.autograd.backward([row.graph for row in ready], [row.gradient() for row in ready])

    def _adapt(self, name: str, module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Add the adapters' products to a layer's output; called by torch after the layer."""
        # Not within an adapter's own forward, which may call the layer.
        forward, self._forward = self._forward, None
        try:
            return None if forward is None else forward.add(name, inputs[0], output)
        finally:
            self._forward = forward


class _Adapters:
    """Adapters of the rows of one forward.

    Args:
        sizes: of the parts of the joint row, as `join_rows`.

    Attributes:
        met: layers of each row's adapter that the forward has come to.
    """

    def __init__(self, rows: Sequence[SlotRow], sizes: list[int], device: torch.device) -> None:
        self.met = [0] * len(rows)
        self._rows, self._sizes, self._device = rows, sizes, device
        self._layouts: dict[tuple[int, ...], _Layout] = {}

    def add(self, name: str, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the output of a layer with each adapter's products added to its own row.

        Args:
            inputs: of the layer, shape (1, T, H), or (1, T) for embeddings.
            output: shape (1, T, O).
        """
        if output.shape[:2] != (1, sum(self._sizes)):
            return output
        grouped: dict[torch.dtype, list[int]] = {}
        single: list[int] = []
        for number, row in enumerate(self._rows):
            if (layer := row.adapters.get(name)) is None:
                continue
            self.met[number] += 1
            if _is_plain(layer):
                grouped.setdefault(_weights(layer)[0].dtype, []).append(number)
            else:
                single.append(number)
        for numbers in grouped.values():
            output = output + self._grouped(name, tuple(numbers), inputs).to(output.dtype)
        if single:
            own = inputs.split(self._sizes, dim=1)
            by_peft = {number: partial(self._by_peft, self._rows[number], name, own[2 * number]) for number in single}
            output = self._changed(output, by_peft)
        return output

    def _changed(self, values: Tensor, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Tensor:
        """Return values of shape (1, T, H) with those of some rows changed."""
        parts = list(values.split(self._sizes, dim=1))  # each row, and its padding
        for number, change in changes.items():
            parts[2 * number] = change(parts[2 * number])
        return torch.cat(parts, dim=1)

    def _by_peft(self, row: SlotRow, name: str, inputs: Tensor, output: Tensor) -> Tensor:
        """Return what PEFT's layer makes of the base's output for its row."""
        layer: Any = row.adapters[name]
        base = layer.get_base_layer()
        former = vars(base).get("forward")
        base.forward = lambda *_, **__: output
        try:
            with row.random.used():
                return layer(inputs)
        finally:
            if former is None:
                del base.forward
            else:
                base.forward = former

    def _grouped(self, name: str, numbers: tuple[int, ...], inputs: Tensor) -> Tensor:
        """Return the products of plain LoRA layers for their rows, 0 elsewhere: shape (1, T, O)."""
        layers: list[Any] = [self._rows[number].adapters[name] for number in numbers]
        down, up, scaling, dropped = zip(*map(_weights, layers), strict=True)
        if drops := {number: dropout for number, dropout in zip(numbers, dropped, strict=True) if dropout is not None}:
            inputs = self._changed(inputs, {number: partial(self._drop, number, dropout) for number, dropout in drops.items()})
        layout = self._layouts.get(numbers)
        if layout is None:
            layout = self._layouts[numbers] = _Layout(self._sizes, numbers, self._device)
        rows = layout.gather(inputs[0].to(down[0].dtype))
        scales = rows.new_tensor(scaling).view(-1, 1, 1)
        products = torch.bmm(rows, _stack(down, dim=0).transpose(1, 2)) * scales
        return layout.scatter(torch.bmm(products, _stack(up, dim=1).transpose(1, 2))).unsqueeze(0)

    def _drop(self, number: int, dropout: Any, inputs: Tensor) -> Tensor:
        with self._rows[number].random.used():
            return dropout(inputs)


class _Layout:
    """Some rows of a forward as a batch of K rows of L tokens, as long as the longest."""

    def __init__(self, sizes: list[int], numbers: tuple[int, ...], device: torch.device) -> None:
        starts = [0, *accumulate(sizes)]
        spans = [(starts[2 * number], sizes[2 * number]) for number in numbers]
        longest = max(length for _, length in spans)
        self._shape = (len(spans), longest)
        self._tokens = starts[-1]
        # Without padding, and rows of others between them.
        self._is_whole = all(length == longest for _, length in spans) and longest * len(spans) == starts[-1]
        if self._is_whole:
            return
        offsets = torch.arange(longest)
        # Beyond the end of a row stands its last token, whose products are dropped.
        self._from = torch.cat([start + offsets.clamp(max=length - 1) for start, length in spans]).to(device)
        self._kept = torch.cat([offsets < length for _, length in spans]).nonzero().squeeze(1).to(device)
        self._to = self._from[self._kept]

    def gather(self, values: Tensor) -> Tensor:
        """Return values of shape (T, H) as (K, L, H)."""
        chosen = values if self._is_whole else values.index_select(0, self._from)
        return chosen.view(*self._shape, values.shape[1])

    def scatter(self, values: Tensor) -> Tensor:
        """Return values of shape (K, L, H) as (T, H), with 0 for tokens of other rows."""
        flat = values.flatten(0, 1)
        if self._is_whole:
            return flat
        return flat.new_zeros(self._tokens, flat.shape[1]).index_add(0, self._to, flat.index_select(0, self._kept))


def _is_plain(layer: Any) -> bool:
    """Return whether a layer adds the products of two matrices and nothing else."""
    (name,) = layer.active_adapters
    return type(layer) is Linear and name not in layer.lora_variant and layer.lora_B[name].bias is None


def _weights(layer: Any) -> tuple[Tensor, Tensor, float, Any]:
    """Return the two matrices of a plain layer, shapes (r, H) and (O, r), the scaling, and the dropout, None if inactive."""
    (name,) = layer.active_adapters
    dropout = layer.lora_dropout[name]
    is_active = dropout.training and getattr(dropout, "p", 0.0) > 0
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], dropout if is_active else None


def _stack(matrices: Sequence[Tensor], dim: int) -> Tensor:
    """Stack matrices that differ in the rank, their dimension `dim`: 0 stands for what a smaller one lacks."""
    rank = max(matrix.shape[dim] for matrix in matrices)
    missing = [rank - matrix.shape[dim] for matrix in matrices]
    if not any(missing):
        return torch.stack(list(matrices))
    # `pad` is given the last dimension first.
    sizes = [(0, 0, 0, number) if dim == 0 else (0, number) for number in missing]
    return torch.stack([pad(matrix, size) for matrix, size in zip(matrices, sizes, strict=True)])


def adapters_of(model: PeftModel) -> dict[str, BaseTunerLayer]:
    """Return a model's LoRA layers by the names that the layers below them have in the base."""
    layers = model.get_base_model().named_modules()
    return {name: module for name, module in layers if isinstance(module, BaseTunerLayer)}


def hooks_of(model: Any) -> int:
    """Return how many hooks on forwards and backwards the layers of a model have."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def why_not_joint(trainer: Any) -> str | None:
    """Return why rows of a trainer can't stand in forwards with those of others, as a phrase; None if they can."""
    model, args = trainer.model, trainer.args
    if not getattr(trainer, "packed", False) or trainer.vision is not None:
        return "its batches are padded, or have pictures"
    if args.gradient_checkpointing:
        return "gradient_checkpointing: it runs layers again, with the random numbers of one trial"
    if args.full_determinism:
        return "full_determinism: sums over rows of others round otherwise than alone"
    if trainer._steps_in_backward:
        return f"optim: {args.optim} steps in the backward"
    if (package := type(trainer).__module__.partition(".")[0]) != "strategies":
        return f"its trainer is {package}'s own, and may run rows in a way of its own"
    if len(model.active_adapters) != 1 or not all(isinstance(one, Linear | Embedding) for one in adapters_of(model).values()):
        return "its adapter isn't LoRA of linear layers and embeddings"
    trained = {id(weight) for layer in adapters_of(model).values() for weight in layer.parameters()}
    if any(weight.requires_grad and id(weight) not in trained for weight in model.parameters()):
        return "it trains weights beside LoRA's"
    if any(_is_random(module) for name, module in model.get_base_model().named_modules() if ".lora_dropout" not in name):
        return "layers of the base drop values out, or add noise"
    return None


def _is_random(module: Any) -> bool:
    """Return whether a layer draws random numbers in training: by a module, or by a rate of its own, as OPT's `dropout`."""
    rates = {name: value for name, value in vars(module).items() if isinstance(value, float) and value > 0}
    if "Drop" in type(module).__name__ and "p" in rates:
        return True
    return any("drop" in name or "jitter" in name for name in rates)
