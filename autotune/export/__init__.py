"""The best folder: files that the engineer's own tools take, each made from a trial that was measured.

Every file is written by the translation that the trial itself used (`autotune.formats`) and checked by the library that
will read it. A file whose format cannot express the overall winner is made from the fastest trial that it can express,
and says which trial that is.

files.py      the formats, and how each is written
documents.py  best.yaml and provenance.json
folder.py     puts them in a folder, whole or not at all
text.py       JSON, YAML and templates
"""

from autotune.export.files import FORMATS
from autotune.export.folder import export_best, export_files, export_pareto

__all__ = ["FORMATS", "export_best", "export_files", "export_pareto"]
