"""Compares finished runs, from their files alone: tables, figures and a page.

A run's own figures are in ``vitpatch.plots``; the command, which also draws those again, is ``vitpatch.cli.compare``.
"""
