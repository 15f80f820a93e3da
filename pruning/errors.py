"""What can go wrong while cutting a decoder, in the caller's words."""


class PruningError(Exception):
    """Base of everything this package raises on purpose."""


class UnsupportedModel(PruningError):
    """The model is no decoder of a family that `pruning.families` knows."""


class InvalidFamily(PruningError):
    """A row of families says what cannot be, or a third party's plug-in that should be one is none."""


class InvalidArchitecture(PruningError):
    """The widths do not describe a sub-network of the model."""


class InvalidMask(PruningError):
    """The mask's shape does not fit the model, or does not fit the compensation table's ranking."""


class NotEnoughText(PruningError):
    """The text source holds fewer tokens than the windows asked for."""


class UnreadableText(PruningError):
    """The text source does not exist, is not UTF-8 text, or cannot be reached."""


class UnreadableItems(PruningError):
    """The file of multiple-choice items does not exist, or a line of it is no item."""


class DamagedTensors(PruningError):
    """A file of tensors that was kept does not hold what was written into it."""


class UnsupportedExport(PruningError):
    """The file format, or what reads it, has no place for this architecture, tokenizer or dtype."""


class ExportFailed(PruningError):
    """What was written does not compute what the model computes, or cannot be loaded; it has been deleted."""
