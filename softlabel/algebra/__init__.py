"""Stores out of stores, without a teacher: mix members, re-temper, merge, convert, export."""

from softlabel.algebra.convert import convert_store
from softlabel.algebra.export import ExportSummary, export_store
from softlabel.algebra.merge import merge_stores
from softlabel.algebra.mix import combine_store
from softlabel.algebra.redo import redo_store
from softlabel.algebra.rewrite import RewriteSummary

__all__ = [
    "ExportSummary",
    "RewriteSummary",
    "combine_store",
    "convert_store",
    "export_store",
    "merge_stores",
    "redo_store",
]
