"""Studies: grids of runs that a file describes, and how far they are."""

from flatcl.utils.studies.study import Cell, Study, read

__all__ = ["Cell", "Study", "read"]
