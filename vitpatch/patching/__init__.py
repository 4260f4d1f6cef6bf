"""The engine: a plan and a batch → the logits of every patched run, each distinct state computed once."""
