"""What a forward and backward pass of the worst case holds, by a closed formula.

Counted is what autograd saves of a decoder layer, per token, by the widths of its linear layers and norms: as torch 2.13,
transformers 5.23 and TRL 1.16 compute on a CPU. The tests compare it with steps that `measure.py` trains.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Conv1D

from strategies.compat import attention_of
from strategies.memory.worst_case import Forward
from strategies.packing.head import ELEMENTS
from strategies.vision.modules import has_tower, inner_model

__all__ = ["Activations", "weights_of"]

TILE = (4096, 32768)
"""Tokens and vocabulary entries whose logits TRL's head, that of padded batches, holds at once."""
SAVED_IN_PYTHON = {"NewGELUActivation": 3}
"""Tensors that an activation function saves besides its input, where no kernel of its own computes it."""


class Activations:
    """The widths of a model's layers, and what follows from them.

    Args:
        model: the policy, with or without an adapter, on any device.
        cfg: a validated config; `bf16: auto` stands for true.

    Attributes:
        layer: the largest layer, which stands for all.
        frozen: bytes of the layers' weights that aren't trained.
        note: what the formula leaves out of this model; None where it knows all of it.
    """

    def __init__(self, model: Any, cfg: Any) -> None:
        self.cfg, self.full = cfg, cfg.adapter is None
        self.config = config = model.config.get_text_config()
        self.number = getattr(config, "num_hidden_layers", 0)
        # The decoder's layers are the list of that length: its name differs between model families. A tower may have as many.
        decoder = inner_model(model).get_decoder() if has_tower(model) else model
        stacks = (part for part in decoder.modules() if isinstance(part, nn.ModuleList) and len(part) == self.number)
        layers = next(stacks, [nn.Module()])
        self.layer = max(layers, key=weights_of)
        parameters = (parameter for layer in layers for parameter in layer.parameters())
        self.frozen = sum(parameter.nbytes for parameter in parameters if not parameter.requires_grad)
        self.vocabulary, self.hidden = model.get_output_embeddings().weight.shape
        self.heads = getattr(config, "num_attention_heads", 1)
        head = getattr(config, "head_dim", None) or self.hidden // self.heads
        self.query, self.key = head * self.heads, head * (getattr(config, "num_key_value_heads", None) or self.heads)
        self.stream = model.dtype.itemsize  # bytes of a number of the residual stream
        self.autocast = self.stream == 4 and bool(cfg.fp16 or cfg.bf16)
        self.size = 2 if self.autocast else self.stream  # of products
        # PEFT keeps the layers that it adapts under `base_layer`; what it adds is narrow.
        modules = {name: one for name, one in self.layer.named_modules() if ".lora_" not in name and ".experts." not in name}
        attention = tuple(f"{name}." for name, one in modules.items() if "Attention" in type(one).__name__)
        # Conv1D (GPT-2) stores (inputs, outputs), Linear the reverse.
        linear = {name: one.weight.shape for name, one in modules.items() if isinstance(one, nn.Linear | Conv1D)}
        self.linear = [shape if isinstance(modules[name], Conv1D) else shape[::-1] for name, shape in linear.items()]
        widening = [
            outputs
            for name, (inputs, outputs) in zip(linear, self.linear, strict=True)
            if outputs >= inputs and not name.startswith(attention)
        ]
        experts = getattr(config, "num_experts_per_tok", None) or 0
        self.inner = sum(widening) + 2 * experts * (getattr(config, "moe_intermediate_size", None) or max(widening, default=0))
        self.python = max(widening, default=0) * sum(SAVED_IN_PYTHON.get(type(one).__name__, 0) for one in modules.values())
        self.norms = sum(self._norm(name, one) for name, one in modules.items() if "Norm" in type(one).__name__)
        others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        self.note = None
        if experts or others or not attention:
            self.note = (
                f"{config.model_type} has more than attention and an MLP in its layers: activations are roughly those of a "
                "dense transformer of its widths; --measure knows better"
            )

    def _norm(self, name: str, norm: Any) -> int:
        """Bytes per token: its input and output, and the normed tensor where the gradient of its weight needs it."""
        weight = getattr(norm, "weight", None)
        width, inputs = self.hidden if weight is None else weight.numel(), self.stream
        if width < self.hidden:  # of each head; its input is not held beside its output
            width, inputs = self.key if name.rsplit(".", 1)[-1].startswith("k") else self.query, 0
        return width * (inputs + self.size + self.stream * (self.full and not isinstance(norm, nn.LayerNorm)))

    def peak(self, forward: Forward, gpu: bool) -> tuple[int, int]:
        """Return the bytes of activations and of the token head at the moment when most is held."""
        tokens, number = forward.tokens, self.number
        saved = tokens * self._saved(forward.packed)
        # Copies of weights that autocast makes: of trained ones it keeps them, of others autograd does.
        casts = 2 * sum(inputs * outputs for inputs, outputs in self.linear) if self.autocast else 0
        # The last norm, the states that are scored, and a gradient.
        ends = tokens * self.hidden * (3 * self.stream + self.size)
        gradients = tokens * self.inner * self.size
        if self.cfg.gradient_checkpointing:
            inputs = ends + number * tokens * self.hidden * self.stream
            scoring, backward = inputs + number * casts * self.full, inputs + casts + saved + gradients
        else:
            scoring = number * (saved + casts) + ends
            backward = scoring + gradients
        head = self._head(forward, gpu)
        return (scoring, head) if scoring + head > backward else (backward, 0)

    def _saved(self, packed: bool) -> int:
        """Bytes per token that autograd saves of a layer."""
        # Queries, keys, values, what attention makes of them; of the MLP, what its activation takes and makes.
        elements = 2 * self.query + 2 * self.key + 2 * self.inner + self.python
        if packed:
            # Keys and values are repeated for all heads; half of the queries, and the results, are concatenated again.
            elements += 2 * (self.query - self.key) + 3 * self.query // 2
            if any(outputs == self.query + 2 * self.key for _, outputs in self.linear):
                elements += 2 * self.key  # one product for all three, which stays beside the copies
        if self.autocast:
            # Of what a norm gives to several linear layers each makes its own copy; the one of attention's results takes none.
            elements += self.hidden * max(0, sum(inputs == self.hidden for inputs, _ in self.linear) - 3)
        dropped = 0 if self.full or not self.cfg.lora_dropout else sum(inputs for inputs, _ in self.linear) * (self.stream + 1)
        scores = attention_of(self.config) == "eager" and self.heads * self.cfg.sequence_len * (4 + self.size)
        return elements * self.size + self.norms + dropped + scores

    def _head(self, forward: Forward, gpu: bool) -> int:
        """Bytes of logits and their statistics, or of logits and the gradient of the head's weights."""
        weights = self.vocabulary * self.hidden
        casts, gradient = 2 * weights * self.autocast, 4 * weights * self.full
        if forward.packed:
            number = self.vocabulary * min(forward.tokens, max(1, ELEMENTS // self.vocabulary))
            return casts + max((12 + 2 * self.autocast) * number, 4 * number + gradient)
        tokens, width = min(forward.tokens, TILE[0]), min(self.vocabulary, TILE[1])
        tile = self.size * tokens * (TILE[1] if gpu else width)  # on a CPU memory that isn't written to takes no room
        # Without Triton, seven tensors of float32 and one of bool turn it into its gradient.
        return casts + tile + (0 if gpu else 29 * tokens * width) + gradient


def weights_of(module: nn.Module) -> int:
    """Return the number of a module's weights."""
    return sum(weight.numel() for weight in module.parameters())
