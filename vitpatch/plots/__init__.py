"""Tables → matplotlib figures."""
