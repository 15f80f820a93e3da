"""An architecture is valid, hashable and survives JSON."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.errors import InvalidArchitecture

ONE_FAMILY = pytest.mark.parametrize("model", ["llama"], indirect=True)


def test_full_keeps_everything(model: PreTrainedModel, anatomy: Anatomy) -> None:
    full = Architecture.full(anatomy)
    full.check(anatomy)
    assert full.kv_groups == (anatomy.num_key_value_heads,) * model.config.num_hidden_layers
    assert full.neurons == (24,) * model.config.num_hidden_layers
    assert (full.units("attention"), full.units("mlp")) == (full.kv_groups, full.neurons)


@ONE_FAMILY
@pytest.mark.parametrize("seed", range(5))
def test_json_round_trip(anatomy: Anatomy, random_architecture: Callable[..., Architecture], seed: int) -> None:
    architecture = random_architecture(anatomy, seed)
    again = Architecture.from_dict(json.loads(json.dumps(architecture.to_dict())))
    assert again == architecture
    assert hash(again) == hash(architecture)
    assert again.digest == architecture.digest


@ONE_FAMILY
def test_digests_differ_when_architectures_do(
    anatomy: Anatomy, random_architecture: Callable[..., Architecture]
) -> None:
    lookalikes = {Architecture((1, 2), (3, 4)), Architecture((1, 2), (4, 3)), Architecture((2, 1), (3, 4))}
    lookalikes |= {Architecture((3, 4), (1, 2)), Architecture((1,), (2,)), Architecture((12,), (34,))}
    architectures = lookalikes | {random_architecture(anatomy, seed) for seed in range(50)}
    assert len({architecture.digest for architecture in architectures}) == len(architectures) > 50
    assert all(re.fullmatch("[0-9a-f]{16}", architecture.digest) for architecture in architectures)


@pytest.mark.parametrize(
    ("kv_groups", "neurons", "said"),
    [
        ((1, 1), (3,), "2 and 1"),
        ((1, -1), (3, 3), "-1"),
        ((1, 1), (3, -7), "-7"),
        ((1, 1.0), (3, 3), "1.0"),
        ((1, True), (3, 3), "True"),
        ((1, "2"), (3, 3), "'2'"),
        ((1, None), (3, 3), "None"),
        ((0, 0), (3, 3), "attention"),
        ((), (), "attention"),
    ],
)
def test_invalid_widths_are_refused_and_named(kv_groups: Any, neurons: Any, said: str) -> None:
    with pytest.raises(InvalidArchitecture) as error:
        Architecture(kv_groups, neurons)
    assert said in str(error.value)
    with pytest.raises(InvalidArchitecture):
        Architecture.from_dict({"kv_groups": list(kv_groups), "neurons": list(neurons)})


def test_a_layer_is_kept_while_any_unit_is() -> None:
    architecture = Architecture((0, 1, 0), (0, 0, 1))
    assert [architecture.keeps_layer(layer) for layer in range(3)] == [False, True, True]


@ONE_FAMILY
@pytest.mark.parametrize(
    ("kv_groups", "neurons", "said"),
    [
        ((2,) * 4, (24,) * 4, "Expected 5 layers, got 4"),
        ((2,) * 6, (24,) * 6, "Expected 5 layers, got 6"),
        ((2, 2, 3, 2, 2), (24,) * 5, "Layer 2 has 2 units of attention, cannot keep 3"),
        ((2,) * 5, (24, 24, 24, 24, 25), "Layer 4 has 24 units of mlp, cannot keep 25"),
    ],
)
def test_check_refuses_what_the_model_does_not_have(
    anatomy: Anatomy, kv_groups: tuple[int, ...], neurons: tuple[int, ...], said: str
) -> None:
    with pytest.raises(InvalidArchitecture, match=said):
        Architecture(kv_groups, neurons).check(anatomy)
