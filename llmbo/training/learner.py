"""What of a model learns: adapters, norms or all, and output projections that follow in closed form."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmbo.training.plan import Plan
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.projection import Projection
from pruning.sequential import refit_to_dense

LORA_ALPHA = 2  # times the rank
REFIT_TOKENS = 16384


@dataclass(frozen=True)
class Refitter:
    """Fits a small model's output projections anew to what the dense model hands on.

    Args:
        dense: Stays as it is.
        architecture: Of the small model, in layers of the dense one.
    """

    dense: PreTrainedModel
    architecture: Architecture
    anatomy: Anatomy

    @classmethod
    def of(cls, dense: PreTrainedModel, architecture: Architecture) -> "Refitter":
        """Raises InvalidArchitecture where the small model was cut from another one."""
        anatomy = anatomy_of(dense)
        architecture.check(anatomy)
        return cls(dense, architecture, anatomy)

    def inputs(self, small: PreTrainedModel) -> Iterator[Projection]:
        """The input projections of all blocks that are there."""
        for layer, block in self._blocks(small):
            yield from (projection for projection, _ in block.inputs_of(layer))

    def outputs(self, small: PreTrainedModel) -> Iterator[Projection]:
        """The output projections of all blocks that are there."""
        return (block.output_of(layer) for layer, block in self._blocks(small))

    def _blocks(self, small: PreTrainedModel) -> Iterator[tuple[nn.Module, Any]]:
        kept = (index for index in range(self.anatomy.num_hidden_layers) if self.architecture.keeps_layer(index))
        for index, layer in zip(kept, self.anatomy.layers_of(small), strict=True):
            yield from ((layer, b) for b in self.anatomy.blocks if self.architecture.units(b.kind)[index])

    def refit(self, small: PreTrainedModel, windows: Tensor) -> None:
        """Fit on `num_windows x T` token ids."""
        refit_to_dense(small, self.dense, self.architecture, windows)


@dataclass(frozen=True)
class Learner:
    """A model that learns.

    Args:
        model: What was given, changed in place.
        trained: Its weights that the optimizer moves, by name, float32.
        refitted: Those that a refit moves.
        merged: Gives the model back as it was, all that was learned within its own weights.
    """

    model: PreTrainedModel
    trained: dict[str, nn.Parameter]
    refitted: dict[str, nn.Parameter]
    merged: Callable[[], PreTrainedModel]

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """All that differs from what was given."""
        return self.trained | self.refitted

    @classmethod
    def of(cls, model: PreTrainedModel, plan: Plan, refitter: Refitter | None = None) -> "Learner":
        """Prepare a model to learn by a plan."""
        merged: Callable[[], PreTrainedModel] = lambda: model  # noqa: E731
        model.requires_grad_(False)
        refitted: list[Tensor] = []
        if plan.train == "refit-lora":
            assert refitter is not None  # whoever plans it knows the dense model
            refitted = [p for output in refitter.outputs(model) for p in (output.weight, output.bias) if p is not None]
            inputs = set(map(id, refitter.inputs(model)))
            targets = [name for name, module in model.named_modules() if id(module) in inputs]
            merged = _with_adapters(model, plan, targets)
        elif plan.train == "lora":
            merged = _with_adapters(model, plan, "all-linear")
        elif plan.train == "all":
            model.requires_grad_(True)
        if plan.train in ("norms", "refit-lora"):
            outputs = set(map(id, refitted))
            for parameter in model.parameters():
                if parameter.ndim == 1 and id(parameter) not in outputs:
                    parameter.requires_grad_(True)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(False)  # a few hundred steps see too few of their rows
        if plan.recompute:
            recompute(model)
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        own = set(map(id, refitted))
        return cls(model, learning, {name: p for name, p in model.named_parameters() if id(p) in own}, merged)


def recompute(model: PreTrainedModel) -> None:
    """Keep no activations but those between layers."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        module.training = hasattr(module, "gradient_checkpointing")  # which asks for it; no dropout does


def _with_adapters(model: PreTrainedModel, plan: Plan, targets: Any) -> Callable[[], PreTrainedModel]:
    """Put adapters into the model's projections; what is given merges them and takes them out."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=plan.rank, lora_alpha=LORA_ALPHA * plan.rank, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed)  # the first factors are random
        wrapper: Any = get_peft_model(model, config)
    return wrapper.merge_and_unload


def adapter_values(model: PreTrainedModel, rank: int) -> int:
    """Values in the adapters of all projections."""
    return sum(rank * sum(m.weight.shape) for m in model.modules() if isinstance(m, Projection))
