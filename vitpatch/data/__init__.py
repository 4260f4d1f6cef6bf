"""Images, labels, masks and partners, from where they are to a batch."""
