"""Compares finished runs, from their files alone: tables, figures and a page."""
