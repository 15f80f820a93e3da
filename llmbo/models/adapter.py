"""An adapter that `llmbo elastic` has trained: in PEFT's files, with what it belongs to, and merged into a model's weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from llmbo.errors import ModelError, first_line
from llmbo.models.loading import Checkpoint, fingerprint
from llmbo.models.placement import DTYPES
from pruning.projection import matrix_of

WEIGHTS, ABOUT = "adapter_model.safetensors", "elastic.json"  # the first is PEFT's name
PREFIX = "base_model.model."  # before a name of the model's, in PEFT's files
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Adapter:
    """Low-rank changes of projections, and norms.

    Args:
        folder: Where it is, or will be.
        factors: Down (`rank x inputs`) and up (`outputs x rank`) by name of the projection.
        norms: By name of the parameter.
        scale: Of up times down.
        about: What it belongs to and how it was made, as in `elastic.json`: `base_model` with its name and `fingerprints` by dtype,
            `text` with what was trained on.
    """

    folder: Path
    factors: Mapping[str, tuple[Tensor, Tensor]]
    norms: Mapping[str, Tensor]
    scale: float
    about: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Write it so that PEFT loads it as well."""
        from peft import LoraConfig

        tensors = {f"{PREFIX}{name}": norm for name, norm in self.norms.items()}
        for name, (down, up) in self.factors.items():
            tensors |= {f"{PREFIX}{name}{DOWN}": down, f"{PREFIX}{name}{UP}": up}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
        rank = len(next(iter(self.factors.values()))[0])
        LoraConfig(
            base_model_name_or_path=self.about["base_model"]["source"],
            task_type="CAUSAL_LM",
            inference_mode=True,
            r=rank,
            lora_alpha=self.scale * rank,  # type: ignore[arg-type]  # a number will do
            target_modules=sorted(self.factors),
            modules_to_save=sorted(name.rpartition(".")[0] for name in self.norms) or None,
        ).save_pretrained(str(folder))
        (folder / ABOUT).write_text(json.dumps({"scale": self.scale, **self.about}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str) -> "Adapter":
        """What `save` has written.

        Raises:
            ModelError: There is no such folder, or it is damaged.
        """
        path = Path(folder).expanduser()
        if not (path / ABOUT).is_file():
            raise ModelError(f"There is no {ABOUT} in '{folder}': --elastic takes a folder that `llmbo elastic` wrote.")
        try:
            about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
            stored = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path / WEIGHTS).items()}
            downs = [name.removesuffix(DOWN) for name in stored if name.endswith(DOWN)]
            factors = {name: (stored.pop(name + DOWN), stored.pop(name + UP)) for name in downs}
            scale, _, _ = float(about["scale"]), about["base_model"]["fingerprints"], about["text"]["reserved"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"The adapter in '{folder}' is damaged ({first_line(error)}): train it again with `llmbo elastic`."
            ) from error
        return cls(path, factors, stored, scale, about)

    def check(self, loaded: Checkpoint) -> None:
        """Raise ModelError unless the adapter was trained for this dense model."""
        base = self.about["base_model"]
        if base["fingerprints"].get(loaded.dtype) != fingerprint(loaded.model, DTYPES[loaded.dtype]):
            raise ModelError(
                f"The adapter in '{self.folder}' was trained for '{base['name']}', whose weights are not those of '{loaded.name}': "
                "give that model, or an adapter of this one."
            )

    @torch.no_grad()
    def merge_into(self, model: PreTrainedModel) -> None:
        """Change the model's weights, which must be the adapter's base: every sum is rounded once.

        Raises:
            ModelError: A tensor fits none of the model's.
        """
        try:
            for name, (down, up) in self.factors.items():
                matrix = matrix_of(model.get_submodule(name))  # type: ignore[arg-type]  # whatever it is, its weight is asked for
                change = (up.to(matrix.device) @ down.to(matrix.device)) * self.scale
                matrix.copy_(matrix.float() + change)
            for name, norm in self.norms.items():
                model.get_parameter(name).copy_(norm)
        except (AttributeError, RuntimeError) as error:
            raise ModelError(
                f"The adapter in '{self.folder}' is damaged ({first_line(error)}): train it again with `llmbo elastic`."
            ) from error


def fingerprints(model: PreTrainedModel) -> dict[str, str]:
    """Of a float32 model, as it would be in each dtype that models are loaded in."""
    return {name: fingerprint(model, dtype) for name, dtype in DTYPES.items()}
