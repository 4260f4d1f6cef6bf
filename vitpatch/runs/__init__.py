"""One run, from its composed config to its finished folder."""
