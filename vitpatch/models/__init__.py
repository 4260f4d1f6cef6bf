"""Hugging Face vision transformers with named sites, verified when they are loaded."""
