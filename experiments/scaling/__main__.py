"""Memory, seconds and money of a search on large models, by arithmetic: the tables of docs/scaling.md.

    python -m experiments.scaling

The plans that `llmbo optimize --plan` prints, for devices that are not here: their rates and prices are assumptions, stated below.
`--efficiency` is the part of a device's peak that matrix products reach.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig

from llmbo.config import RunConfig
from llmbo.problem.residence import Machine
from llmbo.run.duration import Rates
from llmbo.run.plan import plan_of
from pruning.compensation import factor_values

MODELS = {
    "Llama-3.1-8B": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336,
    },
    "Llama-3.1-70B": {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """`matmul` and `single`: peak FLOP/s in bfloat16 and float32; `bandwidth` and `link`: bytes/s of its memory and from the host."""

    name: str
    memory: float
    matmul: float
    single: float
    bandwidth: float
    link: float
    dollars: float


DEVICES = (
    Device("80 GB (H100 SXM)", 80e9, 989e12, 67e12, 3.3e12, 50e9, 3.0),
    Device("24 GB (RTX 4090)", 24e9, 165e12, 82.6e12, 1.0e12, 25e9, 0.5),
)
GB = 1e9
HOST = 512e9  # bytes of memory beside the device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--efficiency", type=float, default=0.4)
    options = parser.parse_args()
    for name, shape in MODELS.items():
        for device in DEVICES:
            rates = Rates(
                matmul=options.efficiency * device.matmul,
                single=options.efficiency * device.single,
                passes=device.bandwidth / 4,  # two bytes read, two written
                link=device.link,
            )
            with tempfile.TemporaryDirectory() as folder:
                config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072, **shape)
                config.save_pretrained(Path(folder, name))
                run = RunConfig(
                    str(Path(folder, name)), options.evaluations, options.batch, dtype="bfloat16", device="cpu",
                    calibration_tokens=options.calibration_tokens,
                )  # fmt: skip
                plan = plan_of(run, rates, Machine("cuda", int(device.memory), int(HOST)))
            if device is DEVICES[0]:
                print(f"\n{name}: {plan.parameters / GB:.2f}B parameters")
                print(f"  refits of all widths {plan.disk['refits'].needed / GB:.1f} GB")
                print(f"  float32 factors of all layers at once {4 * factor_values(plan.anatomy) / GB:.1f} GB")
                for place, residence in plan.residences.items():
                    phases = ", ".join(f"{phase} {size / GB:.2f}" for phase, size in residence.footprint.phases.items())
                    kept = residence.footprint.weights / GB, residence.footprint.hidden / GB
                    print(
                        f"  layers wait: {place}: peak {residence.needed / GB:.1f} GB, of it weights {kept[0]:.1f}, hidden states "
                        f"{kept[1]:.2f}; {phases}; on the host {residence.host / GB:.1f}"
                    )
            search, total = plan.seconds["search"], sum(plan.seconds.values())
            before = total - search - plan.seconds["held-out windows"]
            place = plan.chosen.offload if plan.chosen else plan.refused
            print(
                f"  {device.name}: layers wait: {place}; preparation {before:.0f} s, {search / options.evaluations:.2f} s per candidate, "
                f"{options.evaluations} candidates {total / 60:.0f} min, ${device.dollars * total / 3600:.2f}"
            )


if __name__ == "__main__":
    main()
