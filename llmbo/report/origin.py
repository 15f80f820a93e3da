"""What `report.json` says of where its numbers come from: the run, the model, the text."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RunPart(_Part):
    """How the run was made. `settings` are what the user chose; `seconds` are summed over resumed processes, by phase.

    `recipe`: constants of the method that its models depend on; null in reports of the first version, which had others.
    """

    name: str
    command: str
    status: Literal["complete", "interrupted", "failed"]
    settings: dict[str, Any]
    seed: int
    versions: dict[str, str]
    platform: str
    device: str
    dtype: str
    seconds: dict[str, float]
    peak_memory_bytes: int
    recipe: dict[str, Any] | None = None


class ModelPart(_Part):
    name: str
    source: str
    model_type: str
    fingerprint: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    params: int
    block_params: int


class SplitPart(_Part):
    """One of three disjoint sets of windows. `tokens` counts every token of every window, BOS included."""

    windows: int
    tokens: int


class SourcePart(_Part):
    """One text of a mix: its `share` of the tokens, and the `windows` taken from it, of all three sets together."""

    source: str
    sha256: str
    share: float
    windows: int


class DataPart(_Part):
    """Where the text came from. Losses are means over the `window - 1` predicted tokens of each window.

    `sources` are the texts of a mix; `sha256` covers them all. `chat`: whether they were put through the tokenizer's chat template.
    """

    source: str
    sha256: str
    available_tokens: int
    window: int
    bos: bool
    calibration: SplitPart
    proxy: SplitPart
    heldout: SplitPart
    chat: bool = False
    sources: list[SourcePart] = []


class ElsewherePart(_Part):
    """The text of another domain, on windows of which the front and the dense model were judged once more, after the search.

    `digest` is of the tokens, `sha256` of the text.
    """

    source: str
    sha256: str
    available_tokens: int
    windows: int
    tokens: int
    digest: str
