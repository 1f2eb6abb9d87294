"""Make stores from stores without a teacher: combine members, re-temper, merge, convert, export."""

from softlabel.convert.combine import combine_store
from softlabel.convert.export import ExportSummary, export_store
from softlabel.convert.merge import merge_stores
from softlabel.convert.recode import convert_store
from softlabel.convert.remake import redo_store
from softlabel.convert.rewrite import RewriteSummary

__all__ = [
    "ExportSummary",
    "RewriteSummary",
    "combine_store",
    "convert_store",
    "export_store",
    "merge_stores",
    "redo_store",
]
