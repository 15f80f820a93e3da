"""What a run leaves behind for people and programs: `report.json`, `report.html`, `front.png` and `front.svg`.

Names are looked up on first use (PEP 562): reading a report needs neither torch nor matplotlib.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmbo.report.build import build_report as build_report
    from llmbo.report.build import front_of as front_of
    from llmbo.report.machine import environment as environment
    from llmbo.report.origin import DataPart as DataPart
    from llmbo.report.origin import ElsewherePart as ElsewherePart
    from llmbo.report.origin import ModelPart as ModelPart
    from llmbo.report.origin import SourcePart as SourcePart
    from llmbo.report.origin import SplitPart as SplitPart
    from llmbo.report.schema import ImportancePart as ImportancePart
    from llmbo.report.schema import ItemsPart as ItemsPart
    from llmbo.report.schema import Report as Report
    from llmbo.report.schema import TrialPart as TrialPart
    from llmbo.report.schema import json_schema as json_schema
    from llmbo.report.write import write_report as write_report

_HOME = {
    "origin": ("DataPart", "ElsewherePart", "ModelPart", "SourcePart", "SplitPart"),
    "schema": (
        "ImportancePart",
        "ItemsPart",
        "Report",
        "TrialPart",
        "json_schema",
    ),
    "build": ("build_report", "front_of"),
    "machine": ("environment",),
    "write": ("write_report",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"llmbo.report.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
